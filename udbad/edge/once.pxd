from udbad.edge.operations cimport Operations
from udbad.inodes.slot cimport Slot
from udbad.inodes.handles cimport HandleTable, OpenFile
from udbad.inodes.node cimport Dir, Node
from udbad.union.fs cimport UnionFs

cdef class Once:
    cdef public Operations _operations
    cdef public list _slots
    cdef public Slot own
    cdef public object result
    cpdef perform(self, rule, unsigned long long unique, operation, tuple arguments)
    cpdef resume(self, unsigned long long unique)
