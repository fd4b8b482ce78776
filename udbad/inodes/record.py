"""What a mount knows, in memory that outlives its process: a log that its successor can read.

The memory is that of a memfd, which a keeper holds as well. An entry is appended by storing it, and then the end of the
log, one aligned word; so whoever is killed between any two instructions leaves a log that ends before what one
operation has changed or after it. The last entry about an object counts. When entries that do not count have become
many, all that there is is written anew into the other half of the file, some of it at each `flush`, and what changes
meanwhile into both; another aligned word then says that the other half is the log.

What is in an entry is not known here (journal.py), but for one word: a count that is changed in place (`count`).

Layout, numbers in the machine's order: words of 8 bytes MAGIC, STATE (version << 32 | half), END of either half, NOTES
(length << 1 | which), HUNG (process << 32 | 1 + index of a branch), SILENT (a bit for each further one, by its index;
whoever does not know it loses a time-out at most); two areas for notes; from SLOTS_AT on what edge/once.py keeps there;
from LOG_AT on the halves, HALF_STRIDE bytes apart, most of them never touched. An entry: length in bytes, the count,
payload, up to the next word.
Event loop only.
"""

from __future__ import annotations

import marshal
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Final, Protocol, TypeVar

VERSION: Final = 1
"""Of what is in the record: this layout, the entries of journal.py, the slots of edge/once.py, and what
mount/handover.py says. Whoever changes one of them makes it one more, and has the version before still be read and
written: it is written for a successor that reads no later one (`Record.write_as`), and journal.py and recall.py go by
`Record.version`."""
READ: Final = frozenset({VERSION})
"""Versions that can be read. Who meets another one says so and leaves it as it is."""
WRITTEN: Final = READ
"""Versions that can be written."""
SLOTS_AT: Final = 4096
LOG_AT: Final = 65536
HALF_STRIDE: Final = 1 << 38
_MAGIC: Final = int.from_bytes(b"udbadrec", "little")
_STATE, _END, _NOTES, _HUNG, _SILENT = 1, 2, 4, 5, 6
"""Numbers of words; the end of the second half is after that of the first."""
_NOTES_AT: Final = 64
_NOTES_SIZE: Final = (SLOTS_AT - _NOTES_AT) // 2
_ENTRY = struct.Struct("=QQ")
_CHUNK: Final = 1 << 22
"""Bytes that a half gets at a time; memory is used for what is written."""
_UNBOUNDED: Final = 1 << 62
_PORTION: Final = 256
"""Objects that one `flush` writes anew, which takes less than a millisecond."""
DROPPED: Final = (1 << 64) - 1
"""As a count: what the entry is about is gone."""
_MARSHAL: Final = 2
"""Format of marshal that every Python 3 reads and that is quickest to write."""

Words = memoryview
"""Words of 8 bytes."""
unpack: Callable[[bytes], Any] = marshal.loads
Scanned = TypeVar("Scanned")


def pack(value: Any) -> bytes:
    """Numbers, bytes, None, and tuples, lists and dictionaries of them as bytes, for `unpack`."""
    return marshal.dumps(value, _MARSHAL)


def tuple_of(count: int) -> bytes:
    """What makes so many packed values that follow the `pack` of a tuple: what is large need not be copied for it."""
    return b"(" + count.to_bytes(4, "little")


class UnreadableRecord(Exception):
    """There is no state in it, or one of another version."""


def condemned(fd: int) -> tuple[int, list[int]] | None:
    """Of a record, which may be empty: the process that was killed for a branch, of which a thread may wait for that
    still, and the indexes of the branches that did not answer then; None when it was not killed. Raises OSError."""
    head = os.pread(fd, (_SILENT + 1) * 8, 0)
    words = memoryview(head).cast("Q") if len(head) == (_SILENT + 1) * 8 else ()
    if not words or words[0] != _MAGIC or not words[_HUNG]:
        return None
    others = [index for index in range(64) if words[_SILENT] >> index & 1]
    return words[_HUNG] >> 32, [(words[_HUNG] & (1 << 32) - 1) - 1, *others]


class Counted(Protocol):
    """An object whose references are counted in place. place: number of the word, 0: it has none."""

    nlookup: int
    place: int


class Half:
    """One half of the file, as a log."""

    __slots__ = ("_fd", "_room", "end_word", "ends", "memory", "most", "number", "pending", "words")

    def __init__(self, fd: int, ends: Words, number: int) -> None:
        """ends: the words of the file's beginning."""
        self._fd = fd
        self.ends = ends
        self.number = number
        self.end_word = _END + number
        self.most = 0
        """Bytes from which on it is worth writing all anew."""
        self.pending = 0
        """The end of what was written and not published, 0: there is nothing."""
        self._room = 0
        self._extend(self.end)

    @property
    def end(self) -> int:
        """Bytes of the log."""
        return self.ends[self.end_word]

    def _extend(self, end: int) -> None:
        """Have room for entries up to `end`. Raises OSError."""
        start = LOG_AT + self.number * HALF_STRIDE
        room = max(end + _CHUNK, 2 * self._room) // _CHUNK * _CHUNK
        if os.fstat(self._fd).st_size < start + room:
            os.ftruncate(self._fd, start + room)
        self.memory = mmap.mmap(self._fd, room, offset=start)
        self.words = memoryview(self.memory).cast("Q")
        self._room = room

    def append(self, parts: Sequence[bytes]) -> int:
        """Write an entry. Returns the number of the word with its count; who reads the log knows of it from `publish`
        on. Raises OSError."""
        end = at = self.pending or self.end
        after = end + sum(map(len, parts))
        if after > self._room:
            self._extend(after)
        for part in parts:
            self.memory[at : at + len(part)] = part
            at += len(part)
        self.pending = after + 7 & ~7
        return (end >> 3) + 1

    def copy(self, other: Half) -> None:
        """Have the log of another one. Raises OSError."""
        end = other.end
        self._extend(end)
        with memoryview(self.memory) as to, memoryview(other.memory) as of:
            to[:end] = of[:end]
        self.ends[self.end_word] = end

    def publish(self) -> None:
        """One operation may change several objects: all of that is in the log at once."""
        if self.pending:
            self.ends[self.end_word] = self.pending
            self.pending = 0

    def empty(self) -> None:
        """Begin anew, and give back the memory."""
        self.pending = 0
        self.ends[self.end_word] = 0
        self.memory.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        self.words.release()
        self.memory.close()

    def entries(self) -> Iterator[tuple[bytes, int]]:
        at, end, data = 0, self.end, self.memory
        while at < end:
            size, count = _ENTRY.unpack_from(data, at)
            at += _ENTRY.size
            yield data[at : at + size], count
            at = at + size + 7 & ~7


class Record:
    """The record of one mount.

    fd: of the memfd, which whoever is to outlive us has to hold. slots: what edge/once.py keeps in it.
    """

    def __init__(self, fd: int) -> None:
        """fd: of a memfd of ours from now on, as `create` makes it."""
        self.fd = fd
        self._head = mmap.mmap(fd, LOG_AT)
        self._words = memoryview(self._head).cast("Q")
        self.slots = memoryview(self._head)[SLOTS_AT:]
        self.version = self._words[_STATE] >> 32 or VERSION
        """Of what is in it."""
        self._half = Half(fd, self._words, self._words[_STATE] & 1)
        self._next: Half | None = None
        """The half that all is being written to anew."""
        self._rest: Iterator[Any] = iter(())
        """What is still to be written there."""
        self._moving = False
        """What is written is for that half alone."""
        self.changed: set[Any] = set()
        """What is not in the log as it is now. Whoever changes an object puts it here, before the next `flush`."""
        self.write: Callable[[Any], None] = lambda one: None
        """Appends what there is to be known of an object; replaced by journal.py, and so are the next ones."""
        self.quick: Callable[[set[Any], Half], bool] | None = None
        """Writes to a half some of what has changed, and takes it out of that; for speed, if there is one. False when
        something is left to be done; what was written may not be published then."""
        self.words: Words | None = None
        """Where the counts are that may be changed in place; None while they are written anew."""
        self.live: Callable[[], Iterable[Any]] = lambda: ()
        """All objects there are, and that may change meanwhile."""
        self.rewritten = 0
        """How many times all was written anew."""

    @classmethod
    def create(cls) -> Record:
        """An empty one; nobody can read it before the first `rewrite`. Raises OSError."""
        fd = os.memfd_create("udbad record", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, LOG_AT)
            os.pwrite(fd, struct.pack("=Q", _MAGIC), 0)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int) -> Record:
        """The record of a predecessor; fd: ours from now on, unless this raises. Raises UnreadableRecord, OSError.

        Nothing may be written to it before `rewrite`, and until that has returned it stays as it is.
        """
        head = os.pread(fd, 16, 0)
        magic, state = struct.unpack("=QQ", head) if len(head) == 16 else (0, 0)
        if magic != _MAGIC:
            raise UnreadableRecord("it is no record")
        if state >> 32 not in READ:
            known = ", ".join(map(str, sorted(READ)))
            raise UnreadableRecord(f"it has version {state >> 32}, and {known} is what can be read")
        return cls(fd)

    def close(self) -> None:
        """Nothing is written any more. The memory lives as long as somebody has a descriptor of it."""
        self.changed = set()
        self.words = self.quick = None
        self.write = self.live = None  # type: ignore[assignment]  # nothing keeps the tables alive
        for half in (self._half, self._next):
            if half is not None:
                half.close()
        self._words.release()
        with suppress(BufferError):  # somebody uses the slots still: it goes with their last use
            self.slots.release()
            self._head.close()
        os.close(self.fd)

    # -- what is written ----------------------------------------------------------------------------

    def flush(self) -> None:
        """Write what has changed; to be called before an answer that depends on it is given.

        `changed` tells whether there is anything. Raises OSError when there is no room; then nobody can read the record
        until a later `flush` has written all anew.
        """
        try:
            if self.words is None or self.quick is None or not self.quick(self.changed, self._half):
                self._write_rest()
        except Exception:
            self._words[_STATE] = 0
            self._next = self.words = None
            self._half.most = 0
            raise

    def _write_rest(self) -> None:
        ones = list(self.changed)
        self.changed.clear()  # and not one by one: a set that was large once takes long to look through
        for one in ones:
            self.write(one)
        self._half.publish()
        if self._next is not None:
            self._move(whole=False)
        else:
            self.words = self._half.words  # there may be more of them
            if self._half.end > self._half.most:
                self._begin()

    def append(self, *payload: bytes, count: int = 0) -> int:
        """One more entry, for `write`, of parts that may be large; returned is its place, for `Counted`. Raises
        OSError."""
        entry = (_ENTRY.pack(sum(map(len, payload)), count), *payload)
        if self._next is None:
            return self._half.append(entry)
        if not self._moving:
            self._half.append(entry)
        return self._next.append(entry)

    def count(self, node: Counted) -> None:
        """The references of a node are others now; they are in the record before this returns or with the `flush`."""
        words = self.words
        if words is not None and node.place:
            words[node.place] = max(node.nlookup, 0)
        else:
            self.changed.add(node)

    def drop(self, node: Counted) -> None:
        """A node is gone, to which the kernel has no reference; as for `count`."""
        words = self.words
        if words is not None and node.place:
            words[node.place] = DROPPED
        else:
            self.changed.add(node)

    def rewrite(self) -> None:
        """Write all there is anew, and have nothing else in the record. Raises OSError."""
        self._begin()
        self._move(whole=True)

    def copy(self, other: Record) -> None:
        """Have the log of a predecessor, of the same version, before anything else; for `go_on`. Raises OSError."""
        self._half.copy(other._half)
        self._half.most = _UNBOUNDED
        self.words = self._half.words

    def go_on(self) -> None:
        """Go on with what was copied and what has changed. It is not written anew before `bound`. Raises OSError."""
        self.flush()
        self._words[_STATE] = self.version << 32 | self._half.number

    def bound(self, live: int) -> None:
        """Write the log anew when it has become large; live: bytes of it that count."""
        self._half.most = max(_CHUNK, 3 * live)

    def write_as(self, versions: Iterable[int]) -> None:
        """Write all anew, and what comes in the same way, so that who reads these versions can go on with it.

        Raises UnreadableRecord when none of them can be written; OSError.
        """
        possible = WRITTEN.intersection(versions)
        if not possible:
            raise UnreadableRecord(f"none of the versions {', '.join(map(str, versions))} can be written")
        if self.version != max(possible):
            self.version = max(possible)
            self.rewrite()

    def _begin(self) -> None:
        self.words = None
        self._next = Half(self.fd, self._words, 1 - self._half.number)
        self._next.empty()
        self._rest = iter(self.live())

    def _move(self, whole: bool) -> None:
        """Write some objects anew, or all that are left, and go over to the new half when there are no more."""
        assert self._next is not None
        self._moving = True
        try:
            while portion := set(islice(self._rest, _PORTION)):
                self._next.publish()
                if self.quick is not None:
                    self.quick(portion, self._next)
                for one in portion:
                    self.write(one)
                if not whole:
                    return
        finally:
            self._moving = False
            self._next.publish()
        old, self._half, self._next = self._half, self._next, None
        self._words[_STATE] = self.version << 32 | self._half.number
        self.words = self._half.words
        old.empty()
        self.bound(self._half.end)
        self.rewritten += 1

    # -- what is read ---------------------------------------------------------------------------------

    def entries(self) -> Iterator[tuple[bytes, int]]:
        """Payload and count of every entry, in the order in which they were written."""
        return self._half.entries()

    def scan(self, work: Callable[..., Scanned], *arguments: Any) -> Scanned:
        """What `work` makes of the memory of the log and its size, and of these arguments."""
        return work(self._half.memory, self._half.end, *arguments)

    @property
    def size(self) -> int:
        """Bytes of the log."""
        return self._half.end

    @property
    def memory_used(self) -> int:
        """Bytes of memory that it takes."""
        return os.fstat(self.fd).st_blocks * 512

    # -- why its process was killed -------------------------------------------------------------------

    def condemn(self, pid: int, index: int, others: Iterable[int] = ()) -> None:
        """Process `pid`, which writes this, is about to be killed: the branch of that index does not answer
        (mount/watchdog.py), and neither do `others`, of which the first 64 branches can be told."""
        self._words[_SILENT] = sum(1 << other for other in others if other < 64)
        self._words[_HUNG] = pid << 32 | index + 1

    # -- small facts ------------------------------------------------------------------------------------

    def note(self, name: str, value: bytes) -> None:
        """Keep something small under a name, in place of what it was. Raises ValueError when there is no room."""
        notes = self._read_notes()
        notes[name.encode()] = value
        data = pack(notes)
        if len(data) > _NOTES_SIZE:
            raise ValueError(f"no room for note {name}")
        which = 1 - (self._words[_NOTES] & 1)
        at = _NOTES_AT + which * _NOTES_SIZE
        self._head[at : at + len(data)] = data
        self._words[_NOTES] = len(data) << 1 | which

    def noted(self, name: str) -> bytes | None:
        return self._read_notes().get(name.encode())

    def _read_notes(self) -> dict[bytes, bytes]:
        word = self._words[_NOTES]
        at = _NOTES_AT + (word & 1) * _NOTES_SIZE
        data = self._head[at : at + (word >> 1)]
        notes: dict[bytes, bytes] = unpack(data) if data else {}
        return notes
