cimport cython

from udbad.branch.cstat cimport Status, fstat, stat_at
from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union.resolve cimport Found, Missing
from udbad.union.superblock cimport Superblock

cdef class Job:
    cdef public Node node
    cdef public Dir parent
    cdef public object trigger, source, branch, st, length, parent_times, method, waited, prepare
    cdef public bytes name, tmp
    cdef public int dirfd, src_fd, dst_fd
    cdef public bint fsync, as_link, owns_dirfd
    cdef public long long copied, progress
