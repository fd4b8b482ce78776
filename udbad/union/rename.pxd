from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union cimport lookup, remove, resolve
from udbad.union.resolve cimport Found, Missing
from udbad.union.superblock cimport Superblock

cpdef _moved(Superblock sb, Node node, Dir src_dir, bytes src, Dir dst_dir, bytes dst, branch, int dst_fd)
