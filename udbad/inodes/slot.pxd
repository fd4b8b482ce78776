# Words that are stored by one instruction each.

from udbad.inodes.handles cimport HandleTable

cdef class Slot:
    cdef public object memory
    cdef public HandleTable handles
    cdef public dict _seats
    cdef public object _next_seat
    cdef public unsigned long long[::1] words
    cdef public unsigned long long unique, noted
    cpdef intend(
        self, unsigned long long count=*, unsigned long long first=*, unsigned long long second=*, unsigned long long third=*,
        unsigned long long fourth=*, unsigned long long fifth=*, unsigned long long sixth=*
    )
    cpdef result(self, unsigned long long unique, unsigned long long number, body)

cdef Py_ssize_t _SEQUENCE, _INTENDED, _ANSWERED, _ERRNO, _SIZE, _HANDLE, _COUNT, _WORDS, _COPY, _LOOP, _COUNTS, _SEATS
cdef Py_ssize_t _SEAT_COUNT
