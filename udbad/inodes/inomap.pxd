# Numbers that are shifted are Python's here: those of C lose bits by it.

cimport cython

from udbad.inodes.record cimport Record

cdef class InoMap:
    cdef public Record record
    cdef public object in_use, _area_bits, _next_spare, _most
    cdef public unsigned long long _limit
    cdef public dict _base, _index, _exceptions
    cdef public set _inos
    @cython.locals(index=object)
    cpdef unsigned long long number(self, unsigned long long dev, unsigned long long ino) except? 0
