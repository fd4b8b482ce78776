from udbad.kernel.received cimport Received

cpdef double now()
cpdef bint receive(int fd, Received request, double seconds) except -1
cpdef bytes name_at(Received request, Py_ssize_t start)
cpdef tuple names_at(Received request, Py_ssize_t start)
cpdef unsigned int word_at(Received request, Py_ssize_t start) except? 0
cpdef tuple caller_of(Received request, unsigned int umask)
