from udbad.kernel.received cimport Received

cpdef double now()
cpdef bint receive(int fd, Received request, double seconds) except -1
cpdef bytes name_at(Received request, Py_ssize_t start)
