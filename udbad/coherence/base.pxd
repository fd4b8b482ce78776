from udbad.inodes.node cimport Dir, Node
from udbad.union.superblock cimport Superblock
