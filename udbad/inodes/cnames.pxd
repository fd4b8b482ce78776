# Names of a directory as a structure of C: names.py says what it means.

from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef struct entry_t:
    uint64_t number
    uint32_t at  # where the name begins in `text`
    uint16_t hit  # a place in HITS
    uint16_t rest  # bytes of the name << 4 | type; no bytes: the name is gone

cdef struct block_t:
    Py_ssize_t users  # copies that nobody has changed have one
    Py_ssize_t count, room, gone  # entries
    size_t used, space  # bytes of text
    size_t slots  # a power of two, 0 for few entries
    entry_t *entries
    char *text
    uint32_t *index  # of each slot: its entry's place
    unsigned char *tags  # of each slot: 0 for none, else some bits of the hash, so that few names have to be compared

cdef class Names:
    cdef block_t *block
    cdef int renew(self) except -1
    cdef int own(self) except -1
    cdef int settle(self) except -1
    cdef entry_t *look(self, const char *name, Py_ssize_t size) noexcept nogil
    cdef entry_t *lay(self, const char *name, Py_ssize_t size) except NULL
    cdef entry_t *append(self, const char *name, Py_ssize_t size, size_t slot) except NULL
    cdef int merge(self, const char *name, Py_ssize_t size, uint64_t number, unsigned int kind, object index,
                   uint16_t as_file, uint16_t as_directory, set hidden, set stacked) except -1
    cdef int index_anew(self, set stacked) except -1
    cpdef get(self, bytes name, missing=*)

cdef uint16_t uppermost(uint16_t hit) noexcept nogil
