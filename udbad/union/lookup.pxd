cimport cython

from udbad.branch.cstat cimport Status, find_at, fstat
from udbad.inodes.cnames cimport Names as CNames
from udbad.inodes.node cimport Dir, Layer, Node
from udbad.inodes.table cimport InodeTable
from udbad.union.resolve cimport Found, Missing, resolve
from udbad.union.superblock cimport Counters, Superblock

cdef unsigned int _S_IFMT, _S_IFDIR, _S_IFCHR, _S_IFLNK

cpdef only_on(Superblock sb, Dir parent, bytes name)
cpdef update(Superblock sb, Dir parent, bytes name, found)
# The way of most lookups: a name of a directory whose view is known.
@cython.locals(counters=Counters, view=CNames, layer=Layer, fd=int, st=Status)
cpdef lookup(Superblock sb, Dir parent, bytes name)
cpdef _ask(Superblock sb, Dir parent, bytes name)
cpdef remember(Dir parent, bytes name, found)
cpdef intern(Superblock sb, Dir parent, bytes name, Found found)
@cython.locals(
    kind=cython.uint, dev=cython.ulonglong, ino=cython.ulonglong, number=cython.ulonglong, known=Node, node=Node, table=InodeTable,
    plinked=bint
)
cpdef intern_file(Superblock sb, Dir parent, bytes name, branch, Status st)
