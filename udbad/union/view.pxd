from udbad.inodes.table cimport Dir, Layer
from udbad.union.superblock cimport Superblock
