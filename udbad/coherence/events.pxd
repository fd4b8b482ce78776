from udbad.inodes.table cimport Dir, Node
from udbad.union.lookup cimport Found
from udbad.union.superblock cimport Superblock
