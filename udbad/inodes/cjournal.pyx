# The entries of journal.py that most requests make, written in one go, and most numbers without an object for each. Used
# where the hot modules are compiled; the Python there is what this means.

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from udbad.inodes.cbyid cimport ById
from udbad.inodes.handles cimport HandleTable, OpenFile
from udbad.inodes.inomap cimport InoMap
from udbad.inodes.node cimport Dir, Layer, More, Node
from udbad.inodes.table cimport InodeTable

from udbad.inodes.journal import CLOSED, DIRECTORY, FILE, NEGATIVES, NUMBER, NUMBERS, OPEN_FILE, Negative
from udbad.inodes.record import pack

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
    cdef More rest = node.more
    if rest is not None and (rest.aliases or rest.plink is not None):
        home = None if rest.plink is None else (rest.plink.branch.id, rest.plink.name)
        more = pack(([(above.id, other) for above, other in rest.aliases or ()], home))
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
    entry.orphan_fd = -1 if rest is None else rest.orphan_fd
    entry.id, entry.dev, entry.ino = node.id, node.dev, node.ino
    entry.parent = 0 if node.parent is None else node.parent.id
    entry.links = node.nlink_extra
    memcpy(to + sizeof(node_entry), PyBytes_AS_STRING(node.name), name_size)
    return size


# What marshal writes, in its second format, of what most entries say: as `pack` of record.py, with no object for each
# number. There has to be room.

cdef char *put_size(char *to, uint8_t kind, int32_t size) noexcept:
    to[0] = <char>kind
    memcpy(to + 1, &size, 4)
    return to + 5


cdef char *put_unsigned(char *to, uint64_t number) noexcept:
    """At most 15 bytes; those that have no sign, of 31 bits, or digits of 15."""
    cdef int32_t digits = 0
    cdef uint16_t digit
    cdef char *at = to + 5
    if number < 0x80000000:
        return put_size(to, c"i", <int32_t>number)
    while number:
        digit = number & 0x7FFF
        memcpy(at, &digit, 2)
        at += 2
        digits += 1
        number >>= 15
    put_size(to, c"l", digits)
    return at


cdef char *put_signed(char *to, int64_t number) noexcept:
    cdef char *at
    cdef int32_t digits
    if number >= 0:
        return put_unsigned(to, <uint64_t>number)
    if number >= -0x80000000LL:
        return put_size(to, c"i", <int32_t>number)
    at = put_unsigned(to, -<uint64_t>number)
    memcpy(&digits, to + 1, 4)
    put_size(to, c"l", -digits)
    return at


cdef char *put_bytes(char *to, bytes text) noexcept:
    cdef int32_t size = <int32_t>PyBytes_GET_SIZE(text)
    to = put_size(to, c"s", size)
    memcpy(to, PyBytes_AS_STRING(text), size)
    return to + size


cdef char *put_flag(char *to, bint flag) noexcept:
    to[0] = c"T" if flag else c"F"
    return to + 1


cdef char *put_head(char *to, uint8_t kind, uint64_t count, int32_t members) noexcept:
    """The beginning of an entry that is a tuple."""
    (<uint64_t *>to)[1] = count
    to[HEAD] = <char>kind
    return put_size(to + HEAD + 1, c"(", members)


cdef uint64_t put_end(char *to, char *end) noexcept:
    (<uint64_t *>to)[0] = end - to - HEAD
    return end - to


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
    cdef char *at
    cdef Py_ssize_t count = PyList_GET_SIZE(node.layers)
    if 256 + PyBytes_GET_SIZE(node.name) + 80 * count > <Py_ssize_t>LARGEST:
        return 0
    at = put_head(to, _DIRECTORY, node.nlookup if node.nlookup > 0 else 0, 10)
    at = put_unsigned(at, node.id)
    at = put_unsigned(at, 0 if node.parent is None else node.parent.id)
    at = put_bytes(at, node.name)
    at = put_flag(at, node.dead)
    at = put_signed(at, node.nlink_extra)
    at = put_signed(at, node.floor)
    if node.opaque is None:
        at[0] = c"N"
        at += 1
    else:
        at = put_signed(at, node.opaque)
    at = put_signed(at, node.mtime_offset)
    at = put_flag(at, node.listed)
    at = put_size(at, c"[", <int32_t>count)
    for layer in node.layers:
        at = put_size(at, c"(", 5)
        at = put_signed(at, layer.branch.id)
        at = put_unsigned(at, layer.dev)
        at = put_unsigned(at, layer.ino)
        at = put_signed(at, layer.nlink)
        at = put_signed(at, layer.fd)
    return put_end(to, at)


cdef uint64_t put_negative(char *to, Node node, bytes name) except? 0:
    cdef char *at = put_head(to, _NEGATIVES, 0, 2)
    at = put_unsigned(at, node.id)
    at = put_size(at, c"[", 1)
    return put_end(to, put_bytes(at, name))


cdef uint64_t put_opened(char *to, OpenFile handle) except 0:
    cdef opened_entry *entry = <opened_entry *>to
    entry.size = sizeof(opened_entry) - HEAD
    entry.count = 0
    entry.kind = _OPEN_FILE
    entry.padding[0] = entry.padding[1] = entry.padding[2] = 0
    entry.fd, entry.flags = handle.fd, handle.flags
    entry.uid, entry.gid, entry.pid = handle.uid, handle.gid, handle.pid
    entry.fh = handle.fh
    entry.group = -1 if handle.group is None else handle.group
    entry.node = handle.node.id
    entry.backing_id = handle.backing_id
    return sizeof(opened_entry)


cdef class Writer:
    """Writes some of what has changed to a half of the record, and takes it out; the rest is for journal.py."""

    cdef InodeTable table
    cdef HandleTable handles
    cdef InoMap inomap
    cdef object mapped
    cdef Py_buffer memory, words
    cdef uint64_t *end

    def __init__(self, InodeTable table not None, HandleTable handles not None, InoMap inomap not None):
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
        cdef ById nodes = self.table.nodes
        cdef dict files = self.handles.files, lost = self.handles.lost
        cdef OpenFile opened
        cdef Node node
        cdef list left = []
        if half.memory is not self.mapped:
            self.take(half)
        end = self.end[0]
        for one in changed:
            to = <char *>self.memory.buf + end
            size = 0
            if end + LARGEST > <uint64_t>self.memory.len:
                pass
            elif type(one) is Node or type(one) is Dir:
                node = one
                if nodes.get(node.id) is node:
                    if type(one) is Node:
                        size = put_node(to, node)
                    elif (<Dir>node).offline is None:
                        size = put_directory(to, <Dir>node)
                    if size:
                        node.place = (end >> 3) + 1
            elif type(one) is OpenFile:
                opened = one
                if files.get(opened.fh) is opened:
                    size = put_opened(to, opened)
                else:
                    number = opened.fh
                    if 0 < number < 0x7FFFFFFF and opened.fh not in files and opened.fh not in lost:
                        closed = <closed_entry *>to
                        closed.size, closed.count = sizeof(closed_entry) - HEAD, 0
                        closed.kind, closed.marshal_int, closed.fh = _CLOSED, c"i", <int32_t>number
                        size = sizeof(closed_entry)
            elif type(one) is Negative and (<tuple>one)[1] is not None:
                size = put_negative(to, (<tuple>one)[0], (<tuple>one)[1])
            elif type(one) is tuple:
                size = put_packed(to, _NUMBER, (*one, self.inomap.entry(one)), 0)
            elif type(one) is InoMap:
                size = put_packed(to, _NUMBERS, self.inomap.state(), 0)
            if not size:
                left.append(one)
                continue
            end = (end + size + 7) & ~<uint64_t>7
        changed.clear()
        if left:  # with the rest
            changed.update(left)
            half.pending = end
            return False
        publish(self.end, end)
        return end <= <uint64_t>half.most
