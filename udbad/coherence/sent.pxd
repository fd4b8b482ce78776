cimport cython

from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union.superblock cimport Superblock, is_object

cdef class SentAttributes:
    cdef public Superblock _sb
    cdef public object _notifier
    cpdef doubt(self, Node node)
    @cython.locals(child=Node, layer=Layer)
    cpdef bint is_as_sent(self, Dir node, bytes name) except -1
