cimport cython

from udbad.coherence.sent cimport SentAttributes
from udbad.coherence.watches cimport Place, Watches
from udbad.inodes.node cimport Dir, Layer, Node
from udbad.inodes.table cimport InodeTable
from udbad.union.resolve cimport Found
from udbad.union.superblock cimport Superblock

cpdef classify(Superblock sb, Dir node, bytes name, long kinds)
@cython.locals(layer=Layer)
cpdef _same_file(Dir node, bytes name, Node child)
