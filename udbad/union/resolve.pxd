cimport cython

from udbad.branch cimport whiteout
from udbad.branch.cstat cimport Status, find_at, fstat
from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union.superblock cimport Superblock

cdef unsigned int _S_IFMT, _S_IFDIR, _S_IFCHR

cdef class Found:
    cdef public long kind, examined
    cdef public object branch, st, whited, opaque
    cdef public list layers, offline
    cdef public bint moved
cdef class Missing:
    cdef public object answer, whited
    cdef public long examined

@cython.locals(layers=list, layer=Layer, last=Py_ssize_t, pos=Py_ssize_t, examined=long, fd=int, st=Status, kind=cython.uint)
cpdef resolve(Superblock sb, Dir parent, bytes name, long below=*, long tries=*)
cpdef check_changeable(Dir parent)
