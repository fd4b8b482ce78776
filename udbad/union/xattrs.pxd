from udbad.branch.ccalls cimport unpin
from udbad.inodes.node cimport Node
from udbad.union.superblock cimport Superblock

cdef class Xattrs:
    cdef public Superblock sb
    cdef public dict _sure
    cdef public object _selinux
    cpdef find(self, Node node, bytes key)
    cpdef _find(self, Node node, bytes key)
    cpdef list names(self, Node node, caller)
    cpdef int _known(self, Node node, state) except -1
    cpdef _note(self, Node node, int bits, state)
    cpdef tuple _sure_of(self, branch)
    cpdef _check(self, bytes key)
    cpdef bytes _kept(self, Node node, bytes key)
    cpdef _target(self, Node node, int fd)
