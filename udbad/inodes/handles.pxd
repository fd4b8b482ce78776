# A handle's number is Python's: it may be a node's id, negative, for which those of C have no room.

from udbad.inodes.cnames cimport Names as CNames
from udbad.inodes.record cimport Record
from udbad.inodes.node cimport Dir, Node

cdef class OpenFile:
    cdef public object fh, group
    cdef public Node node
    cdef public int fd, backing_id
    cdef public unsigned int flags, uid, gid, pid, id_bits
    cdef public bint writable

cdef class OpenDir:
    cdef public object fh, pid, base, numbering
    cdef public Dir node
    cdef public CNames names
    cdef public bint cached

cdef class HandleTable:
    cdef public dict files, dirs, lost
    cdef public Record record
    cdef public object next, on_missing, on_missing_dir, unheard, unsure
    cpdef changed(self, handle)
    cpdef OpenFile file(self, fh)
    cpdef OpenFile _keep(self, OpenFile handle, bint first=*)
    cpdef OpenFile remove_file(self, fh)
