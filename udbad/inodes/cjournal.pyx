# The entries of journal.py that most requests make, written in one go, and most numbers without an object for each. Used
# where the hot modules are compiled; the Python there is what this means.

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from udbad.inodes.inomap cimport InoMap
from udbad.inodes.table cimport Dir, Layer, Node

from udbad.inodes.handles import OpenFile
from udbad.inodes.inomap import InoMap as InoMapType
from udbad.inodes.journal import CLOSED, DIRECTORY, FILE, NEGATIVES, NUMBER, NUMBERS, OPEN_FILE, Negative
from udbad.inodes.record import pack
from udbad.inodes.table import Dir as DirType
from udbad.inodes.table import Node as NodeType

cdef extern from *:
    """
    /* After all stores that come before it: whoever reads the word finds what it says is there. */
    #define publish(word, value) __atomic_store_n(word, value, __ATOMIC_RELEASE)
    """
    void publish(uint64_t *word, uint64_t value)

cdef packed struct opened_entry:
    uint64_t size, count
    uint8_t kind
    uint8_t[3] padding
    int32_t fd
    uint32_t flags, uid, gid, pid
    int64_t fh, group
    uint64_t node
    int32_t backing_id

cdef packed struct closed_entry:
    uint64_t size, count
    uint8_t kind, marshal_int
    int32_t fh

cdef uint64_t LARGEST = 1024
"""Bytes that any of these entries may take."""
cdef uint8_t _FILE = FILE, _OPEN_FILE = OPEN_FILE, _CLOSED = CLOSED, _NEGATIVES = NEGATIVES
cdef uint8_t _DIRECTORY = DIRECTORY, _NUMBERS = NUMBERS, _NUMBER = NUMBER


cdef uint64_t put_node(char *to, Node node) except? 0:
    """0: there is no room for it."""
    cdef node_entry *entry = <node_entry *>to
    cdef uint64_t name_size = PyBytes_GET_SIZE(node.name)
    cdef uint64_t size = sizeof(node_entry) + name_size
    cdef bytes more = None
    if node.aliases or node.plink is not None:
        home = None if node.plink is None else (node.plink.branch.id, node.plink.name)
        more = pack(([(above.id, other) for above, other in node.aliases or ()], home))
        if size + PyBytes_GET_SIZE(more) > LARGEST:
            return 0
        memcpy(to + size, PyBytes_AS_STRING(more), PyBytes_GET_SIZE(more))
        size += PyBytes_GET_SIZE(more)
    entry.size = size - HEAD
    entry.count = node.nlookup if node.nlookup > 0 else 0
    entry.kind = _FILE
    entry.dead = node.dead
    entry.name_size = <uint16_t>name_size
    entry.type = node.kind
    entry.branch = node.branch.id
    entry.orphan_fd = node.orphan_fd
    entry.id, entry.dev, entry.ino = node.id, node.dev, node.ino
    entry.parent = 0 if node.parent is None else node.parent.id
    entry.links = node.nlink_extra
    memcpy(to + sizeof(node_entry), PyBytes_AS_STRING(node.name), name_size)
    return size


cdef uint64_t put_packed(char *to, uint8_t kind, object said, uint64_t count) except? 0:
    """0: there is no room for it."""
    cdef uint64_t *head = <uint64_t *>to
    cdef bytes packed = pack(said)
    cdef uint64_t size = PyBytes_GET_SIZE(packed)
    if HEAD + 1 + size > LARGEST:
        return 0
    head[0], head[1] = size + 1, count
    to[HEAD] = <char>kind
    memcpy(to + HEAD + 1, PyBytes_AS_STRING(packed), size)
    return HEAD + 1 + size


cdef uint64_t put_directory(char *to, Dir node) except? 0:
    """0: there is no room for it."""
    cdef Layer layer
    cdef list layers = []
    for layer in node.layers:
        layers.append((layer.branch.id, layer.dev, layer.ino, layer.nlink, layer.fd))
    return put_packed(
        to, _DIRECTORY,
        (
            node.id, 0 if node.parent is None else node.parent.id, node.name, bool(node.dead), node.nlink_extra,
            node.floor, node.opaque, node.mtime_offset, bool(node.listed), layers,
        ),
        node.nlookup if node.nlookup > 0 else 0,
    )


cdef uint64_t put_opened(char *to, object handle, Node node) except 0:
    cdef opened_entry *entry = <opened_entry *>to
    entry.size = sizeof(opened_entry) - HEAD
    entry.count = 0
    entry.kind = _OPEN_FILE
    entry.padding[0] = entry.padding[1] = entry.padding[2] = 0
    entry.fd, entry.flags = handle.fd, handle.flags
    entry.uid, entry.gid, entry.pid = handle.uid, handle.gid, handle.pid
    entry.fh = handle.fh
    group = handle.group
    entry.group = -1 if group is None else group
    entry.node = node.id
    entry.backing_id = handle.backing_id
    return sizeof(opened_entry)


cdef class Writer:
    """Writes some of what has changed to a half of the record, and takes it out; the rest is for journal.py."""

    cdef object table, handles, mapped
    cdef InoMap inomap
    cdef Py_buffer memory, words
    cdef uint64_t *end

    def __init__(self, table, handles, InoMap inomap not None):
        self.table, self.handles, self.inomap, self.mapped = table, handles, inomap, None

    def __dealloc__(self):
        self.release()

    cdef void release(self):
        if self.mapped is not None:
            PyBuffer_Release(&self.memory)
            PyBuffer_Release(&self.words)
            self.mapped = None

    cdef int take(self, half) except -1:
        """Have the addresses of what a half, of record.py, has in memory."""
        self.release()
        PyObject_GetBuffer(half.memory, &self.memory, PyBUF_WRITABLE)
        PyObject_GetBuffer(half.ends, &self.words, PyBUF_WRITABLE)
        self.mapped = half.memory
        self.end = <uint64_t *>self.words.buf + <int>half.end_word
        return 0

    def __call__(self, set changed, half):
        """False when something is left, or all is to be written anew."""
        cdef uint64_t end, size
        cdef int64_t number
        cdef char *to
        cdef closed_entry *closed
        cdef dict nodes = self.table.nodes, files = self.handles.files, lost = self.handles.lost
        cdef Node node
        cdef list ones = list(changed)
        if half.memory is not self.mapped:
            self.take(half)
        end = self.end[0]
        changed.clear()
        try:
            for one in ones:
                to = <char *>self.memory.buf + end
                if end + LARGEST > <uint64_t>self.memory.len:
                    changed.add(one)
                    continue
                size = 0
                if type(one) is NodeType or type(one) is DirType:
                    node = one
                    if nodes.get(node.id) is node:
                        if type(one) is NodeType:
                            size = put_node(to, node)
                        elif (<Dir>node).offline is None:
                            size = put_directory(to, <Dir>node)
                        if size:
                            node.place = (end >> 3) + 1
                elif type(one) is OpenFile:
                    number = one.fh
                    if files.get(number) is one:
                        size = put_opened(to, one, one.node)
                    elif 0 < number < 0x7FFFFFFF and number not in files and number not in lost:
                        closed = <closed_entry *>to
                        closed.size, closed.count = sizeof(closed_entry) - HEAD, 0
                        closed.kind, closed.marshal_int, closed.fh = _CLOSED, c"i", <int32_t>number
                        size = sizeof(closed_entry)
                elif type(one) is Negative and (<tuple>one)[1] is not None:
                    size = put_packed(to, _NEGATIVES, ((<Node>(<tuple>one)[0]).id, [(<tuple>one)[1]]), 0)
                elif type(one) is tuple:
                    size = put_packed(to, _NUMBER, (*one, self.inomap.entry(one)), 0)
                elif type(one) is InoMapType:
                    size = put_packed(to, _NUMBERS, self.inomap.state(), 0)
                if not size:
                    changed.add(one)
                    continue
                end = (end + size + 7) & ~<uint64_t>7
        except BaseException:
            changed.update(ones)
            raise
        if changed:  # with the rest
            half.pending = end
            return False
        publish(self.end, end)
        return end <= <uint64_t>half.most
