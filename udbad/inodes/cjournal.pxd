# How entries lie in the record (record.py, journal.py), for who reads them there.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef packed struct node_entry:
    uint64_t size, count
    uint8_t kind, dead
    uint16_t name_size
    uint32_t type
    int32_t branch, orphan_fd
    uint64_t id, dev, ino, parent
    int64_t links
    # the name

cdef enum:
    HEAD = 16  # bytes before what an entry says
