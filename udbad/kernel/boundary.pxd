cimport cython

cdef class OpStats:
    cdef public long long errors, bugs
    cdef public double seconds
    cdef public list buckets
    @cython.locals(at=Py_ssize_t, limit=double)
    cpdef count(self, double taken, int number)
