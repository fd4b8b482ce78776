from cpython.ref cimport PyObject
from libc.stdint cimport uint64_t

cdef class ById:
    cdef PyObject **_places
    cdef size_t _mask, _count
    cdef int _shift
    cdef size_t _place(self, uint64_t number) noexcept
    cdef int _resize(self, int bits) except -1
    cdef object _found(self, uint64_t number)
    cpdef get(self, uint64_t number)
    cpdef add(self, one)
    cpdef remove(self, one)
