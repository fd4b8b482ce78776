# Memory layout of what there is one of for each inode that the kernel knows. Numbers are those of C: what does not fit
# is an OverflowError. A new attribute of one of these classes needs a line here (tests/test_layering.py).

cimport cython

from udbad.inodes.record cimport Record

cdef class Plink:
    cdef public object branch, source_dev, identity
    cdef public bytes name
    cdef public int dirfd
    cdef public unsigned long long source_ino
    cdef public long long pending, links
    cdef public bint counted

cdef class Node:
    cdef public unsigned long long id, dev, ino
    cdef public unsigned int kind
    cdef public int orphan_fd
    cdef public unsigned long long place
    cdef public long long nlookup, nlink_extra
    cdef public object branch, busy, seen, sent, lacks
    cdef public Dir parent
    cdef public bytes name
    cdef public set aliases
    cdef public list handles
    cdef public Plink plink
    cdef public bint dead

cdef class Layer:
    cdef public object branch
    cdef public unsigned long long dev, ino
    cdef public long long nlink
    cdef public int fd
    cdef public bytes below

cdef class Dir(Node):
    cdef public list layers, offline, times
    cdef public dict children, view
    cdef public dict stacked
    cdef public set negatives
    cdef public tuple listings, room
    cdef public object opaque
    cdef public long long floor, probes, load_at, version, resolved, sure, cached_opens, mtime_offset
    cdef public double ttl
    cdef public bint trusted, hot, listed, quiet, moved
    @cython.locals(position=Py_ssize_t, here=Py_ssize_t, layers=list, layer=Layer)
    cpdef Layer layer(self, Py_ssize_t index)

cdef class InodeTable:
    cdef dict __dict__  # for what is replaced: on_drop and the like
    cdef public Dir root
    cdef public dict nodes
    cdef public object _files, _fd_dirs, unread, doubted
    cdef public Record record
    cdef public long long open_fds, _max_fds, _all_fds, _trim_below
    cpdef bint over_budget(self)
    @cython.locals(node=Node)
    cpdef Node find(self, node_id)
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
