from udbad.inodes.table cimport Dir, InodeTable, Node

cdef class Changes:
    cdef public object _sb, hooks, known_state, catch_up, listen, before_data, data
    cdef public InodeTable _table
    cdef public bint by_times
