from udbad.inodes.table cimport Dir, Node
from udbad.union.superblock cimport Superblock
