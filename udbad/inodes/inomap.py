"""Inode numbers of the mount: (st_dev, st_ino) of a branch object to one stable number.

They are below 2**32 as long as those of the branches are, because stat(2) of a program without large files knows no
others (EOVERFLOW): the 32 bits are divided into as many equal areas as there are file systems at the mount (a power of
two of them). An object has its own number in the area of its file system. Areas are taken in bit-reversed order (none,
the upper half, the second quarter, the fourth, …), so that a number that fits stays the same when a file system more
divides them again. What does not fit gets `[file system index + 1 | its number]`, from bit 48 on. So numbers cost no
memory, are never given twice, hold in the next mount, and on a union of one file system are the numbers people know.

What fits nowhere (an inode above 2**48), and an object whose number is still another one's, gets a spare number and an
entry in a table, and so does every object that inherits another one's number: a copied-up file keeps the number that
its lower copy had (semantics 10.1). Spare ones are the last 2**24 below 2**32, then those from 2**63 on.

Invariant: 0 and 1 are never handed out; 1 is the root of the mount.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from udbad.inodes.record import Record

_SHORT_BITS = 32
SHORT = 1 << _SHORT_BITS
SPARE = SHORT - (1 << 24)
_MIN_AREA_BITS = 26
_INO_BITS = 48
_INO_LIMIT = 1 << _INO_BITS
_MAX_FS = (1 << 15) - 1
SPILL = 1 << 63
ENTRIES = 1 << 16
"""Entries of the table (some 200 bytes each) from which on it is worth looking for those that nobody needs."""

Number = int
Identity = tuple[int, int]
"""(st_dev, st_ino): who a branch object is, valid while something keeps the inode from being reused."""


class InoMap:
    """Numbers for branch objects. No I/O, no locking: used from the event loop only."""

    __slots__ = (
        "_area_bits",
        "_base",
        "_exceptions",
        "_index",
        "_inos",
        "_limit",
        "_most",
        "_next_spare",
        "in_use",
        "record",
    )

    def __init__(self, file_systems: int = 1) -> None:
        """file_systems: how many the branches of the mount are on at its start; more may come."""
        self._area_bits = max(_SHORT_BITS - (file_systems - 1).bit_length(), _MIN_AREA_BITS)
        self._limit = (1 << self._area_bits) - (SHORT - SPARE)
        """From here on a branch's number does not fit into an area; less than its size, for the last has the spares."""
        self._base: dict[int, int] = {}
        self._index: dict[int, int] = {}
        self._exceptions: dict[Identity, int] = {}
        self._inos: set[int] = set()
        """Those of all exceptions, and maybe others: that is less to look for than a tuple."""
        self._next_spare = SPARE
        self._most = ENTRIES
        self.in_use: Callable[[int], bool] = lambda number: True
        """Whether anybody knows an object by this number; replaced by the tree, which knows."""
        self.record: Record | None = None
        """As in InodeTable."""

    def number(self, dev: Number, ino: Number) -> int:
        """The mount's inode number of a branch object; the same until `drop` or `alias` says otherwise."""
        if ino in self._inos:
            number = self._exceptions.get((dev, ino))
            if number is not None:
                return number
        base = self._base.get(dev)
        if base is None:
            if len(self._base) >= _MAX_FS:
                return self.fresh(dev, ino)
            base = self._add(dev)
        if 1 < ino < self._limit:
            return base + ino
        if not 1 < ino < _INO_LIMIT:
            return self.fresh(dev, ino)
        index = self._index[dev]
        return ino if index == 0 and ino >= SHORT else index + 1 << _INO_BITS | ino

    def many(self, dev: int, count: int) -> tuple[int, int, set[int]]:
        """For who asks of `count` objects of one file system: (base, limit, exceptions).

        `number` is base plus what the branch says, where that is above 1, below the limit and no exception.
        """
        if len(self._exceptions) > count or dev not in self._base:
            return 0, 0, set()
        return self._base[dev], self._limit, {ino for device, ino in self._exceptions if device == dev}

    def _add(self, dev: int) -> int:
        """Where the numbers of one more file system begin."""
        index = self._index[dev] = len(self._index)
        if self.record is not None:
            self.record.changed.add(self)
        area = int(f"{index:0{_SHORT_BITS}b}"[::-1], 2)
        base = self._base[dev] = area if index < 1 << _SHORT_BITS - self._area_bits else index + 1 << _INO_BITS
        return base

    def branch_ino(self, number: int) -> int:
        """The branch's own inode number that a number of the mount is computed from; 0 for a spare one."""
        if number >= SPILL or SPARE <= number < SHORT:
            return 0
        return number & ((1 << (self._area_bits if number < SHORT else _INO_BITS)) - 1)

    def earlier_number(self, dev: int, ino: int) -> int:
        """The number that versions gave which had no areas in 32 bits: they are in names on branches; 0 for none."""
        index = self._index.get(dev)
        return 0 if index is None else (index << _INO_BITS) + ino

    def alias(self, dev: int, ino: int, number: int) -> None:
        """Let this object answer with a number that already exists (copy-up, a new upper directory)."""
        if self.number(dev, ino) != number:
            self._enter((dev, ino), number)

    def fresh(self, dev: int, ino: int) -> int:
        """A number nobody had before, because the computed one is taken by an object still in use."""
        number = self._next_spare
        if self.record is not None:
            self.record.changed.add(self)
        self._enter((dev, ino), number)
        self._next_spare = _after(number)
        return number

    def _enter(self, identity: Identity, number: int) -> None:
        """Put an entry into the table, which is cleared of those that nobody needs before it becomes large.

        What the kernel has forgotten may be gone, directly, without anybody's telling. If it is not, it has its own
        number from then on, as in the next mount.
        """
        if len(self._exceptions) >= self._most:
            in_use, before = self.in_use, self._exceptions
            self._exceptions = {key: entry for key, entry in before.items() if in_use(entry)}
            self._inos = {ino for _, ino in self._exceptions}
            if self.record is not None:
                self.record.changed |= before.keys() - self._exceptions.keys()
            self._most = max(2 * len(self._exceptions), ENTRIES)
        self._exceptions[identity] = number
        self._inos.add(identity[1])
        if self.record is not None:
            self.record.changed.add(identity)

    def drop(self, dev: int, ino: int) -> None:
        """The object is gone for good; its branch inode may be reused for another one."""
        if self._exceptions.pop((dev, ino), None) is not None and self.record is not None:
            self.record.changed.add((dev, ino))

    def entries(self) -> list[Identity]:
        """The objects that have an entry in the table."""
        return list(self._exceptions)

    def entry(self, identity: Identity) -> int:
        """The number in the table; 0 for none."""
        return self._exceptions.get(identity, 0)

    def state(self) -> tuple[int, int, list[int]]:
        """All but the table, for `restore`: bits of an area, next spare number, file systems in their order."""
        return self._area_bits, self._next_spare, list(self._index)

    def restore(self, state: tuple[int, int, Iterable[int]], table: dict[Identity, int]) -> None:
        """Give the same numbers as the one whose `state` and table these are."""
        self._area_bits, self._next_spare, devices = state
        self._limit = (1 << self._area_bits) - (SHORT - SPARE)
        self._base, self._index, self._exceptions = {}, {}, dict(table)
        self._inos = {ino for _, ino in table}
        for dev in devices:
            self._add(dev)

    def skip(self, numbers: Iterable[int]) -> None:
        """These are somebody's already, whatever the state says that is to come: after `restore`."""
        spare = [number for number in numbers if number >= SPARE and not self.branch_ino(number)]
        self._next_spare = max(self._next_spare, max(map(_after, spare), default=0))

    def __len__(self) -> int:
        """How many objects need a table entry."""
        return len(self._exceptions)


def _after(number: int) -> int:
    """The spare number that follows one."""
    return SPILL if number == SHORT - 2 else number + 1  # 2**32 - 1 is -1 to some
