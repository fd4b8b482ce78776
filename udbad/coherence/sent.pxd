from udbad.inodes.table cimport Dir, Node
from udbad.union.superblock cimport Superblock

cdef class SentAttributes:
    cdef public Superblock _sb
    cdef public object _notifier
    cpdef doubt(self, Node node)
