# What device.py does, as calls of the C library: no objects for a header, and the interpreter's lock is given away where
# something is waited for, or much is copied. Used where the hot modules are compiled.

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_SET_ITEM
from cpython.type cimport PyType_GenericAlloc
from libc.errno cimport EAGAIN, EINTR, ENOENT, ENOTDIR, errno
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport read, write

from udbad.kernel.received cimport Received

from udbad.types import Caller

cdef type CALLER = Caller

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    Py_ssize_t writev(int fd, const iovec *vectors, int count)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events, revents
    int ppoll(pollfd *fds, unsigned long count, const timespec *timeout, const void *mask)
    short POLLIN

cdef struct fuse_in_header:
    uint32_t length, opcode
    uint64_t unique, nodeid
    uint32_t uid, gid, pid
    uint32_t extensions_and_padding

cdef struct fuse_out_header:
    uint32_t length
    int32_t error
    uint64_t unique

cdef size_t MUCH = 1 << 16  # bytes that take longer to copy than the lock to give away


cdef double now_c() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec + time.tv_nsec * 1e-9


cpdef double now():
    return now_c()


cpdef bint receive(int fd, Received request, double seconds) except -1:
    cdef char *start = PyByteArray_AS_STRING(request.buffer)
    cdef size_t room = PyByteArray_GET_SIZE(request.buffer)
    cdef Py_ssize_t size = read(fd, start, room)
    cdef double end
    if size < 0 and errno == EAGAIN and seconds > 0:
        with nogil:
            end = now_c() + seconds
            while size < 0 and errno == EAGAIN and now_c() < end:
                size = read(fd, start, room)
    if size < 0:
        if errno == EAGAIN:
            return False
        PyErr_SetFromErrno(OSError)
    cdef fuse_in_header *header = <fuse_in_header *>start
    request.size = size
    request.length, request.opcode, request.unique, request.node = (
        header.length, header.opcode, header.unique, header.nodeid
    )
    request.uid, request.gid, request.pid = header.uid, header.gid, header.pid
    return True


cpdef bytes name_at(Received request, Py_ssize_t start):
    cdef char *text = PyByteArray_AS_STRING(request.buffer)
    cdef Py_ssize_t end = request.size - 1
    if start < 0 or end < start or memchr(text + start, 0, request.size - start) != text + end:
        return None
    return PyBytes_FromStringAndSize(text + start, end - start)


cpdef tuple names_at(Received request, Py_ssize_t start):
    cdef char *text = PyByteArray_AS_STRING(request.buffer)
    cdef char *middle = NULL
    if 0 <= start < request.size:
        middle = <char *>memchr(text + start, 0, request.size - start)
    if middle == NULL:
        return None
    cdef bytes second = name_at(request, middle + 1 - text)
    if second is None:
        return None
    return PyBytes_FromStringAndSize(text + start, middle - text - start), second


cpdef unsigned int word_at(Received request, Py_ssize_t start) except? 0:
    cdef uint32_t word
    if not 0 <= start <= PyByteArray_GET_SIZE(request.buffer) - <Py_ssize_t>sizeof(word):
        raise IndexError(start)
    memcpy(&word, PyByteArray_AS_STRING(request.buffer) + start, sizeof(word))
    return word


cdef inline void put(tuple made, Py_ssize_t at, object number):
    Py_INCREF(number)  # the tuple's own
    PyTuple_SET_ITEM(made, at, number)


cpdef tuple caller_of(Received request, unsigned int umask):
    """A Caller is a tuple of four: without one of another type first, of which tuple.__new__ makes it."""
    cdef tuple made = <tuple>PyType_GenericAlloc(CALLER, 4)
    put(made, 0, request.uid)
    put(made, 1, request.gid)
    put(made, 2, request.pid)
    put(made, 3, umask)
    return made


def answer(int fd, uint64_t unique, int number, object body not None):
    cdef fuse_out_header header
    cdef iovec[2] vectors
    cdef int count = 1
    cdef Py_ssize_t written
    header.length, header.error, header.unique = sizeof(header), -number, unique
    vectors[0].iov_base, vectors[0].iov_len = &header, sizeof(header)
    if not number:
        if type(body) is bytes:
            vectors[1].iov_base, vectors[1].iov_len = PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body)
        else:
            vectors[1].iov_base = PyByteArray_AS_STRING(<bytearray?>body)
            vectors[1].iov_len = PyByteArray_GET_SIZE(body)
        count = 2 if vectors[1].iov_len else 1
        header.length += vectors[1].iov_len
    if header.length > MUCH:
        with nogil:
            written = writev(fd, vectors, count)
    else:
        written = writev(fd, vectors, count)
    if written < 0:
        PyErr_SetFromErrno(OSError)


def tell(int fd, bytes messages not None):
    cdef char *at = PyBytes_AS_STRING(messages)
    cdef size_t left = PyBytes_GET_SIZE(messages)
    cdef int missed = 0, failure = 0
    cdef uint32_t length
    with nogil:
        while left >= sizeof(fuse_out_header):
            length = (<fuse_out_header *>at).length
            if not sizeof(fuse_out_header) <= length <= left:
                break
            if write(fd, at, length) < 0:
                if errno == ENOENT or errno == ENOTDIR:
                    missed += 1
                else:
                    failure = errno
            at += length
            left -= length
    if left:
        raise ValueError("no notification")
    return missed, failure


def wait(int requests, int wake, int events, double seconds):
    cdef pollfd[3] fds
    cdef timespec timeout
    cdef int ready, each
    cdef int seen = 0
    for each, fd in enumerate((requests, wake, events)):
        fds[each].fd, fds[each].events, fds[each].revents = fd, POLLIN, 0
    timeout.tv_sec = <long>seconds
    timeout.tv_nsec = <long>((seconds - timeout.tv_sec) * 1e9)
    with nogil:
        ready = ppoll(fds, 3, &timeout if seconds >= 0 else NULL, NULL)
    if ready < 0:
        if errno != EINTR:
            PyErr_SetFromErrno(OSError)
        PyErr_CheckSignals()
    for each in range(3):
        if ready > 0 and fds[each].revents:
            seen |= 1 << each
    return seen
