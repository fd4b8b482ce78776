from udbad.inodes.node cimport Dir, Layer
from udbad.union.superblock cimport Superblock
