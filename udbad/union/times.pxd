from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union.superblock cimport Superblock
