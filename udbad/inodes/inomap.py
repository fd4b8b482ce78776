"""Inode numbers of the mount: (st_dev, st_ino) of a branch object to one stable 64 bit number.

Layout, the same idea as gocryptfs' inomap: bits 48 to 62 are a small index of the branch file system
in order of appearance, bits 0 to 47 its own inode number. So numbers cost no memory, hold for the
life of the mount, and on a union of one file system are the numbers people know. What does not fit
(an inode above 2**48, a clash) gets a number with the spill bit 63 set and an entry in a table, and
so does every object that inherits another one's number: a copied-up file keeps the number that its
lower copy had (spec section 10.1).

Invariant: 0 and 1 are never handed out; 1 is the root of the mount.
"""

from __future__ import annotations

_INO_BITS = 48
_INO_LIMIT = 1 << _INO_BITS
_MAX_FS = 1 << 15
_SPILL = 1 << 63

Identity = tuple[int, int]
"""(st_dev, st_ino): who a branch object is, valid while something keeps the inode from being reused."""


def branch_ino(number: int) -> int:
    """The branch's own inode number that a number of the mount was computed from; 0 for one out of the table."""
    return number & (_INO_LIMIT - 1) if number < _SPILL else 0


class InoMap:
    """Numbers for branch objects. No I/O, no locking: used from the event loop only."""

    __slots__ = ("_base", "_exceptions", "_next_spill")

    def __init__(self) -> None:
        self._base: dict[int, int] = {}
        self._exceptions: dict[Identity, int] = {}
        self._next_spill = _SPILL + 2

    def number(self, dev: int, ino: int) -> int:
        """The mount's inode number of a branch object; the same until `drop` or `alias` says otherwise."""
        if self._exceptions:
            number = self._exceptions.get((dev, ino))
            if number is not None:
                return number
        base = self._base.get(dev)
        if base is None:
            if len(self._base) >= _MAX_FS:
                return self.fresh(dev, ino)
            base = self._base[dev] = len(self._base) << _INO_BITS
        if 1 < ino < _INO_LIMIT:
            return base + ino
        return self.fresh(dev, ino)

    def alias(self, dev: int, ino: int, number: int) -> None:
        """Let this object answer with a number that already exists (copy-up, a new upper directory)."""
        if self.number(dev, ino) != number:
            self._exceptions[(dev, ino)] = number

    def fresh(self, dev: int, ino: int) -> int:
        """A number nobody had before, because the computed one is taken by an object still in use."""
        number = self._exceptions[(dev, ino)] = self._next_spill
        self._next_spill += 1
        return number

    def drop(self, dev: int, ino: int) -> None:
        """The object is gone for good; its branch inode may be reused for another one."""
        self._exceptions.pop((dev, ino), None)

    def __len__(self) -> int:
        """How many objects need a table entry."""
        return len(self._exceptions)
