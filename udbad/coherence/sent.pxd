cimport cython

from udbad.branch.cstat cimport Status, fstat, lasting_stamp, stat_at
from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union.superblock cimport Superblock, is_object

cdef class SentAttributes:
    cdef public Superblock _sb
    cdef public object _notifier
    cpdef doubt(self, Node node)
    cpdef before_own(self, Node node, int fd)
    cpdef own_data(self, Node node, bint content, st, int fd)
    cpdef _stat(self, Node node, int fd)
    @cython.locals(layer=Layer, top=Layer)
    cpdef bint _is_directory_as_sent(self, Dir node) except -1
    @cython.locals(child=Node, layer=Layer, st=Status)
    cpdef bint is_as_sent(self, Dir node, bytes name) except -1
