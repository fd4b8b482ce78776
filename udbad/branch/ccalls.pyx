# The calls of syscalls.py that most changes make, as those of the C library: no keyword arguments and no path objects
# to be taken apart, and no way through /proc to what a descriptor names already. Used where the hot modules are
# compiled. The interpreter's lock is released while a branch is asked, for that may wait for a disk or a server.

import os

from udbad.branch.cstat cimport Status
from udbad.branch.cstat cimport fstat as fstat_of
from udbad.errors import enoent

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_SetFromErrno
from cpython.unicode cimport PyUnicode_AsUTF8
from libc.errno cimport EAGAIN, EBADF, EINVAL, ENODATA, ENOENT, ENOSYS, EOPNOTSUPP, EPERM, ERANGE, errno
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport strerror, strlen
from posix.stat cimport S_IFMT, S_IFREG
from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec
from posix.unistd cimport read

cdef extern from "<fcntl.h>" nogil:
    int openat_c "openat"(int dirfd, const char *path, int flags, unsigned int mode)
    int sync_file_range(int fd, long long offset, long long count, unsigned int flags)
    int SYNC_FILE_RANGE_WAIT_BEFORE, SYNC_FILE_RANGE_WRITE, SYNC_FILE_RANGE_WAIT_AFTER
    int AT_EMPTY_PATH, AT_FDCWD, AT_REMOVEDIR, AT_SYMLINK_FOLLOW
    int O_CLOEXEC, O_CREAT, O_DIRECTORY, O_EXCL, O_NOCTTY, O_NOFOLLOW, O_NONBLOCK, O_PATH, O_RDWR, O_TMPFILE

cdef extern from "<sched.h>" nogil:
    int sched_yield()
    int SCHED_OTHER

cdef extern from "<stdio.h>" nogil:
    int renameat2_c "renameat2"(int src_dirfd, const char *src, int dst_dirfd, const char *dst, unsigned int flags)

cdef extern from "<sys/stat.h>" nogil:
    int chmod_c "chmod"(const char *path, unsigned int mode)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    Py_ssize_t copy_file_range_c "copy_file_range"(
        int src_fd, long long *src_at, int dst_fd, long long *dst_at, size_t count, unsigned int flags
    )
    Py_ssize_t pread(int fd, void *data, size_t count, long long offset)
    Py_ssize_t pwrite(int fd, const void *data, size_t count, long long offset)
    int linkat_c "linkat"(int src_dirfd, const char *src, int dst_dirfd, const char *dst, int flags)
    int unlinkat_c "unlinkat"(int dirfd, const char *path, int flags)
    int fchownat_c "fchownat"(int dirfd, const char *path, unsigned int uid, unsigned int gid, int flags)
    long syscall(long number, int fd, const char *path, unsigned int mode, int flags)
    long sched_getattr_c "syscall"(long number, int pid, void *attributes, unsigned int size, unsigned int flags)
    long sysconf(int name)
    int _SC_PAGESIZE


cdef extern from "<sys/stat.h>" nogil:
    int utimensat_c "utimensat"(int dirfd, const char *path, const timespec *times, int flags)
    int mkdirat_c "mkdirat"(int dirfd, const char *path, unsigned int mode)
    int AT_SYMLINK_NOFOLLOW
    long UTIME_NOW, UTIME_OMIT

cdef extern from "<sys/xattr.h>" nogil:
    Py_ssize_t flistxattr(int fd, char *names, size_t room)
    Py_ssize_t listxattr_c "listxattr"(const char *path, char *names, size_t room)
    Py_ssize_t getxattr_c "getxattr"(const char *path, const char *name, void *value, size_t room)
    Py_ssize_t fgetxattr(int fd, const char *name, void *value, size_t room)


cdef extern from "<sys/fsuid.h>" nogil:
    int setfsuid_c "setfsuid"(unsigned int uid)
    int setfsgid_c "setfsgid"(unsigned int gid)


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    Py_ssize_t preadv2(int fd, const iovec *vectors, int count, long long offset, int flags)
    int RWF_NOWAIT

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_sched_getattr

cdef extern from "<sys/vfs.h>" nogil:
    struct statfs_c "statfs":
        long f_type
    int fstatfs(int fd, statfs_c *found)

cdef extern from "<sys/stat.h>" nogil:
    struct stat_c "stat":
        long long st_size
        unsigned long long st_nlink
    int fstat_c "fstat"(int fd, stat_c *found)

cdef extern from "<unistd.h>" nogil:
    long cachestat_c "syscall"(long number, int fd, const uint64_t *span, uint64_t *found, int flags)


cdef enum:
    # One number on every architecture (linux/unistd.h, generic table).
    SYS_CACHESTAT = 451  # since Linux 6.5
    SYS_FCHMODAT2 = 452  # since Linux 6.6


# Of read_cached, as in syscalls.py.
cdef unsigned long[2] MEMORY = [0x01021994, 0x858458F6]
cdef unsigned long[7] IMAGES = [0x73717368, 0xE0F5E1E2, 0x9660, 0x28CD3D45, 0x7275, 0x4D44, 0x2011BAB0]
cdef long long FEW = 128 << 10
cdef long long PAGE = sysconf(_SC_PAGESIZE)


cdef const char *text_of(bytes name) except NULL:
    if name is None:
        raise TypeError("a name is bytes")
    cdef const char *text = PyBytes_AS_STRING(name)
    if strlen(text) != <size_t>len(name):
        raise ValueError("embedded null byte")
    return text


cdef int check(int result) except -1:
    if result < 0:
        PyErr_SetFromErrno(OSError)
    return result


cdef int opened(int dirfd, bytes name, int flags, unsigned int mode) except -1:
    cdef const char *text = text_of(name)
    cdef int fd
    with nogil:
        fd = openat_c(dirfd, text, flags, mode)
    return check(fd)


def create_file_at(int dirfd, bytes name, int flags, unsigned int mode):
    """open(2) with O_CREAT|O_EXCL; `mode` is subject to the process umask."""
    return opened(dirfd, name, flags | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode)


def open_tmpfile(int dirfd, unsigned int mode, int flags=O_RDWR):
    cdef stat_c parent
    cdef int fd
    cdef bint removed = False
    with nogil:
        fd = openat_c(dirfd, b".", O_TMPFILE | flags | O_CLOEXEC, mode)
        if fd < 0 and errno == EPERM:
            removed = not fstat_c(dirfd, &parent) and not parent.st_nlink
    if removed:
        raise enoent()
    return check(fd)


def open_at(int dirfd, bytes name, int flags):
    """openat(2) of something that exists."""
    return opened(dirfd, name, flags, 0)


def open_regular(int dirfd, bytes name, int flags):
    cdef const char *text = text_of(name)
    cdef Status status
    cdef int fd
    with nogil:
        fd = openat_c(dirfd, text, flags | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0)
    if fd < 0:
        return None
    try:
        status = fstat_of(fd)
    except OSError:
        close(fd)
        return None
    if (status.st_mode & S_IFMT) != S_IFREG:
        close(fd)
        return None
    return fd, status


def pin_at(int dirfd, bytes name):
    """An O_PATH descriptor of the object itself, also of a symlink, device or FIFO."""
    return opened(dirfd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC, 0)


cpdef unpin(int fd):
    """Close a descriptor of `pin_at`: without giving the interpreter's lock away, as nothing waits for it."""
    check(close(fd))


def close_quietly(int fd):
    cdef int failed
    with nogil:
        failed = close(fd)
    if failed and errno == EBADF:
        check(failed)


def link_fd(int fd, int dirfd, bytes name):
    """Give the file behind `fd` (an O_TMPFILE one too) a name: linkat(2)."""
    cdef const char *text = text_of(name)
    cdef char path[32]
    cdef int failed
    with nogil:
        failed = linkat_c(fd, b"", dirfd, text, AT_EMPTY_PATH)
        if failed and errno == ENOENT:  # an ordinary user
            snprintf(path, sizeof(path), b"/proc/self/fd/%d", fd)
            failed = linkat_c(AT_FDCWD, path, dirfd, text, AT_SYMLINK_FOLLOW)
    check(failed)


def unlink_at(int dirfd, bytes name):
    cdef const char *text = text_of(name)
    cdef int failed
    with nogil:
        failed = unlinkat_c(dirfd, text, 0)
    check(failed)


def rename_at(int src_dirfd, bytes src, int dst_dirfd, bytes dst, unsigned int flags=0):
    """renameat2(2)."""
    cdef const char *old = text_of(src)
    cdef const char *new = text_of(dst)
    cdef int failed
    with nogil:
        failed = renameat2_c(src_dirfd, old, dst_dirfd, new, flags)
    check(failed)


def chown_fd(int fd, long long uid, long long gid):
    """chown through any descriptor, an O_PATH one of a symlink too; -1 keeps an id."""
    cdef int failed
    with nogil:
        failed = fchownat_c(fd, b"", <unsigned int>uid, <unsigned int>gid, AT_EMPTY_PATH)
    check(failed)


def chmod_fd(int fd, unsigned int mode):
    """chmod through any descriptor; EOPNOTSUPP for a symlink."""
    cdef int failed
    with nogil:
        failed = change_mode(fd, mode)
    check(failed)


cdef timespec time_of(nanoseconds):
    cdef timespec time
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    time.tv_sec, time.tv_nsec = seconds, rest
    return time


def utime_at(int dirfd, bytes name, atime_ns, mtime_ns):
    cdef const char *text = text_of(name)
    cdef timespec times[2]
    cdef int failed
    times[0], times[1] = time_of(atime_ns), time_of(mtime_ns)
    with nogil:
        failed = utimensat_c(dirfd, text, times, AT_SYMLINK_NOFOLLOW)
    check(failed)


cdef timespec wanted(time):
    cdef timespec each
    if time is None or type(time) is str:  # "now"
        each.tv_sec, each.tv_nsec = 0, UTIME_OMIT if time is None else UTIME_NOW
        return each
    return time_of(time)


def utime_fd(int fd, atime_ns, mtime_ns):
    """utimensat(2) through any descriptor. None leaves a time as it is, "now" is the file system's own idea of it."""
    cdef char path[32]
    cdef timespec times[2]
    cdef int failed
    times[0], times[1] = wanted(atime_ns), wanted(mtime_ns)
    with nogil:
        failed = utimensat_c(fd, b"", times, AT_EMPTY_PATH)
        if failed and errno == EINVAL:  # before Linux 5.8
            snprintf(path, sizeof(path), b"/proc/self/fd/%d", fd)
            failed = utimensat_c(AT_FDCWD, path, times, 0)
    check(failed)


def mkdir_at(int dirfd, bytes name, unsigned int mode):
    cdef const char *text = text_of(name)
    cdef int failed
    with nogil:
        failed = mkdirat_c(dirfd, text, mode)
    check(failed)


def rmdir_at(int dirfd, bytes name):
    cdef const char *text = text_of(name)
    cdef int failed
    with nogil:
        failed = unlinkat_c(dirfd, text, AT_REMOVEDIR)
    check(failed)


def open_dir_at(int dirfd, bytes name):
    """A search-only (O_PATH) descriptor of a directory; ENOTDIR for anything else."""
    return opened(dirfd, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0)


def set_fs_ids(unsigned int uid, unsigned int gid):
    """setfsuid(2) and setfsgid(2) for the calling thread; they report no error."""
    setfsgid_c(gid)
    setfsuid_c(uid)


cdef int target_of(target, const char **path) except? -1:
    """The descriptor that is meant by an Object of syscalls.py; -1 where it is `path`, which is NULL else."""
    path[0] = text_of(target) if type(target) is bytes else NULL
    return -1 if path[0] != NULL else target


def getxattr(target, bytes key):
    cdef char value[256]
    cdef const char *name = text_of(key)
    cdef const char *path
    cdef Py_ssize_t count
    cdef int fd = target_of(target, &path)
    with nogil:
        if path == NULL:
            count = fgetxattr(fd, name, value, sizeof(value))
        else:
            count = getxattr_c(path, name, value, sizeof(value))
    if count >= 0:
        return PyBytes_FromStringAndSize(value, count)
    if errno == ENODATA:
        return None
    if errno == ERANGE:
        return os.getxattr(target, key)  # however long it is
    PyErr_SetFromErrno(OSError)


def lists_nothing(target):
    cdef const char *path
    cdef Py_ssize_t count
    cdef int fd = target_of(target, &path)
    with nogil:
        count = flistxattr(fd, NULL, 0) if path == NULL else listxattr_c(path, NULL, 0)
    if count < 0:
        PyErr_SetFromErrno(OSError)
    return count == 0


cdef bint lacks(int fd, const char *name) noexcept nogil:
    """Whether a file has not this extended attribute, or cannot have it."""
    return fgetxattr(fd, name, NULL, 0) < 0 and (errno == ENODATA or errno == EOPNOTSUPP)


def is_bare(int fd, more):
    cdef const char *name
    cdef bint bare
    with nogil:
        bare = flistxattr(fd, NULL, 0) == 0
    for key in more:
        if not bare:
            break
        name = PyUnicode_AsUTF8(key)
        with nogil:
            bare = lacks(fd, name)
    return bare


cdef bint may_have(int fd, const char *acl) noexcept nogil:
    """Whether a file may have extended attributes, or this one, which not every file system lists. NULL: this one does."""
    return flistxattr(fd, NULL, 0) != 0 or (acl != NULL and not lacks(fd, acl))


cdef int change_mode(int fd, unsigned int mode) noexcept nogil:
    cdef char path[32]
    cdef int failed = <int>syscall(SYS_FCHMODAT2, fd, b"", mode, AT_EMPTY_PATH)
    if failed and (errno == ENOSYS or errno == EPERM):  # before Linux 6.6; a filter that does not know the call
        snprintf(path, sizeof(path), b"/proc/self/fd/%d", fd)
        failed = chmod_c(path, mode)
    return failed


def copy_small(
    int src_fd, int dst_fd, size_t size, acl, unsigned int uid, unsigned int gid, unsigned int mode, atime_ns, mtime_ns
):
    cdef const char *name = NULL if acl is None else PyUnicode_AsUTF8(acl)
    cdef char data[4096]  # SMALL_COPY
    cdef int how = 1
    cdef long long src_at = 0, dst_at = 0
    cdef timespec times[2]
    if size > sizeof(data):
        return 0
    times[0], times[1] = time_of(atime_ns), time_of(mtime_ns)
    with nogil:
        if may_have(src_fd, name) or may_have(dst_fd, name):
            how = 0
        elif size and copy_file_range_c(src_fd, &src_at, dst_fd, &dst_at, size, 0) != <Py_ssize_t>size:
            how = 2
            if pread(src_fd, data, size, 0) != <Py_ssize_t>size or pwrite(dst_fd, data, size, 0) != <Py_ssize_t>size:
                how = 0
        if how and (
            fchownat_c(dst_fd, b"", uid, gid, AT_EMPTY_PATH)
            or change_mode(dst_fd, mode)
            or utimensat_c(dst_fd, b"", times, AT_EMPTY_PATH)
        ):
            how = 0
    return how


cdef struct sched_attr_c:
    uint32_t size, policy
    uint64_t flags
    int32_t nice
    uint32_t priority
    uint64_t runtime, deadline, period

cdef uint64_t SHORT = 1000000  # nanoseconds of a turn, of which the rest may be given away again and again
cdef long MOST = 200000  # nanoseconds on a processor after which others may have it
cdef size_t PORTION = 256 << 10  # bytes that take about half of that, from memory to memory
cdef size_t LEAST = 64 << 10


cdef bint has_short_turns() noexcept nogil:
    """Whether this thread has asked for them (kernel/scheduling.py)."""
    cdef sched_attr_c had
    return (
        sched_getattr_c(SYS_sched_getattr, 0, &had, sizeof(had), 0) == 0
        and had.policy == SCHED_OTHER
        and 0 < had.runtime <= SHORT
    )


cdef long worked() noexcept nogil:
    """Nanoseconds that this thread has had a processor, but for whole seconds."""
    cdef timespec time
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)
    return time.tv_nsec


def copy_in_turns(int src_fd, int dst_fd, size_t count, long long src_at, long long dst_at):
    # In portions, after each of which whoever waits for this processor has his turn: else he has it at the next tick.
    # How large they are is told by the time they take here: a server that copies by itself takes none of it.
    cdef size_t done = 0, portion = PORTION
    cdef Py_ssize_t copied = 0
    cdef long took
    cdef bint gives_way
    with nogil:
        gives_way = count > PORTION and has_short_turns()
        if not gives_way:
            portion = count
        while True:
            took = worked() if gives_way else 0
            copied = copy_file_range_c(src_fd, &src_at, dst_fd, &dst_at, min(portion, count - done), 0)
            if copied <= 0:
                break
            done += copied
            if done >= count or not gives_way:
                break
            took = worked() - took
            if took > MOST:
                portion = max(portion // 2, LEAST)
            elif 0 <= took < MOST // 2:
                portion *= 2
            sched_yield()
    if copied < 0 and not done:
        PyErr_SetFromErrno(OSError)
    return done


def start_writing(int fd, long long offset, long long count):
    with nogil:
        sync_file_range(fd, offset, count, SYNC_FILE_RANGE_WRITE)


def write_out(int fd):
    cdef int failed
    with nogil:
        failed = sync_file_range(
            fd, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER
        )
    check(failed)


cdef bint is_among(unsigned long type, const unsigned long *types, int count) noexcept nogil:
    cdef int each
    for each in range(count):
        if types[each] == type:
            return True
    return False


cdef bint is_in_memory(int fd, long long size, long long offset) noexcept nogil:
    """Whether a read will not wait, on a file system that does not know RWF_NOWAIT."""
    cdef statfs_c fs
    cdef stat_c file
    cdef uint64_t[2] span
    cdef uint64_t[5] cached
    cdef long long end
    if fstatfs(fd, &fs) < 0:
        return False
    if is_among(fs.f_type, MEMORY, 2):
        return True
    if size > FEW or not is_among(fs.f_type, IMAGES, 7):
        return False
    if fstat_c(fd, &file) < 0:
        return False
    end = min(offset + size, file.st_size)
    if end <= offset:
        return False
    span[0], span[1] = offset, end - offset
    if cachestat_c(SYS_CACHESTAT, fd, span, cached, 0) < 0:
        return False
    return cached[0] >= <uint64_t>((end - 1) // PAGE - offset // PAGE + 1)


def read_ready(int fd, Py_ssize_t most):
    cdef bytes data = PyBytes_FromStringAndSize(NULL, most)
    cdef Py_ssize_t count = read(fd, PyBytes_AS_STRING(data), most)
    if count < 0 and errno != EAGAIN:
        PyErr_SetFromErrno(OSError)
    return PyBytes_FromStringAndSize(PyBytes_AS_STRING(data), count) if count > 0 else b""


def read_cached(int fd, Py_ssize_t size, long long offset):
    data = PyBytes_FromStringAndSize(NULL, size)
    cdef char *start = PyBytes_AS_STRING(data)
    cdef iovec vector
    cdef Py_ssize_t count
    cdef stat_c file
    cdef int failed
    cdef bint asked = True
    vector.iov_base, vector.iov_len = start, size
    with nogil:
        count = preadv2(fd, &vector, 1, offset, RWF_NOWAIT)
        failed = errno if count < 0 else 0
        if failed == EOPNOTSUPP:
            if is_in_memory(fd, size, offset):
                count = preadv2(fd, &vector, 1, offset, 0)
                failed = errno if count < 0 else 0
            else:
                failed, asked = EAGAIN, False
        if not failed and count < size:
            if fstat_c(fd, &file) < 0:
                failed = errno
            elif offset + count < file.st_size:
                failed = EAGAIN
    if failed == EAGAIN:
        return asked
    if failed:
        raise OSError(failed, strerror(failed).decode())
    return data if count == size else PyBytes_FromStringAndSize(start, count)


def start_reading(int fd):
    cdef char data
    cdef iovec vector
    vector.iov_base, vector.iov_len = &data, 1
    with nogil:
        preadv2(fd, &vector, 1, 0, RWF_NOWAIT)
