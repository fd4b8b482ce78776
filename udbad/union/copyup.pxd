from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union.resolve cimport Found, Missing
from udbad.union.superblock cimport Superblock
