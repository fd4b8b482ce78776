from udbad.inodes.table cimport Dir, Layer, Node
from udbad.union.lookup cimport Found, Missing
from udbad.union.superblock cimport Superblock
