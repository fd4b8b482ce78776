# `changed` is added to by every change, and looked at after each request.

cdef class Record:
    cdef public int fd
    cdef public object _head, _words, slots, _half, _next, _rest, write, quick, live
    cdef public unsigned long long[::1] words
    cdef public long version, rewritten
    cdef public bint _moving
    cdef public set changed
    cpdef count(self, node)
    cpdef drop(self, node)
    cpdef flush(self)
