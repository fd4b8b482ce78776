from udbad.branch.cstat cimport mode_at

cdef unsigned int _S_IFMT, _S_IFCHR, _S_IFREG

cpdef bint present(int dirfd, bytes name) except -1
cpdef bint opaque(int dirfd, bint overlay=*) except -1
cpdef check_new_name(bytes name)
cpdef check_not_reserved(bytes name)
