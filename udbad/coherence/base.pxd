cimport cython

from udbad.inodes.node cimport Dir, Node
from udbad.union.superblock cimport Superblock

@cython.locals(directory=Dir)
cpdef bint in_trusted(Node node) except -1
