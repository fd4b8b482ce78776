from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union.superblock cimport Superblock

cpdef int ensure_dir(Superblock sb, Dir node, branch) except -1
