# Memory layout of what there is one of for each inode that the kernel knows. Numbers are those of C: what does not fit
# is an OverflowError. A new attribute of one of these classes needs a line here (tests/test_layering.py).

cimport cython

from udbad.inodes.cnames cimport Names as CNames

cdef extern from "<stdbool.h>":
    ctypedef bint flag "bool"  # of one byte

cdef class Plink:
    cdef public object branch, source_dev, identity
    cdef public bytes name
    cdef public int dirfd
    cdef public unsigned long long source_ino
    cdef public long long pending, links
    cdef public bint counted

cdef class More:
    cdef public set aliases
    cdef public Plink plink
    cdef public object busy, seen
    cdef public int orphan_fd

# 112 bytes, which is what Python's allocator gives; a dev_t of the kernel has 32 bits.
cdef class Node:
    cdef public unsigned long long id, ino
    cdef public long long nlookup
    cdef public unsigned int dev, place
    cdef public int nlink_extra
    cdef public unsigned short kind
    cdef public flag dead
    cdef public object branch, sent, lacks
    cdef public Dir parent
    cdef public bytes name
    cdef public list handles
    cdef public More more

cdef class Layer:
    cdef public object branch
    cdef public unsigned long long dev, ino
    cdef public long long nlink
    cdef public int fd
    cdef public bytes below

cdef class Dir(Node):
    cdef public list layers, offline, times
    cdef public dict children
    cdef public CNames view
    cdef public dict stacked
    cdef public set negatives
    cdef public tuple listings, room
    cdef public object opaque
    cdef public long long floor, probes, load_at, version, resolved, sure, cached_opens, mtime_offset
    cdef public double ttl
    cdef public bint trusted, hot, listed, quiet, moved
    @cython.locals(position=Py_ssize_t, here=Py_ssize_t, layers=list, layer=Layer)
    cpdef Layer layer(self, Py_ssize_t index)
