from udbad.branch cimport whiteout
from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union cimport copydirs, lookup, remove, resolve
from udbad.union.resolve cimport Found, Missing
from udbad.union.superblock cimport Superblock

cpdef _check_types(Superblock sb, Node src, Node dst)
cpdef _target(Superblock sb, Dir parent, bytes name, Found found, Node node, long limit)
cpdef _move(
    Superblock sb, Dir src_dir, bytes src, Node src_node, Dir dst_dir, bytes dst, Node dst_node, found, branch, bint bare,
    bint replace
)
cpdef _moved(Superblock sb, Node node, Dir src_dir, bytes src, Dir dst_dir, bytes dst, branch, int dst_fd)
