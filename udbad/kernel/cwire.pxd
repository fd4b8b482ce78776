from libc.stdint cimport uint32_t, uint64_t

from udbad.inodes.node cimport Node

cpdef bytes attributes(Node node, object st, double timeout)
cpdef bytes entry(Node node, object st, double entry_timeout, double attr_timeout)
cpdef bytes negative(double timeout)
cpdef bytes dirent(uint64_t number, uint32_t kind, bytes name, uint64_t after)
