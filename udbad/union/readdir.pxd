from udbad.inodes.table cimport Dir, Layer, Node
from udbad.union.superblock cimport Superblock
