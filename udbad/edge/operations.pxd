from udbad.inodes.handles cimport OpenDir, OpenFile
from udbad.inodes.node cimport Dir, Node
from udbad.union.fs cimport UnionFs

cdef class Operations:
    cdef public UnionFs fs
    cdef public object coherence, _background, _passthrough
    cdef public bint _keep_listings
    cpdef tuple entry(self, parent, tuple found)
    cpdef find_xattr(self, node_id, bytes key)
