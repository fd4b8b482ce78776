cdef class Loop:
    cdef public int _wake, _fd
    cdef public object _open, _calls, _server
    cdef public double _spin
