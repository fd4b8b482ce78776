from udbad.coherence.watches cimport Watches
from udbad.inodes.table cimport Dir, Node
from udbad.union.superblock cimport Superblock
