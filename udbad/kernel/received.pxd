# `node` is a number of Python: its negative is a handle where the kernel opens files by itself, and those of C without a
# sign have none.

cdef class Received:
    cdef public bytearray buffer
    cdef public Py_ssize_t size
    cdef public unsigned int length, opcode, uid, gid, pid
    cdef public unsigned long long unique
    cdef public object node
