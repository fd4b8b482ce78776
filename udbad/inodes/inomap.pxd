# Numbers are Python's here: they are shifted, which those of C lose bits by.

cdef class InoMap:
    cdef public object in_use, record, _area_bits, _limit, _next_spare, _most
    cdef public dict _base, _index, _exceptions
