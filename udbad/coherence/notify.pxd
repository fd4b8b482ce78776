from udbad.coherence.watches cimport Watches
from udbad.branch.cstat cimport lasting_stamp
from udbad.inodes.node cimport Dir, Node
from udbad.union.superblock cimport Superblock
