cimport cython

from udbad.inodes.table cimport Dir, Layer, Node
from udbad.union.superblock cimport Superblock
from udbad.union.view cimport Said

cdef class Run:
    cdef public list names
    cdef public Said said
    cdef public Py_ssize_t first, end, after

# A loop over all names of a directory, of which there may be very many.
@cython.locals(at=Py_ssize_t, kind=cython.uchar, name=bytes)
cdef Py_ssize_t _as_said(dict hits, list names, Said said, dict children, Py_ssize_t first, Py_ssize_t end) except -1

@cython.locals(made=Said, now=Said, at=Py_ssize_t, place=Py_ssize_t, names=list, places=dict)
cdef Said _asked_anew(Superblock sb, handle)
