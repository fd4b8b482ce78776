from udbad.inodes.inomap cimport InoMap
from udbad.inodes.node cimport Dir, Node
from udbad.inodes.table cimport InodeTable

cdef class Changes:
    cdef public object _sb, hooks, known_state, catch_up, listen, before_data, data
    cdef public InodeTable _table
    cdef public InoMap _inomap
    cdef public bint by_times
    cpdef made(self, Dir parent, bytes name, hit, branch=*)
    cpdef linked(self, Node node, Dir parent, bytes name, bint sent=*)
    cpdef removed(self, Dir parent, bytes name, Node node, branch=*, bint whited=*)
    cpdef replaced(self, Dir parent, bytes name, Node node)
    cpdef unlinked(self, Node node, bint last)
    cpdef _bury(self, Node node)
    cpdef moved(self, Node node, Dir src_dir, bytes src, Dir dst_dir, bytes dst, branch)
    cpdef updated(self, Dir parent, bytes name, st=*, bint links=*, bint moved=*)
    cpdef found(self, Node node, Dir parent, bytes name)
