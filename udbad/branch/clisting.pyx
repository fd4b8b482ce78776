# What listing.py does, as calls of the C library. Used where the hot modules are compiled.

from cpython.array cimport array, resize
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromString, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport strlen

cdef extern from "<sys/inotify.h>" nogil:
    int inotify_add_watch(int fd, const char *path, uint32_t mask)


def read(int fd):
    cdef uint64_t[8192] buffer
    cdef char *at
    cdef char *end
    cdef dirent64 *entry
    cdef Py_ssize_t size, length
    cdef Py_ssize_t count = 0
    cdef Py_ssize_t room = 0
    cdef list names = []
    cdef array numbers = array("Q")
    cdef bytearray types = bytearray()
    while True:
        with nogil:
            size = getdents64(fd, buffer, sizeof(buffer))
        if size <= 0:
            break
        at = <char *>buffer
        end = at + size
        while at < end:
            entry = <dirent64 *>at
            at += entry.d_reclen
            length = strlen(entry.d_name)
            if is_dots(entry.d_name, length):
                continue
            names.append(PyBytes_FromStringAndSize(entry.d_name, length))
            if count == room:
                room = max(2 * room, 64)
                resize(numbers, room)
                PyByteArray_Resize(types, room)
            numbers.data.as_ulonglongs[count] = entry.d_ino
            PyByteArray_AS_STRING(types)[count] = <char>type_of(fd, entry)
            count += 1
    if size < 0:
        PyErr_SetFromErrno(OSError)
    resize(numbers, count)
    PyByteArray_Resize(types, count)
    return names, numbers, types


def watch(int inotify, int fd, uint32_t mask):
    cdef char[40] path
    cdef int number
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd)
    with nogil:
        number = inotify_add_watch(inotify, path, mask)
    if number < 0:
        PyErr_SetFromErrno(OSError)
    return number


def events(bytes data not None):
    cdef const char *at = PyBytes_AS_STRING(data)
    cdef const char *end = at + len(data)
    cdef inotify_event *event
    found = []
    while at < end:
        event = <inotify_event *>at
        at += sizeof(inotify_event) + event.len
        found.append((event.wd, event.mask, PyBytes_FromString(event.name) if event.len else b""))
    return found


cdef extern from "<sys/fanotify.h>" nogil:
    struct fanotify_event_metadata:
        uint32_t event_len
        unsigned short metadata_len
        uint64_t mask
        int pid
    struct fanotify_event_info_header:
        unsigned char info_type
        unsigned short len
    enum: FAN_EVENT_INFO_TYPE_DFID_NAME
    enum: FAN_Q_OVERFLOW


def fan_events(bytes data not None, dict known not None):
    cdef const char *at = PyBytes_AS_STRING(data)
    cdef const char *end = at + len(data)
    cdef const char *info
    cdef const char *handle
    cdef fanotify_event_metadata *event
    cdef fanotify_event_info_header *header
    cdef Py_ssize_t count = 0
    cdef uint32_t size
    found = []
    while at < end:
        event = <fanotify_event_metadata *>at
        info = at + event.metadata_len
        at += event.event_len
        if event.mask & FAN_Q_OVERFLOW:
            found.append((b"", event.mask, b"", event.pid))
        while info < at:
            header = <fanotify_event_info_header *>info
            handle = info + 4
            info += header.len
            size = 16 + (<uint32_t *>(handle + 8))[0]  # an id of 8 bytes, struct file_handle
            key = PyBytes_FromStringAndSize(handle, size)
            if key not in known:
                continue
            name = b""
            if header.info_type == FAN_EVENT_INFO_TYPE_DFID_NAME and not (
                handle[size] == b"." and handle[size + 1] == 0
            ):
                name = PyBytes_FromString(handle + size)
            found.append((key, event.mask, name, event.pid))
        count += 1
    return count, found
