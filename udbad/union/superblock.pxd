cimport cython

from udbad.branch.cstat cimport Status, fstat, stat_at
from udbad.inodes.handles cimport HandleTable
from udbad.inodes.inomap cimport InoMap
from udbad.inodes.slot cimport Slot
from udbad.inodes.node cimport Dir, Layer, Node
from udbad.inodes.table cimport InodeTable
from udbad.union.changes cimport Changes

@cython.locals(dev=cython.ulonglong, ino=cython.ulonglong, kind=cython.uint)
cpdef bint is_object(Node node, Status st) except -1

cdef class Counters:
    cdef public list depth_found, depth_negative, depth_whiteout

cdef class Superblock:
    cdef public object branches, options, notes
    cdef public Slot slot
    cdef public HandleTable handles
    cdef public InoMap inomap
    cdef public Counters counters
    cdef public dict plinks, plink_fds, held, _free
    cdef public set warned, changing, redirecting
    cdef public bytes redirect_key
    cdef public long long bad_redirects
    cdef public list trash
    cdef public bint kernel_opens
    cdef public long long in_doubt, version
    cdef public Dir root
    cdef public InodeTable table
    cdef public Changes changes
    @cython.locals(layer=Layer)
    cpdef int layer_fd(self, Dir node, Layer layer) except? -1
    @cython.locals(layer=Layer)
    cpdef int branch_fd(self, Dir node, branch) except? -1
    cpdef locate(self, Node node)
    @cython.locals(fd=int, st=Status)
    cpdef stat(self, Node node)
    cpdef int held_fd(self, Node node) except? -1
    @cython.locals(fd=int)
    cpdef tuple open_object(self, Node node)
