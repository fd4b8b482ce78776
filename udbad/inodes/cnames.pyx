# Names of a directory as a structure of C: names.py says what each method means. Used where the hot modules are compiled.
#
# Entries are in the order of the names. One that is gone stays in its place, and in the index, until `settle` closes the
# gaps; a block that has several users has none. The index is open addressing with linear probing.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.set cimport PySet_Contains
from libc.errno cimport errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, strerror, strlen

from udbad.branch.clisting cimport DT_CHR, DT_DIR, dirent64, getdents64, is_dots, type_of

cdef extern from "Python.h" nogil:
    ctypedef struct PyHash_FuncDef:
        Py_ssize_t (*hash)(const void *, Py_ssize_t) noexcept nogil
    PyHash_FuncDef *PyHash_GetFuncDef()

cdef enum:
    FEW = 8  # entries that are looked through one by one
    MOST_BYTES = 4095
    HEAD = 5  # bytes before a list, and before each of its elements, in what marshal makes

cdef Py_ssize_t (*hash_of)(const void *, Py_ssize_t) noexcept nogil  # as of bytes: nobody can choose names that collide
hash_of = PyHash_GetFuncDef().hash

# All hits there are, of whatever directory: there are as many as combinations of branches that have something. The place
# of one is what an entry has; 0 is UNKNOWN.
cdef list HITS = [None]
cdef dict PLACES = {None: 0}
cdef uint16_t[65536] TOPS


cdef uint16_t place_of(object hit) except? 0:
    known = PLACES.get(hit)
    if known is not None:
        return known
    top = hit[0] if type(hit) is tuple else hit
    if len(HITS) == 65536:
        return 0
    TOPS[len(HITS)] = top
    PLACES[hit] = len(HITS)
    HITS.append(hit)
    return len(HITS) - 1


cdef uint16_t uppermost(uint16_t hit) noexcept nogil:
    return TOPS[hit]


cdef inline Py_ssize_t size_of(entry_t *entry) noexcept nogil:
    return entry.rest >> 4


cdef inline unsigned int kind_of(entry_t *entry) noexcept nogil:
    return entry.rest & 15


cdef block_t *new_block() except NULL:
    cdef block_t *block = <block_t *>calloc(1, sizeof(block_t))
    if not block:
        raise MemoryError
    block.users = 1
    return block


cdef void leave(block_t *block) noexcept:
    block.users -= 1
    if not block.users:
        free(block.entries)
        free(block.text)
        free(block.index)
        free(block)


cdef int set_room(block_t *block, Py_ssize_t room, size_t space) except -1:
    """For that many entries, and bytes of names; no less than there are."""
    cdef void *new
    if space > <uint32_t>-1 or room > <uint32_t>-2:
        raise MemoryError
    if room != block.room:
        new = realloc(block.entries, max(room, 1) * sizeof(entry_t))
        if not new:
            raise MemoryError
        block.entries, block.room = <entry_t *>new, room
    if space != block.space:
        new = realloc(block.text, max(space, 1))
        if not new:
            raise MemoryError
        block.text, block.space = <char *>new, space
    return 0


cdef size_t slot_of(block_t *block, const char *name, Py_ssize_t size) noexcept nogil:
    """Where to begin to look for a name in the index, if there is one."""
    return <size_t>hash_of(name, size) if block.slots else 0


cdef inline unsigned char tag_of(size_t slot) noexcept nogil:
    return <unsigned char>(slot >> (8 * sizeof(slot) - 8) | 128)


cdef void put_in_index(block_t *block, Py_ssize_t place, size_t slot) noexcept nogil:
    cdef size_t at = slot & (block.slots - 1)
    while block.tags[at]:
        at = (at + 1) & (block.slots - 1)
    block.index[at], block.tags[at] = place, tag_of(slot)


cdef int new_index(block_t *block, size_t slots) except -1:
    """An index of nothing, in place of the one there is."""
    cdef uint32_t *index = NULL
    if slots:
        index = <uint32_t *>calloc(slots, sizeof(uint32_t) + 1)
        if not index:
            raise MemoryError
    free(block.index)
    block.index, block.tags, block.slots = index, <unsigned char *>(index + slots), slots
    return 0


cdef int make_index(block_t *block, size_t slots) except -1:
    cdef Py_ssize_t place
    cdef entry_t *entry
    new_index(block, slots)
    if slots:
        for place in range(block.count):
            entry = block.entries + place
            if size_of(entry):
                put_in_index(block, place, slot_of(block, block.text + entry.at, size_of(entry)))
    return 0


cdef size_t slots_for(Py_ssize_t count) noexcept nogil:
    cdef size_t slots = 16
    if count <= FEW:
        return 0
    while slots * 3 < <size_t>count * 4:
        slots *= 2
    return slots


cdef int reserve(block_t *block, Py_ssize_t more, size_t bytes_more) except -1:
    """Room for so many entries more, with names of so many bytes: at once, not step by step."""
    cdef Py_ssize_t room = block.count + more
    cdef size_t space = block.used + bytes_more
    if room > block.room or space > block.space:
        set_room(
            block, max(block.room, room + (room // 2 if block.count else 0)),
            max(block.space, space + (space // 2 if block.used else 0)),
        )
    if slots_for(room) > block.slots:
        make_index(block, slots_for(room))
    return 0


cdef block_t *clone(block_t *old) except NULL:
    """Without what is gone."""
    cdef block_t *block = new_block()
    cdef Py_ssize_t place
    cdef entry_t *entry
    try:
        set_room(block, old.count - old.gone, old.used)
        if not old.gone:
            block.count, block.used = old.count, old.used
            if old.count:
                memcpy(block.entries, old.entries, old.count * sizeof(entry_t))
                memcpy(block.text, old.text, old.used)
        else:
            for place in range(old.count):
                if size_of(old.entries + place):
                    entry = block.entries + block.count
                    entry[0] = old.entries[place]
                    entry.at = block.used
                    memcpy(block.text + block.used, old.text + old.entries[place].at, size_of(entry))
                    block.count += 1
                    block.used += size_of(entry)
            set_room(block, block.count, block.used)
        make_index(block, slots_for(block.count))
    except BaseException:
        leave(block)
        raise
    return block


cdef entry_t *look_in(block_t *block, const char *name, Py_ssize_t size, size_t slot) noexcept nogil:
    cdef entry_t *entry
    cdef Py_ssize_t place
    cdef size_t at
    if not 0 < size <= MOST_BYTES:
        return NULL
    if not block.slots:
        for place in range(block.count):
            entry = block.entries + place
            if size_of(entry) == size and memcmp(block.text + entry.at, name, size) == 0:
                return entry
        return NULL
    at = slot & (block.slots - 1)
    while block.tags[at]:
        if block.tags[at] == tag_of(slot):
            entry = block.entries + block.index[at]
            if size_of(entry) == size and memcmp(block.text + entry.at, name, size) == 0:
                return entry
        at = (at + 1) & (block.slots - 1)
    return NULL


cdef class Names:
    def __cinit__(self):
        self.block = new_block()

    def __dealloc__(self):
        if self.block:
            leave(self.block)

    def __init__(self, names=()):
        for name in names:
            self[name] = None

    # -- inside -----------------------------------------------------------------------------------

    cdef int renew(self) except -1:
        """Have a block of its own, without gaps."""
        cdef block_t *block = clone(self.block)
        leave(self.block)
        self.block = block
        return 0

    cdef int own(self) except -1:
        """Have a block that nobody else has, before it is changed."""
        return self.renew() if self.block.users > 1 else 0

    cdef int settle(self) except -1:
        """Close the gaps, so that places are those in the order."""
        return self.renew() if self.block.gone else 0

    cdef entry_t *look(self, const char *name, Py_ssize_t size) noexcept nogil:
        """NULL: it is not there."""
        return look_in(self.block, name, size, slot_of(self.block, name, size))

    cdef entry_t *lay(self, const char *name, Py_ssize_t size) except NULL:
        """One more name, to a block that nobody else has; the index does not have it."""
        cdef block_t *block = self.block
        cdef entry_t *entry
        if not 0 < size <= MOST_BYTES:
            raise ValueError(PyBytes_FromStringAndSize(name, size))
        if block.count == block.room:
            if block.gone > block.count // 2:
                self.settle()
                block = self.block
            set_room(block, block.count + block.count // 2 + 4, block.space)
        if block.used + size > block.space:
            set_room(block, block.room, max(block.used + size, block.used + block.used // 2 + 32))
        entry = block.entries + block.count
        entry.number, entry.at, entry.hit, entry.rest = 0, block.used, 0, size << 4
        memcpy(block.text + block.used, name, size)
        block.count += 1
        block.used += size
        return entry

    cdef entry_t *append(self, const char *name, Py_ssize_t size, size_t slot) except NULL:
        """A name that is not there, to a block that nobody else has. slot: of the name."""
        cdef entry_t *entry = self.lay(name, size)
        cdef block_t *block = self.block
        if block.slots * 3 >= <size_t>block.count * 4:
            put_in_index(block, block.count - 1, slot)
        elif block.count > FEW:
            make_index(block, slots_for(block.count))
        return entry

    # -- single names -----------------------------------------------------------------------------

    def __len__(self):
        return self.block.count - self.block.gone

    def __contains__(self, bytes name not None):
        return self.look(PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name)) != NULL

    cpdef get(self, bytes name, missing=None):
        cdef entry_t *entry = self.look(PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
        return missing if entry == NULL else HITS[entry.hit]

    def __setitem__(self, bytes name not None, hit):
        cdef uint16_t place = place_of(hit)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(name)
        self.own()
        cdef size_t slot = slot_of(self.block, PyBytes_AS_STRING(name), size)
        cdef entry_t *entry = look_in(self.block, PyBytes_AS_STRING(name), size, slot)
        if entry == NULL:
            entry = self.append(PyBytes_AS_STRING(name), size, slot)
        entry.number, entry.hit, entry.rest = 0, place, size << 4

    def discard(self, bytes name not None):
        cdef entry_t *entry = self.look(PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
        if entry == NULL:
            return
        if self.block.users > 1:
            self.own()
            entry = self.look(PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
        entry.rest = 0
        self.block.gone += 1
        if self.block.gone == self.block.count:
            leave(self.block)
            self.block = NULL
            self.block = new_block()

    def at(self, Py_ssize_t place):
        self.settle()
        if not 0 <= place < self.block.count:
            raise IndexError(place)
        cdef entry_t *entry = self.block.entries + place
        name = PyBytes_FromStringAndSize(self.block.text + entry.at, size_of(entry))
        return name, HITS[entry.hit], entry.number, kind_of(entry)

    def find(self, bytes name not None):
        cdef entry_t *entry = self.look(PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
        return None if entry == NULL else (HITS[entry.hit], entry.number, kind_of(entry))

    # -- what branch directories say --------------------------------------------------------------

    cdef int merge(self, const char *name, Py_ssize_t size, uint64_t number, unsigned int kind, object index,
                   uint16_t as_file, uint16_t as_directory, set hidden, set stacked) except -1:
        cdef entry_t *entry
        cdef size_t slot = slot_of(self.block, name, size)
        if hidden and PySet_Contains(hidden, PyBytes_FromStringAndSize(name, size)):
            return 0
        entry = look_in(self.block, name, size, slot)
        if entry == NULL:
            entry = self.append(name, size, slot)
            entry.number, entry.hit = number, as_directory if kind == DT_DIR else as_file
            entry.rest = <uint16_t>(size << 4 | kind)
            return 0
        if stacked is not None:
            stacked.add(PyBytes_FromStringAndSize(name, size))
        hit = HITS[entry.hit]
        if kind == DT_DIR and type(hit) is tuple:
            entry.hit = place_of((*<tuple>hit, index))
        return 0

    cdef int index_anew(self, set stacked) except -1:
        """Have an index where there is none, of names of one branch directory. That may say a name twice, when it is
        changed while it is read: the first one counts, as for `merge`."""
        cdef block_t *block = self.block
        cdef Py_ssize_t place
        cdef size_t slot
        cdef entry_t *entry
        cdef entry_t *other
        new_index(block, slots_for(block.count))
        for place in range(block.count):
            entry = block.entries + place
            slot = slot_of(block, block.text + entry.at, size_of(entry))
            other = look_in(block, block.text + entry.at, size_of(entry), slot)
            if other != NULL and other != entry:
                if stacked is not None:
                    stacked.add(PyBytes_FromStringAndSize(block.text + entry.at, size_of(entry)))
                entry.rest = 0
                block.gone += 1
            elif block.slots:
                put_in_index(block, place, slot)
        return 0

    def read(self, int fd, index, set hidden not None, set stacked):
        cdef uint64_t[8192] buffer
        cdef char *at
        cdef char *end
        cdef dirent64 *found
        cdef Py_ssize_t size, length
        cdef unsigned int kind
        cdef uint16_t as_file = place_of(index)
        cdef uint16_t as_directory = place_of((index,))
        cdef list odd = []
        cdef entry_t *entry
        cdef int failed
        # Nothing that a name may be among already: the index is made at the end, once and not as it grows.
        cdef bint first = not self.block.count and not hidden
        self.own()
        if first:
            make_index(self.block, 0)
        while True:
            with nogil:
                size = getdents64(fd, buffer, sizeof(buffer))
            if size <= 0:
                break
            at = <char *>buffer
            end = at + size
            length = 0
            if not first:
                while at < end:
                    at += (<dirent64 *>at).d_reclen
                    length += 1
                reserve(self.block, length, size - length * 20)  # what an entry has beside the name
                at = <char *>buffer
            while at < end:
                found = <dirent64 *>at
                at += found.d_reclen
                length = strlen(found.d_name)
                if is_dots(found.d_name, length):
                    continue
                kind = type_of(fd, found)
                if kind == DT_CHR or (length > 4 and memcmp(found.d_name, b".wh.", 4) == 0):
                    odd.append((PyBytes_FromStringAndSize(found.d_name, length), found.d_ino, kind))
                    continue
                if first:
                    entry = self.lay(found.d_name, length)
                    entry.number, entry.hit = found.d_ino, as_directory if kind == DT_DIR else as_file
                    entry.rest = <uint16_t>(length << 4 | kind)
                else:
                    self.merge(found.d_name, length, found.d_ino, kind, index, as_file, as_directory, hidden, stacked)
        failed = errno if size < 0 else 0
        if first:
            self.index_anew(stacked)
        if failed:
            raise OSError(failed, strerror(failed).decode())
        set_room(self.block, self.block.count, self.block.used)
        return odd

    def add(self, bytes name not None, index, uint64_t number, unsigned int kind, set hidden not None, set stacked):
        self.own()
        self.merge(PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name), number, kind & 15, index, place_of(index),
                   place_of((index,)), hidden, stacked)

    def lacking(self, known):
        cdef Py_ssize_t count = 0
        cdef Py_ssize_t place
        cdef entry_t *entry
        cdef bint any_known = bool(known)
        for place in range(self.block.count):
            entry = self.block.entries + place
            if size_of(entry) and not kind_of(entry):
                if not any_known or PyBytes_FromStringAndSize(self.block.text + entry.at, size_of(entry)) not in known:
                    count += 1
        return count

    def fill(self, Names now not None):
        cdef Py_ssize_t place
        cdef entry_t *entry
        cdef entry_t *said
        self.own()
        for place in range(self.block.count):
            entry = self.block.entries + place
            if size_of(entry) and not kind_of(entry):
                said = now.look(self.block.text + entry.at, size_of(entry))
                if said != NULL:
                    entry.number, entry.hit, entry.rest = said.number, said.hit, said.rest

    def doubt(self):
        cdef Py_ssize_t place
        cdef entry_t *entry
        self.own()
        for place in range(self.block.count):
            entry = self.block.entries + place
            entry.number, entry.hit, entry.rest = 0, 0, entry.rest & ~15

    # -- all of them ------------------------------------------------------------------------------

    def __iter__(self):
        cdef Py_ssize_t place
        cdef entry_t *entry
        cdef list names = []
        for place in range(self.block.count):
            entry = self.block.entries + place
            if size_of(entry):
                names.append(PyBytes_FromStringAndSize(self.block.text + entry.at, size_of(entry)))
        return iter(names)

    def hits(self):
        cdef Py_ssize_t place
        return [HITS[self.block.entries[place].hit] for place in range(self.block.count)
                if size_of(self.block.entries + place)]

    def packed(self):
        """Format 2 of marshal, as of record.pack."""
        self.settle()
        cdef block_t *block = self.block
        cdef bytes packed = PyBytes_FromStringAndSize(NULL, HEAD + block.count * HEAD + block.used)
        cdef char *at = PyBytes_AS_STRING(packed)
        cdef uint32_t number = block.count
        cdef Py_ssize_t place
        at[0] = b"["
        memcpy(at + 1, &number, sizeof(number))
        for place in range(block.count):
            at += HEAD if not place else HEAD + number
            number = size_of(block.entries + place)
            at[0] = b"s"
            memcpy(at + 1, &number, sizeof(number))
            memcpy(at + HEAD, block.text + block.entries[place].at, number)
        return packed

    def copy(self):
        cdef Names copy = Names.__new__(Names)
        copy.take(self)
        return copy

    def take(self, Names other not None):
        other.settle()
        other.block.users += 1
        leave(self.block)
        self.block = other.block

    def same(self, Names other not None):
        cdef Py_ssize_t place
        cdef entry_t *one
        cdef entry_t *two
        self.settle()
        other.settle()
        if self.block == other.block:
            return True
        if self.block.count != other.block.count or self.block.used != other.block.used:
            return False
        for place in range(self.block.count):
            one, two = self.block.entries + place, other.block.entries + place
            if size_of(one) != size_of(two) or memcmp(
                self.block.text + one.at, other.block.text + two.at, size_of(one)
            ):
                return False
        return True
