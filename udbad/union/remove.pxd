from udbad.branch cimport whiteout
from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union cimport copydirs, lookup, resolve
from udbad.union.resolve cimport Found, Missing
from udbad.union.superblock cimport Superblock

cpdef _check(Superblock sb, Dir parent, bytes name)
cpdef Found find(Superblock sb, Dir parent, bytes name)
cpdef Found _find(Superblock sb, Dir parent, bytes name)
cpdef bint covered_below(Superblock sb, Dir parent, bytes name, branch) except -1
cpdef choose(Superblock sb, Dir parent, Found found)
cpdef unlinked_from(Superblock sb, Dir parent, bytes name, Node node, st, bint was_lower, branch, bint whited)
cpdef lost_link(Superblock sb, Node node, st, bint was_lower)
