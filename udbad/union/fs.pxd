cimport cython

from udbad.branch.ccalls cimport unpin
from udbad.branch.cstat cimport Status, fstat
from udbad.inodes.handles cimport HandleTable, OpenDir, OpenFile
from udbad.inodes.node cimport Dir, Node
from udbad.inodes.table cimport InodeTable
from udbad.union cimport lookup
from udbad.union.superblock cimport Superblock
from udbad.union.xattrs cimport Xattrs

cdef class SetAttr:
    cdef public object mode, uid, gid, size, atime_ns, mtime_ns

cdef class UnionFs:
    cdef dict __dict__  # for what is replaced
    cdef public Superblock sb
    cdef public InodeTable table
    cdef public HandleTable handles
    cdef public Xattrs xattrs
    cdef public object creds, walks, on_unused_backing, kept
    cpdef lookup(self, parent_id, bytes name)
    cpdef getattr(self, node_id)
    @cython.locals(node=Node, sb=Superblock, fd=int, owned=bint, times=bint, st=Status)
    cpdef setattr(self, node_id, SetAttr changes, fh, caller)
    cpdef _set_attributes(self, SetAttr changes, caller, int fd)
    cpdef need_writable(self, Node node, trigger, length=*)
    cpdef find_xattr(self, node_id, bytes key)
