from udbad.inodes.table cimport Dir, Layer, Node
from udbad.union.superblock cimport Superblock

cdef unsigned int _S_IFMT, _S_IFDIR

cdef class Found:
    cdef public long kind, examined
    cdef public object branch, st, whited, opaque
    cdef public list layers, offline
    cdef public bint moved
cdef class Missing:
    cdef public object answer, whited
    cdef public long examined
