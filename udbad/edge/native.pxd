cimport cython

from udbad.edge.loop cimport Loop
from udbad.edge.once cimport Once
from udbad.edge.operations cimport Operations
from udbad.edge.waiting cimport Request
from udbad.inodes.record cimport Record
from udbad.inodes.slot cimport Slot
from udbad.inodes.table cimport InodeTable
from udbad.kernel.boundary cimport OpStats
from udbad.kernel.cdevice cimport now, receive
from udbad.kernel.received cimport Received
from udbad.union.fs cimport UnionFs

cdef class _Waiter(Request):
    cdef public Native _native
    cdef public object _row, _rule, _node
    cdef public OpStats _stats
    cdef public tuple _arguments
    cdef public double _start
    cpdef object perform(self)
    cpdef resume(self)
    cpdef suspend(self)

cdef class Native:
    cdef public int _fd
    cdef public UnionFs fs
    cdef public object stale, waiting, look, _over, replayer, _poison, _forgotten
    cdef public Record record
    cdef public Once once
    cdef public Slot slot
    cdef public bint _refuses
    cdef public Operations operations
    cdef public Loop loop
    cdef public InodeTable _table
    cdef public Received _request
    cdef public dict _rows
    cdef public bint aborted
    @cython.locals(
        request=Received, slot=Slot, table=InodeTable, bound=tuple, arguments=tuple, stats=OpStats, once=Once, least=Py_ssize_t,
        start=double, number=int
    )
    cpdef bint take(self, double seconds=*)
    @cython.locals(record=Record)
    cpdef keep(self, rule, unsigned long long unique, int number, body)
    cpdef bint send(self, unsigned long long unique, int number, body) except -1
