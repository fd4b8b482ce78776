from libc.stdint cimport uint32_t, uint64_t

from udbad.union.readdir cimport Run

cdef struct name_t:
    const char *text
    Py_ssize_t size
    uint64_t number
    uint32_t kind

cdef bint find_next(Run run, name_t *name) except -1
