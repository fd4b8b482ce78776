cimport cython

from udbad.inodes.cbyid cimport ById
from udbad.inodes.node cimport Dir, Layer, Node
from udbad.inodes.record cimport Record

cdef class InodeTable:
    cdef dict __dict__  # for what is replaced: on_drop and the like
    cdef public Dir root
    cdef public ById nodes
    cdef public object _files, _fd_dirs, unread, doubted
    cdef public Record record
    cdef public long long open_fds, _max_fds, _all_fds, _trim_below
    cpdef bint over_budget(self)
    @cython.locals(node=Node)
    cpdef Node find(self, unsigned long long node_id)
    cpdef Node node(self, unsigned long long node_id)
    cpdef Dir directory(self, unsigned long long node_id)
    @cython.locals(changed=set)
    cpdef add(self, Node node)
    @cython.locals(changed=set)
    cpdef refer(self, Node node)
    cpdef changed(self, one)
    cpdef attach(self, Node node, Dir parent, bytes name)
    cpdef detach(self, Node node, Dir parent, bytes name)
    cpdef note_fds(self, Dir node)
    @cython.locals(last=Node)
    cpdef _release(self, Node node)
    cpdef Node add_file(self, Node node, Dir parent, bytes name)
