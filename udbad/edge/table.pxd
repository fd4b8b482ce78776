from udbad.edge.operations cimport Operations
from udbad.inodes.node cimport Node
from udbad.kernel.cdevice cimport caller_of, name_at, names_at, word_at
from udbad.kernel.cwire cimport attributes, dirent, entry, negative
from udbad.kernel.received cimport Received

cpdef bytes _last_name(Received request, Py_ssize_t start)
cpdef tuple _two_names(Received request, Py_ssize_t start)
cpdef bytes _entry(tuple result)
