# Entries of getdents64(2) and events of inotify(7), for who goes through a buffer of them.

from libc.stdint cimport uint32_t, uint64_t
from posix.fcntl cimport AT_SYMLINK_NOFOLLOW

from udbad.branch.cstat cimport fstatat_c, stat_t

cdef extern from "<dirent.h>" nogil:
    struct dirent64:
        uint64_t d_ino
        unsigned short d_reclen
        unsigned char d_type
        char *d_name
    Py_ssize_t getdents64(int fd, void *buffer, size_t size)
    enum: DT_UNKNOWN
    enum: DT_CHR
    enum: DT_DIR

cdef extern from "<sys/inotify.h>" nogil:
    struct inotify_event:
        int wd
        uint32_t mask, len
        char *name

cdef extern from "<sys/stat.h>" nogil:
    enum: S_IFMT


cdef inline bint is_dots(const char *name, Py_ssize_t length) noexcept nogil:
    """Whether that is `.` or `..`."""
    return name[0] == b"." and (length == 1 or (length == 2 and name[1] == b"."))


cdef inline unsigned char type_of(int fd, dirent64 *entry) noexcept nogil:
    """DT_* of an entry of the directory `fd`: stat(2) says it where the file system does not."""
    cdef stat_t status
    cdef unsigned char kind = entry.d_type & 15
    if kind == DT_UNKNOWN and not fstatat_c(fd, entry.d_name, &status, AT_SYMLINK_NOFOLLOW):
        kind = (status.st_mode & S_IFMT) >> 12
    return kind
