cdef class OpStats:
    cdef public long long errors, bugs
    cdef public double seconds
    cdef public list buckets
