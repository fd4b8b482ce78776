cdef class Received:
    cdef public bytearray buffer
    cdef public Py_ssize_t size
    cdef public unsigned int length, opcode, uid, gid, pid
    cdef public unsigned long long unique, node
