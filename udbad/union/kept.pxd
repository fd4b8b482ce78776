from udbad.inodes.handles cimport OpenDir, OpenFile
from udbad.inodes.node cimport Node
from udbad.union.superblock cimport Superblock
