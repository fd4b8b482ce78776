cpdef unpin(int fd)
