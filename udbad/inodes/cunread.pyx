# Nodes of a record that are made when somebody asks for them, and the rest of them some at a time; used where the hot modules
# are compiled. What an entry says, and what is made of it, is as in union/recall.py, which reads whatever is left to it.
#
# Rule: who gets a node by its id gets it with all above it, and with all that is known below it by name. So a directory whose
# `children` somebody uses has them all, but for those that were come by as children of another one: they are asked for by
# their id before anything that is in them counts, since the kernel was made to forget all names before it asks.

from cpython.array cimport array, clone
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy

from udbad.inodes.cjournal cimport HEAD, node_entry
from udbad.inodes.node cimport Dir, Layer, Node
from udbad.inodes.table cimport InodeTable

from stat import S_IFLNK

from udbad.inodes.inomap import SHORT, SPARE, SPILL
from udbad.inodes.journal import DIRECTORY, FILE, GONE, LISTINGS, NEGATIVES, listings
from udbad.inodes.record import DROPPED, unpack
from udbad.types import ROOT_ID

VERSION = 1
"""Of records that are read here."""

cdef uint64_t _NOWHERE = <uint64_t>-1
cdef uint32_t _NONE = <uint32_t>-1
cdef uint64_t _DROPPED = DROPPED, _ROOT = ROOT_ID
cdef uint8_t _FILE = FILE, _DIRECTORY = DIRECTORY, _GONE = GONE, _LISTINGS = LISTINGS, _NEGATIVES = NEGATIVES
cdef uint64_t _SHORT = SHORT, _SPARE = SPARE, _SPILL = SPILL
cdef unsigned int _S_IFLNK = S_IFLNK
cdef array _NUMBERS = array("Q")

cdef enum:
    UNREAD, MADE, WHOLE  # of what is in a directory that is only made, there may be nodes that are not

cdef struct slot:
    uint64_t id, parent
    uint64_t at, listings  # where the last entry of each is, or _NOWHERE
    uint32_t first, next  # the slots of what is in it, and of what is beside it
    uint8_t state, kind

cdef struct reader:
    const uint8_t *at
    const uint8_t *end
    bint failed


# -- what marshal.dumps(..., 2) writes of what journal.py packs --------------------------------------------------------

cdef uint8_t take_byte(reader *it) noexcept:
    if it.at >= it.end:
        it.failed = True
        return 0
    it.at += 1
    return it.at[-1]


cdef int32_t take_int(reader *it) noexcept:
    cdef int32_t value = 0
    if it.end - it.at < 4:
        it.failed = True
        return 0
    memcpy(&value, it.at, 4)
    it.at += 4
    return value


cdef int64_t take_number(reader *it) noexcept:
    """A number, or whether something is true; of a number of 64 bits without a sign its bits."""
    cdef uint8_t kind = take_byte(it)
    cdef int32_t count, place, digit_place
    cdef uint16_t digit = 0
    cdef uint64_t value = 0
    if kind == c"i":
        return take_int(it)
    if kind == c"T":
        return 1
    if kind == c"F":
        return 0
    if kind != c"l":
        it.failed = True
        return 0
    count = take_int(it)
    place = -count if count < 0 else count
    if place > 5 or it.end - it.at < 2 * place:
        it.failed = True
        return 0
    for digit_place in range(place):
        memcpy(&digit, it.at + 2 * digit_place, 2)
        value |= <uint64_t>digit << 15 * digit_place
    it.at += 2 * place
    return <int64_t>(-value if count < 0 else value)


cdef int take_sequence(reader *it, uint8_t kind) noexcept:
    """How many there are in it."""
    cdef int32_t count
    if take_byte(it) != kind:
        it.failed = True
        return 0
    count = take_int(it)
    if count < 0:
        it.failed = True
    return count


cdef object take_bytes(reader *it):
    cdef int32_t size
    if take_byte(it) != c"s":
        it.failed = True
        return b""
    size = take_int(it)
    if size < 0 or size > it.end - it.at:
        it.failed = True
        return b""
    it.at += size
    return PyBytes_FromStringAndSize(<const char *>it.at - size, size)


cdef object take_optional(reader *it):
    if it.at < it.end and it.at[0] == c"N":
        it.at += 1
        return None
    return take_number(it)


cdef uint64_t entry_at(const uint8_t *memory, uint64_t size, uint64_t at) except 0:
    """Where the next one is."""
    cdef uint64_t payload
    if at + HEAD > size:
        raise ValueError("an entry goes on behind the log")
    payload = (<node_entry *>&memory[at]).size
    if not 0 < payload <= size - at - HEAD:
        raise ValueError("an entry goes on behind the log")
    return (at + HEAD + payload + 7) & ~<uint64_t>7


# -- the nodes ---------------------------------------------------------------------------------------------------------

cdef class Unread:
    cdef const uint8_t[::1] view
    cdef const uint8_t *memory
    cdef uint64_t size
    cdef slot *slots
    cdef uint32_t *buckets
    cdef uint32_t count, room, shift, next
    cdef uint64_t live
    cdef list negatives_at, unknown
    cdef InodeTable table
    cdef dict branches
    cdef object make_other, taken
    cdef bint forgot

    def __cinit__(self):
        self.slots, self.buckets, self.count, self.room = NULL, NULL, 0, 0

    def __init__(self, const uint8_t[::1] memory not None, uint64_t size, InodeTable table not None,
                 dict branches not None, make_other, taken):
        if size > <uint64_t>memory.shape[0]:
            raise ValueError("the log is longer than its memory")
        self.view, self.size, self.next = memory, size, 0
        self.memory = &memory[0] if memory.shape[0] else NULL
        self.table, self.branches, self.make_other, self.taken = table, branches, make_other, taken
        self.negatives_at, self.unknown, self.live, self.forgot = [], [], 0, False
        self.grow(1 << 10)

    def __dealloc__(self):
        free(self.slots)
        free(self.buckets)

    def __len__(self):
        return self.count

    @property
    def live_bytes(self):
        return self.live

    # -- by id

    cdef int grow(self, uint32_t room) except -1:
        cdef uint32_t one, bits = 1
        cdef slot *slots = <slot *>realloc(self.slots, room * sizeof(slot))
        if slots == NULL:
            raise MemoryError
        self.slots, self.room = slots, room
        while (<uint64_t>1 << bits) < 2 * <uint64_t>room:
            bits += 1
        free(self.buckets)
        self.buckets = <uint32_t *>calloc(<size_t>1 << bits, sizeof(uint32_t))
        if self.buckets == NULL:
            raise MemoryError
        self.shift = 64 - bits
        for one in range(self.count):
            self.buckets[self.bucket(self.slots[one].id)] = one + 1
        return 0

    cdef uint64_t bucket(self, uint64_t number) noexcept:
        """Where the slot of an id is, or belongs."""
        cdef uint64_t most = (<uint64_t>1 << (64 - self.shift)) - 1
        cdef uint64_t at = number * <uint64_t>0x9E3779B97F4A7C15 >> self.shift
        while self.buckets[at] and self.slots[self.buckets[at] - 1].id != number:
            at = (at + 1) & most
        return at

    cdef slot *known(self, uint64_t number) noexcept:
        """NULL: the record does not have it."""
        cdef uint32_t found = self.buckets[self.bucket(number)]
        return &self.slots[found - 1] if found else NULL

    cdef slot *entered(self, uint64_t number) except NULL:
        cdef uint64_t at
        cdef slot *one = self.known(number)
        if one != NULL:
            return one
        if self.count == self.room:
            self.grow(2 * self.room)
        at = self.bucket(number)
        one = &self.slots[self.count]
        self.count += 1
        self.buckets[at] = self.count
        one.id, one.parent, one.at, one.listings = number, 0, _NOWHERE, _NOWHERE
        one.first = one.next = _NONE
        one.state, one.kind = UNREAD, 0
        return one

    # -- reading

    cdef node_entry *entry(self, uint64_t at) noexcept:
        return <node_entry *>&self.memory[at]

    cdef object payload(self, uint64_t at):
        return PyBytes_FromStringAndSize(<const char *>&self.memory[at + HEAD], self.entry(at).size)

    cdef reader read(self, uint64_t at) noexcept:
        """What is packed behind the kind of an entry."""
        cdef reader it
        it.at = &self.memory[at + HEAD + 1]
        it.end = &self.memory[at + HEAD] + self.entry(at).size
        it.failed = False
        return it

    def scan(self, other):
        cdef uint64_t at = 0, after, number, parent
        cdef node_entry *entry
        cdef slot *one
        cdef reader it
        while at < self.size:
            after = entry_at(self.memory, self.size, at)
            entry = self.entry(at)
            if entry.kind == _FILE and entry.size >= sizeof(node_entry) - HEAD + entry.name_size:
                one = self.entered(entry.id)
                one.parent, one.at, one.kind = entry.parent, at, _FILE
            elif entry.kind in (_DIRECTORY, _GONE, _LISTINGS):
                it = self.read(at)
                if entry.kind != _GONE:
                    take_sequence(&it, c"(")
                number = <uint64_t>take_number(&it)
                parent = <uint64_t>take_number(&it) if entry.kind == _DIRECTORY else 0
                if it.failed:
                    raise ValueError("an entry that cannot be read")
                one = self.entered(number)
                if entry.kind == _LISTINGS:
                    one.listings = at
                elif entry.kind == _GONE:
                    one.at = one.listings = _NOWHERE
                else:
                    if one.at != _NOWHERE and self.entry(one.at).count == _DROPPED:
                        one.listings = _NOWHERE  # of another one that had the number
                    one.parent, one.at, one.kind = parent, at, _DIRECTORY
            elif entry.kind == _NEGATIVES:
                self.negatives_at.append(at)
            else:
                other(self.payload(at), entry.count)
            at = after
        return self.connect()

    cdef object connect(self):
        """Have each find what is below it."""
        cdef uint32_t place = self.count
        cdef slot *one
        cdef slot *above
        cdef node_entry *entry
        cdef list rest = []
        while place:
            place -= 1
            one = &self.slots[place]
            if one.at == _NOWHERE or self.entry(one.at).count == _DROPPED:
                one.state = WHOLE
                continue
            entry = self.entry(one.at)
            self.live += HEAD + entry.size
            if one.listings != _NOWHERE:
                self.live += HEAD + self.entry(one.listings).size
            above = self.above(one)
            if above != NULL:
                one.next, above.first = above.first, place
            if one.kind == _FILE and entry.size > sizeof(node_entry) - HEAD + entry.name_size:
                rest.append(one.id)
        return rest

    # -- making

    cdef int make(self, slot *one) except -1:
        """Make a node, but for its name."""
        cdef node_entry *entry = self.entry(one.at)
        cdef Node node = None
        one.state = WHOLE if one.kind == _FILE else MADE
        if self.table.nodes.get(one.id) is not None and one.id != _ROOT:
            return 0
        if one.kind == _FILE:
            branch = self.branches.get(entry.branch)
            if branch is not None and entry.orphan_fd == -1 and (
                    entry.size == sizeof(node_entry) - HEAD + entry.name_size):
                node = Node(entry.id, entry.type, branch, entry.dev, entry.ino)
                node.name = PyBytes_FromStringAndSize(<char *>entry + sizeof(node_entry), entry.name_size)
                node.nlink_extra, node.dead = entry.links, entry.dead != 0
        elif one.id != _ROOT:
            node = self.directory(one)
        if node is None:
            node = self.make_other(self.payload(one.at), entry.count)
        else:
            self.table.nodes.add(node)
        node.nlookup = <int64_t>entry.count
        node.place = (one.at >> 3) + 1
        if one.listings != _NOWHERE and type(node) is Dir:
            _, said, (<Dir>node).room = unpack(self.payload(one.listings)[1:])
            (<Dir>node).listings = listings(said)
        if node.nlookup <= 0:
            self.unknown.append(node)
        return 0

    cdef Dir directory(self, slot *one):
        """None: it is not for here."""
        cdef reader it = self.read(one.at)
        cdef Dir node
        cdef Layer layer
        cdef list layers = []
        cdef int32_t fd
        cdef int count
        cdef long long index = -1, held = 0
        take_sequence(&it, c"(")
        take_number(&it)
        take_number(&it)
        name = take_bytes(&it)
        dead, links, floor, opaque = take_number(&it), take_number(&it), take_number(&it), take_optional(&it)
        offset, listed = take_number(&it), take_number(&it)
        count = take_sequence(&it, c"[")
        for _ in range(count):
            take_sequence(&it, c"(")
            branch = self.branches.get(take_number(&it))
            dev, ino, nlink = <uint64_t>take_number(&it), <uint64_t>take_number(&it), take_number(&it)
            fd = <int32_t>take_number(&it)
            # The branches may have another order by now; and a number of 0 is for what may be there or not.
            if it.failed or branch is None or not ino or branch.index <= index:
                return None
            index = branch.index
            layers.append(Layer(branch, dev, ino, nlink, fd))
        if it.failed or not layers:
            return None
        for layer in layers:
            if layer.fd >= 0:
                layer.fd = self.taken(layer.fd, (layer.dev, layer.ino))
                held += layer.fd >= 0
        node = Dir(one.id, layers)
        node.name, node.dead, node.nlink_extra, node.floor = name, dead != 0, links, floor
        node.opaque, node.mtime_offset, node.listed = opaque, offset, listed != 0 and not self.forgot
        if held:
            self.table.open_fds += held
            self.table.note_fds(node)
        return node

    cdef int fill(self, slot *one) except -1:
        """Make what is in a directory that is made, and give it its names there."""
        cdef uint32_t place = one.first
        cdef slot *below
        cdef Node child
        cdef Dir node
        cdef dict before
        one.state = WHOLE
        above = self.table.nodes.get(one.id)
        if type(above) is not Dir:
            return 0
        node = above
        before = dict(node.children) if node.children else None
        while place != _NONE:
            below = &self.slots[place]
            if below.state == UNREAD:
                self.make(below)
                child = self.table.nodes.get(below.id)
                if child is not None and child.parent is None:
                    child.parent = node
                    node.children[child.name] = child
            place = below.next
        if before:
            node.children.update(before)
        return 0

    cdef slot *above(self, slot *one) noexcept:
        """The directory that a node is in; NULL where the record has none."""
        cdef slot *found = self.known(one.parent) if one.parent else NULL
        return found if found != NULL and found.kind == _DIRECTORY and found.at != _NOWHERE else NULL

    cdef int ask(self, slot *one) except -1:
        """Have a node made, all above it, and all that is in them."""
        cdef list way = []
        cdef slot *current = one
        cdef slot *above
        while current.state == UNREAD:
            way.append(current - self.slots)
            above = self.above(current)
            if above == NULL or <uint32_t>len(way) >= self.count:  # the latter: it would be no tree
                break
            current = above
        if current.state == MADE:
            self.fill(current)
        for place in reversed(way):
            current = &self.slots[<uint32_t>place]
            if current.state == UNREAD:
                self.make(current)
            if current.state == MADE:
                self.fill(current)
        return 0

    def find(self, number):
        cdef slot *one = self.known(number)
        if one != NULL and one.state != WHOLE:
            self.ask(one)
        return self.table.nodes.get(number)

    def has(self, number):
        cdef slot *one = self.known(number)
        return one != NULL and one.state == UNREAD

    def some(self, uint32_t most):
        cdef uint32_t end = min(self.next + most, self.count)
        while self.next < end:
            if self.slots[self.next].state != WHOLE:
                self.ask(&self.slots[self.next])
            self.next += 1
        if self.next < self.count:
            return True
        for node in self.unknown:
            if node.nlookup <= 0 and not node.handles:
                self.table.not_sent(node)
        self.unknown = []
        if not self.forgot:
            self.name_negatives()
        return False

    cdef int name_negatives(self) except -1:
        """Say which names the kernel was told not to exist."""
        for at in self.negatives_at:
            number, names = unpack(self.payload(at)[1:])
            node = self.table.nodes.get(number)
            if type(node) is Dir:
                (<Dir>node).negatives = set(names).union((<Dir>node).negatives or ())
        return 0

    # -- what the kernel has to forget

    def forgotten(self, bint pages):
        cdef uint32_t place
        cdef uint64_t number
        cdef slot *one
        cdef array with_pages = clone(_NUMBERS, self.count, False), rest = clone(_NUMBERS, self.count, False)
        cdef Py_ssize_t many = 0, few = 0
        for place in range(self.count):
            one = &self.slots[place]
            if one.state != UNREAD:
                continue
            if pages or one.kind == _DIRECTORY or self.entry(one.at).type == _S_IFLNK:
                with_pages.data.as_ulonglongs[many] = one.id
                many += 1
            else:
                rest.data.as_ulonglongs[few] = one.id
                few += 1
        self.forgot = True
        return with_pages[:many], rest[:few]

    def spare(self):
        cdef uint32_t place
        cdef uint64_t number
        cdef list found = []
        for place in range(self.count):
            number = self.slots[place].id
            if number >= _SPILL or _SPARE <= number < _SHORT:
                found.append(number)
        return found
