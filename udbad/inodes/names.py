"""The names of a directory of the union, in order, each with where it is and what its branch directory said of it.

One container for what is kept of a directory (`Dir.view`) and for what somebody is reading (`OpenDir.names`). There may
be very many names, so where compiled it is a structure of C (cnames.pyx): the names one after the other, a table of
what is said of each, and an index of hashes. A copy costs nothing there until one of the two is changed. What is here
is what that means.
"""

from __future__ import annotations

import stat as st_mod
from collections.abc import Iterable, Iterator

from udbad import compiled
from udbad.branch import listing
from udbad.inodes.record import pack

Hit = int | tuple[int, ...]
"""Where a name is: the branch index of what is no directory; of a directory, those of all its branch directories."""

UNKNOWN = None
"""In the place of a Hit: the name has to be resolved before anything is said about it."""

Entry = tuple[Hit | None, int, int]
"""hit; inode number and type of the uppermost object as listing.read has them, type 0: not said."""

Odd = list[tuple[bytes, int, int]]
"""Names that may be marks, with inode number and type."""

MOST_BYTES = 4095
"""Of a name; the kernel takes none of more than FUSE_NAME_MAX, 1024."""
_MARK = b".wh."
_DIRECTORY, _DEVICE = st_mod.S_IFDIR >> 12, st_mod.S_IFCHR >> 12


class Names:
    """No two are the same, and none is empty. ValueError: a name that no file system has."""

    __slots__ = ("_entries", "_order")

    def __init__(self, names: Iterable[bytes] = ()) -> None:
        """names: of which nothing is known."""
        self._entries: dict[bytes, Entry] = {}
        self._order: list[bytes] | None = None
        for name in names:
            self[name] = UNKNOWN

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: bytes) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self._entries))

    def get(self, name: bytes, missing: Hit | None = None) -> Hit | None:
        """Where a name is; `missing` when it is not there."""
        entry = self._entries.get(name)
        return missing if entry is None else entry[0]

    def __setitem__(self, name: bytes, hit: Hit | None) -> None:
        """A name stands for something of which a branch directory has not been asked."""
        if not 0 < len(name) <= MOST_BYTES:
            raise ValueError(name)
        if name not in self._entries:
            self._order = None
        self._entries[name] = (hit, 0, 0)

    def discard(self, name: bytes) -> None:
        """The name is gone, if it was there."""
        if self._entries.pop(name, None) is not None:
            self._order = None

    def at(self, place: int) -> tuple[bytes, Hit | None, int, int]:
        """The name at a place in the order, counted from 0, and what is said of it. Raises IndexError."""
        if self._order is None:
            self._order = list(self._entries)
        if place < 0:
            raise IndexError(place)
        name = self._order[place]
        return name, *self._entries[name]

    def find(self, name: bytes) -> Entry | None:
        """What is said of a name; None when it is not there."""
        return self._entries.get(name)

    def hits(self) -> list[Hit | None]:
        """Of all names, in their order."""
        return [hit for hit, _, _ in self._entries.values()]

    # -- what branch directories say ------------------------------------------------------------------

    def read(self, fd: int, index: int, hidden: set[bytes], stacked: set[bytes] | None) -> Odd:
        """Add what a branch directory has, by a descriptor that is open for reading; index: of its branch, which is
        below all that were read before. Arguments as of `add`.

        Left out, and returned, is what may be a mark: names that begin as whiteouts do, and character devices. Raises
        OSError.
        """
        odd: Odd = []
        for name, number, kind in zip(*listing.read(fd), strict=True):
            if kind == _DEVICE or (len(name) > len(_MARK) and name.startswith(_MARK)):
                odd.append((name, number, kind))
            else:
                self.add(name, index, number, kind, hidden, stacked)
        return odd

    def add(
        self, name: bytes, index: int, number: int, kind: int, hidden: set[bytes], stacked: set[bytes] | None
    ) -> None:
        """Merge a name of one more branch directory, below those before (semantics 5).

        What is there already hides it, but a directory is merged with those above. hidden: names that have whiteouts
        above. stacked: gets the name if it was there already.
        """
        if name in hidden:
            return
        above = self._entries.get(name)
        if above is None:
            self[name] = UNKNOWN
            self._entries[name] = ((index,) if kind == _DIRECTORY else index), number, kind
            return
        if stacked is not None:
            stacked.add(name)
        hit = above[0]
        if type(hit) is tuple and kind == _DIRECTORY:
            self._entries[name] = (*hit, index), above[1], above[2]

    def lacking(self, known: Iterable[bytes]) -> int:
        """Of how many names nothing was said by a branch directory, those of `known` left out."""
        return sum(not kind and name not in known for name, (_, _, kind) in self._entries.items())

    def fill(self, now: Names) -> None:
        """Of names of which nothing was said, have what is said in `now`."""
        for name, (_, _, kind) in self._entries.items():
            entry = None if kind else now.find(name)
            if entry is not None:
                self._entries[name] = entry

    def doubt(self) -> None:
        """Nothing is known any more but the names."""
        self._entries = dict.fromkeys(self._entries, (UNKNOWN, 0, 0))

    # -- all of them ----------------------------------------------------------------------------------

    def packed(self) -> bytes:
        """`pack` of the list of all names."""
        return pack(list(self._entries))

    def copy(self) -> Names:
        """The same, and what becomes of either is none of the other."""
        copy = Names()
        copy._entries = self._entries.copy()
        return copy

    def same(self, other: Names) -> bool:
        """Whether the other one has the same names in the same order, whatever is said of them."""
        return self is other or list(self._entries) == list(other._entries)

    def take(self, other: Names) -> None:
        """Become the same as `other`."""
        self._entries = other._entries.copy()
        self._order = None


if not compiled.why_not():
    from udbad.inodes.cnames import Names  # the same, as a structure of C
