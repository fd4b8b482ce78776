cimport cython

from udbad.branch.cstat cimport Status, find_at
from udbad.inodes.cnames cimport Names as CNames
from udbad.inodes.inomap cimport InoMap
from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union cimport lookup
from udbad.union.superblock cimport Superblock

cdef class Run:
    cdef public CNames names, current
    cdef public dict children, numbering
    cdef public InoMap inomap
    cdef public Py_ssize_t first, after, index
    cdef unsigned char[512] likely  # creaddir.pyx
    cdef bint knows_likely
    cdef public unsigned long long base, limit, lowest, highest
    cpdef unsigned long long number(self, Py_ssize_t index, unsigned long long own) except? 0

@cython.locals(layer=Layer, fd=int, st=Status, kind=cython.uint)
cpdef _by_hit(Superblock sb, Dir parent, dict layers, bytes name, hit)
