from udbad.inodes.handles cimport HandleTable, OpenDir, OpenFile
from udbad.inodes.node cimport Dir, Node
from udbad.inodes.table cimport InodeTable
from udbad.union cimport lookup
from udbad.union.superblock cimport Superblock

cdef class SetAttr:
    cdef public object mode, uid, gid, size, atime_ns, mtime_ns

cdef class UnionFs:
    cdef dict __dict__  # for what is replaced
    cdef public Superblock sb
    cdef public InodeTable table
    cdef public HandleTable handles
    cdef public object creds, walks, on_unused_backing, kept
    cpdef lookup(self, parent_id, bytes name)
    cpdef getattr(self, node_id)
