from udbad.union.copyup cimport Job

cdef class Request:
    cdef public unsigned long long unique
    cdef public object pid
    cdef public tuple directories
    cdef public int attempts
    cdef public CopyUp copy
    cdef public bint interrupted
    cpdef object perform(self)
    cpdef resume(self)
    cpdef suspend(self)

cdef class CopyUp:
    cdef public object waiting, need
    cdef public Job job
    cdef public Request began
    cdef public list requests, abandoned, ended
    cdef public double started
    cdef public bint stopped
