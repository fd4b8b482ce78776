# The answers of wire.py that most requests get, as the structures of linux/fuse.h. Used where the hot modules are
# compiled.

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from udbad.branch.cstat cimport fill, stat_t
from udbad.inodes.node cimport Dir, Node
from udbad.union.creaddir cimport find_next, name_t
from udbad.union.readdir cimport Run

cdef struct fuse_attr:
    uint64_t ino, size, blocks, atime, mtime, ctime
    uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags

cdef struct fuse_attr_out:
    uint64_t attr_valid
    uint32_t attr_valid_nsec, dummy
    fuse_attr attr

cdef struct fuse_entry_out:
    uint64_t nodeid, generation, entry_valid, attr_valid
    uint32_t entry_valid_nsec, attr_valid_nsec
    fuse_attr attr

cdef struct fuse_dirent:
    uint64_t ino, off
    uint32_t namelen, type
    # the name, without a zero byte, and padding to 8 bytes

cdef struct fuse_setattr_in:
    uint32_t valid, padding
    uint64_t fh, size, lock_owner
    int64_t atime, mtime, ctime
    uint32_t atimensec, mtimensec, ctimensec, mode, unused4, uid, gid, unused5

cdef enum:
    MODE = 1, UID = 2, GID = 4, SIZE = 8, ATIME = 16, MTIME = 32, FH = 64, ATIME_NOW = 128, MTIME_NOW = 256  # FATTR_*
    BODY = 40  # of wire.py

cdef int64_t BILLION = 1_000_000_000


cdef int put_attributes(fuse_attr *attr, Node node, object st) except -1:
    cdef stat_t c
    cdef int64_t seconds, nanoseconds, links
    fill(&c, st)
    seconds, nanoseconds = c.st_mtim.tv_sec, c.st_mtim.tv_nsec
    if type(node) is Dir and (<Dir>node).mtime_offset:
        nanoseconds += (<Dir>node).mtime_offset
        seconds += nanoseconds // BILLION
        nanoseconds %= BILLION
    links = c.st_nlink
    if node.nlink_extra:  # wire.links
        links = max(links + node.nlink_extra, 0 if node.dead or not links else 1)
    attr.ino, attr.size, attr.blocks = node.id, c.st_size, c.st_blocks
    attr.atime, attr.mtime, attr.ctime = c.st_atim.tv_sec, seconds, c.st_ctim.tv_sec
    attr.atimensec, attr.mtimensec, attr.ctimensec = c.st_atim.tv_nsec, nanoseconds, c.st_ctim.tv_nsec
    attr.mode, attr.nlink, attr.uid, attr.gid = c.st_mode, links, c.st_uid, c.st_gid
    attr.rdev, attr.blksize, attr.flags = <uint32_t>c.st_rdev, c.st_blksize, 0
    return 0


cdef object time_in(int64_t seconds, uint32_t nanoseconds, bint meant, bint now):
    if not meant:
        return None
    if now:
        return "now"
    if -9_000_000_000 < seconds < 9_000_000_000:
        return seconds * BILLION + nanoseconds
    return <object>seconds * BILLION + nanoseconds  # may be more than there is room for


def setattr_in(bytearray buffer not None):
    """wire.setattr_in."""
    cdef fuse_setattr_in c
    if len(buffer) < <Py_ssize_t>(BODY + sizeof(c)):
        raise ValueError("short")
    memcpy(&c, PyByteArray_AS_STRING(buffer) + BODY, sizeof(c))
    return (
        c.mode if c.valid & MODE else None,
        c.uid if c.valid & UID else None,
        c.gid if c.valid & GID else None,
        c.size if c.valid & SIZE else None,
        time_in(c.atime, c.atimensec, c.valid & ATIME, c.valid & ATIME_NOW),
        time_in(c.mtime, c.mtimensec, c.valid & MTIME, c.valid & MTIME_NOW),
        c.fh if c.valid & FH else None,
    )


cpdef bytes attributes(Node node, object st, double timeout):
    """fuse_attr_out."""
    cdef bytes body = PyBytes_FromStringAndSize(NULL, sizeof(fuse_attr_out))
    cdef fuse_attr_out *out = <fuse_attr_out *>PyBytes_AS_STRING(body)
    out.attr_valid = <uint64_t>timeout
    out.attr_valid_nsec = <uint32_t>((timeout - <double>out.attr_valid) * BILLION)
    out.dummy = 0
    put_attributes(&out.attr, node, st)
    return body


cpdef bytes entry(Node node, object st, double entry_timeout, double attr_timeout):
    """fuse_entry_out."""
    cdef bytes body = PyBytes_FromStringAndSize(NULL, sizeof(fuse_entry_out))
    cdef fuse_entry_out *out = <fuse_entry_out *>PyBytes_AS_STRING(body)
    out.nodeid, out.generation = node.id, 0
    out.entry_valid = <uint64_t>entry_timeout
    out.entry_valid_nsec = <uint32_t>((entry_timeout - <double>out.entry_valid) * BILLION)
    out.attr_valid = <uint64_t>attr_timeout
    out.attr_valid_nsec = <uint32_t>((attr_timeout - <double>out.attr_valid) * BILLION)
    put_attributes(&out.attr, node, st)
    return body


cpdef bytes negative(double timeout):
    """fuse_entry_out of a name that does not exist."""
    cdef bytes body = PyBytes_FromStringAndSize(NULL, sizeof(fuse_entry_out))
    cdef fuse_entry_out *out = <fuse_entry_out *>PyBytes_AS_STRING(body)
    memset(out, 0, sizeof(fuse_entry_out))
    out.entry_valid = <uint64_t>timeout
    out.entry_valid_nsec = <uint32_t>((timeout - <double>out.entry_valid) * BILLION)
    return body


cdef Py_ssize_t put_dirent(
    char *start, Py_ssize_t room, uint64_t number, uint32_t kind, const char *name, Py_ssize_t size, uint64_t after
) noexcept:
    """The bytes that it takes; no more than `room` are written."""
    cdef Py_ssize_t padded = (size + 7) & ~7
    cdef fuse_dirent *out = <fuse_dirent *>start
    if <Py_ssize_t>sizeof(fuse_dirent) + padded <= room:
        out.ino, out.off, out.namelen, out.type = number, after, size, kind >> 12
        memcpy(start + sizeof(fuse_dirent), name, size)
        memset(start + sizeof(fuse_dirent) + size, 0, padded - size)
    return sizeof(fuse_dirent) + padded


cpdef bytes dirent(uint64_t number, uint32_t kind, bytes name, uint64_t after):
    """fuse_dirent. kind: S_IFMT bits. after: offset of the entry that follows."""
    cdef Py_ssize_t size = sizeof(fuse_dirent) + ((len(name) + 7) & ~7)
    cdef bytes body = PyBytes_FromStringAndSize(NULL, size)
    put_dirent(PyBytes_AS_STRING(body), size, number, kind, PyBytes_AS_STRING(name), len(name), after)
    return body


def dirents(object entries, Py_ssize_t room):
    """As many of them as there are bytes of room for."""
    cdef char *buffer = <char *>malloc(max(room, 1))
    cdef Py_ssize_t used = 0
    cdef Py_ssize_t taken
    cdef Run run
    cdef name_t next
    if not buffer:
        raise MemoryError
    try:
        for each in entries:
            if type(each) is Run:
                run = each
                while find_next(run, &next):
                    taken = put_dirent(
                        buffer + used, room - used, next.number, next.kind, next.text, next.size, run.after + run.first
                    )
                    if taken > room - used:
                        return PyBytes_FromStringAndSize(buffer, used)
                    used += taken
                    run.first += 1
                continue
            name, number, kind, after = each
            taken = put_dirent(
                buffer + used, room - used, number, kind, PyBytes_AS_STRING(<bytes?>name), len(name), after
            )
            if taken > room - used:
                break
            used += taken
        return PyBytes_FromStringAndSize(buffer, used)
    finally:
        free(buffer)
