cimport cython

from udbad.inodes.inomap cimport InoMap
from udbad.inodes.node cimport Dir, Layer
from udbad.union.superblock cimport Superblock

cdef unsigned char _DIRECTORY, _REGULAR, _DOT

cdef class Said:
    cdef public unsigned long long[::1] numbers
    cdef public unsigned char[::1] types

# The loops over all names of a directory, of which there may be very many.
@cython.locals(
    at=Py_ssize_t, kept=Py_ssize_t, before=Py_ssize_t, kind=cython.uchar, whable=bint, hides=bint, name=bytes, prefix=bytes,
    said="unsigned long long[::1]", kinds="unsigned char[::1]"
)
cdef Py_ssize_t _merge(
    dict names, set whited, set stacked, list here, branch, list found, numbers, bytearray types
) except -1
@cython.locals(
    at=Py_ssize_t, each=Py_ssize_t, kept=Py_ssize_t, own=cython.ulonglong, base=cython.ulonglong, limit=cython.ulonglong,
    exceptions=set, lowest=cython.ulonglong, highest=cython.ulonglong, inomap=InoMap, numbers="unsigned long long[::1]", types=bytearray, said=Said,
    all_numbers="unsigned long long[::1]", all_types="unsigned char[::1]", kind=cython.uchar
)
cpdef Said said_of(Superblock sb, list parts)
