cimport cython

from udbad.inodes.node cimport Dir, Layer, Node
from udbad.union.superblock cimport Superblock

cdef class Place:
    cdef public Dir node
    cdef public long index
    cdef public unsigned long long dev, ino
    cdef public object watch

cdef class Watched:
    cdef public Dir node
    cdef public tuple places, ways
    @cython.locals(place=Place)
    cpdef Place place(self, long index)

cdef class Watches:
    cdef public object watcher, directories, state, _mode_of, _on_lost, _refused
    cdef public Superblock _sb
    cdef public dict _files
    cdef public set _without
    cdef public bint _on_ways
    cdef public double _limited_at
    cpdef expect(self, Dir node, Py_ssize_t index, bytes name, long event)
