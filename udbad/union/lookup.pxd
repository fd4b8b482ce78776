from udbad.union.superblock cimport Superblock
from udbad.inodes.table cimport Node, Dir, Layer
cdef class Found:
    cdef public long kind, examined
    cdef public object branch, st, whited, opaque
    cdef public list layers, offline
cdef class Missing:
    cdef public object answer, whited
    cdef public long examined
