from udbad.branch cimport whiteout
from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union cimport copydirs, lookup, resolve
from udbad.union.resolve cimport Found, Missing
from udbad.union.superblock cimport Superblock

cdef class Target:
    cdef public object branch
    cdef public int dirfd
    cdef public bint whited, alone

cpdef Target prepare(Superblock sb, Dir parent, bytes name, bint is_dir=*)
cpdef _choose(Superblock sb, Dir parent, Missing missing, bint is_dir)
cpdef _check_directory(Superblock sb, Dir parent)
cpdef Missing check_free(Superblock sb, Dir parent, bytes name)
cpdef _finish(Superblock sb, Dir parent, bytes name, Target target)
cpdef Node _appear(Superblock sb, Dir parent, bytes name, branch, st, bint sent=*)
cpdef _new_number(Superblock sb, st)
