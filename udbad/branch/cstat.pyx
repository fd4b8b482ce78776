# The calls of syscalls.py that most requests make, as those of the C library: no arguments to be taken apart, and no
# object for each number of a status. Used where the hot modules are compiled. The interpreter's lock is released while
# a branch is asked, for that may wait for a disk or a server.

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport ENAMETOOLONG, ENOENT, errno
from libc.stdint cimport uint64_t
from libc.string cimport memcmp, strlen
from posix.fcntl cimport AT_SYMLINK_NOFOLLOW
from posix.stat cimport S_IFDIR, S_IFMT
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from udbad.types import Perm

cdef object _RR = Perm.RR
cdef long long COARSE_NS = 50_000_000, WHOLE_NS = 2_100_000_000  # _COARSE_NS and _WHOLE_NS of state.py


@cython.freelist(64)
@cython.final
cdef class Status:
    """In the place of an os.stat_result: the attributes of that which somebody asks for, with the same values."""

    @property
    def st_nlink(self):
        return self.c.st_nlink

    @property
    def st_uid(self):
        return self.c.st_uid

    @property
    def st_gid(self):
        return self.c.st_gid

    @property
    def st_rdev(self):
        return self.c.st_rdev

    @property
    def st_size(self):
        return self.c.st_size

    @property
    def st_blksize(self):
        return self.c.st_blksize

    @property
    def st_blocks(self):
        return self.c.st_blocks

    @property
    def st_atime_ns(self):
        return nanoseconds(&self.c.st_atim)

    @property
    def st_mtime_ns(self):
        return nanoseconds(&self.c.st_mtim)

    @property
    def st_ctime_ns(self):
        return nanoseconds(&self.c.st_ctim)

    @property
    def st_atime(self):
        return self.c.st_atim.tv_sec + self.c.st_atim.tv_nsec * 1e-9

    @property
    def st_mtime(self):
        return self.c.st_mtim.tv_sec + self.c.st_mtim.tv_nsec * 1e-9

    @property
    def st_ctime(self):
        return self.c.st_ctim.tv_sec + self.c.st_ctim.tv_nsec * 1e-9

    def __getitem__(self, int index):
        """The times in whole seconds, of a stat_result as a tuple."""
        if index == 7:
            return self.c.st_atim.tv_sec
        if index == 8:
            return self.c.st_mtim.tv_sec
        if index == 9:
            return self.c.st_ctim.tv_sec
        raise IndexError(index)

    def __repr__(self):
        return f"<Status {self.c.st_dev}:{self.c.st_ino} mode={self.c.st_mode:o} size={self.c.st_size}>"


cdef object nanoseconds(timespec *time):
    # The seconds of a file may be any 64-bit number, and so more than nanoseconds of 64 bits: then by Python's numbers.
    if -9_000_000_000 < time.tv_sec < 9_000_000_000:
        return <long long>time.tv_sec * 1_000_000_000 + time.tv_nsec
    return <object>time.tv_sec * 1_000_000_000 + time.tv_nsec


cdef inline Status identified(Status status):
    status.st_dev, status.st_ino, status.st_mode = status.c.st_dev, status.c.st_ino, status.c.st_mode
    return status


cdef int status_at(int dirfd, bytes name, stat_t *status) except -1:
    """1 when nothing has the name: to make an error and to look at it takes several times as long as the call."""
    if name is None:
        raise TypeError("a name is bytes")
    cdef const char *text = PyBytes_AS_STRING(name)
    cdef int failed
    if strlen(text) != <size_t>len(name):
        raise ValueError("embedded null byte")
    with nogil:
        failed = fstatat_c(dirfd, text, status, AT_SYMLINK_NOFOLLOW)
    if not failed:
        return 0
    if errno == ENOENT or errno == ENAMETOOLONG:
        return 1
    PyErr_SetFromErrno(OSError)


cpdef Status stat_at(int dirfd, bytes name):
    """fstatat(2) without following. Raises OSError, ValueError for a name with a zero byte."""
    cdef Status status = Status.__new__(Status)
    if status_at(dirfd, name, &status.c):
        PyErr_SetFromErrno(OSError)
    return identified(status)


cpdef Status find_at(int dirfd, bytes name):
    """syscalls.find_at."""
    cdef Status status = Status.__new__(Status)
    return None if status_at(dirfd, name, &status.c) else identified(status)


cpdef unsigned int mode_at(int dirfd, bytes name) except? 1:
    """syscalls.mode_at."""
    cdef stat_t status
    return 0 if status_at(dirfd, name, &status) else status.st_mode


cpdef Status fstat(int fd):
    """fstat(2). Raises OSError."""
    cdef Status status = Status.__new__(Status)
    cdef int failed
    with nogil:
        failed = fstat_c(fd, &status.c)
    if failed:
        PyErr_SetFromErrno(OSError)
    return identified(status)


@cython.final
cdef class Stamp:
    """state.Stamp in 48 bytes; as bytes, it would take 80."""

    def __eq__(self, other):
        return type(other) is Stamp and not memcmp(self.words, (<Stamp>other).words, sizeof(self.words))

    def __hash__(self):
        return hash(bytes(self))

    def __bytes__(self):
        return PyBytes_FromStringAndSize(<char *>self.words, sizeof(self.words))


cdef Stamp stamp_of(const stat_t *c):
    cdef Stamp made = Stamp.__new__(Stamp)
    made.words[CTIME] = <uint64_t>c.st_ctim.tv_sec * 1_000_000_000 + c.st_ctim.tv_nsec
    made.words[MTIME] = <uint64_t>c.st_mtim.tv_sec * 1_000_000_000 + c.st_mtim.tv_nsec
    made.words[SIZE], made.words[LINKS] = c.st_size, c.st_nlink
    return made


def same_content(Stamp one not None, Stamp other not None):
    """state.same_content."""
    return one.words[MTIME] == other.words[MTIME] and one.words[SIZE] == other.words[SIZE]


cpdef bint has_one_name(Stamp one) except -1:
    """state.has_one_name."""
    if one is None:
        raise TypeError("a stamp is none")
    return one.words[LINKS] <= 1


cdef bint is_within(const timespec *time, long long nanoseconds) noexcept nogil:
    """Whether that is how long ago a time was at most, by the clock of now; one that is still to come, too."""
    cdef timespec now
    clock_gettime(CLOCK_REALTIME, &now)
    cdef long long seconds = now.tv_sec - time.tv_sec
    if not -10 < seconds < 10:  # a sum of nanoseconds may be more than there is room for
        return seconds < 0
    return seconds * 1_000_000_000 + now.tv_nsec - time.tv_nsec <= nanoseconds


cpdef object stamp(object st):
    """state.stamp."""
    cdef stat_t other
    if type(st) is Status:
        return stamp_of(&(<Status>st).c)
    fill(&other, st)
    return stamp_of(&other)


cpdef object lasting_stamp(object branch, object st):
    """state.lasting_stamp."""
    cdef stat_t other
    cdef stat_t *c = &other
    if type(st) is Status:
        c = &(<Status>st).c
    else:
        fill(c, st)
    if c.st_ctim.tv_nsec:
        if is_within(&c.st_ctim, COARSE_NS):
            exact = branch.exact_directory_times if (c.st_mode & S_IFMT) == S_IFDIR else branch.exact_times
            if not exact:
                return None
    elif is_within(&c.st_ctim, WHOLE_NS) and branch.perm is not _RR:
        return None
    return stamp_of(c)


cdef int fill(stat_t *c, object st) except -1:
    """The structure for any status, one of os.stat() too."""
    if type(st) is Status:
        c[0] = (<Status>st).c
        return 0
    c.st_dev, c.st_ino, c.st_nlink, c.st_rdev = st.st_dev, st.st_ino, st.st_nlink, st.st_rdev
    c.st_mode, c.st_uid, c.st_gid = st.st_mode, st.st_uid, st.st_gid
    c.st_size, c.st_blocks, c.st_blksize = st.st_size, st.st_blocks, st.st_blksize
    c.st_atim.tv_sec, c.st_atim.tv_nsec = divmod(st.st_atime_ns, 1_000_000_000)
    c.st_mtim.tv_sec, c.st_mtim.tv_nsec = divmod(st.st_mtime_ns, 1_000_000_000)
    c.st_ctim.tv_sec, c.st_ctim.tv_nsec = divmod(st.st_ctime_ns, 1_000_000_000)
    return 0
