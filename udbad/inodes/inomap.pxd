# Numbers are Python's here: they are shifted, which those of C lose bits by.

from udbad.inodes.record cimport Record

cdef class InoMap:
    cdef public Record record
    cdef public object in_use, _area_bits, _limit, _next_spare, _most
    cdef public dict _base, _index, _exceptions
