cimport cython

from udbad.branch.cstat cimport Status, find_at
from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union cimport lookup
from udbad.union.superblock cimport Superblock
from udbad.union.view cimport Said

cdef class Run:
    cdef public list names
    cdef public Said said
    cdef public Py_ssize_t first, end, after

@cython.locals(made=Said, now=Said, at=Py_ssize_t, place=Py_ssize_t, names=list, places=dict)
cdef Said _asked_anew(Superblock sb, handle)

@cython.locals(layer=Layer, fd=int, st=Status, kind=cython.uint)
cpdef _by_hit(Superblock sb, Dir parent, dict layers, bytes name, hit)
