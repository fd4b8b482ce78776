"""What is written of each object into the record; union/recall.py reads it.

A node names others by their ids, its branch by its id, and what it has open by numbers of descriptors. Such a number
may be out of date: whoever takes the descriptor has to see whether it is of the object that it is said to be of.

Event loop only.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from udbad import compiled
from udbad.inodes.handles import HandleTable, OpenDir, OpenFile
from udbad.inodes.inomap import InoMap
from udbad.inodes.names import Names
from udbad.inodes.node import Dir, Listing, Node, Plink
from udbad.inodes.record import Record, pack, tuple_of
from udbad.inodes.table import InodeTable

FILE: Final = 1
"""A node that is no directory: NODE, the name, and where it has further ones, or a home, `pack` of (names, home)."""
DIRECTORY: Final = 2
"""`pack` of (id, parent, name, dead, links added, floor, opaque, mtime offset, listed, layers), a layer being (branch,
st_dev, st_ino, st_nlink, descriptor); those of branches that do not answer last, st_ino 0 where it is not known whether
there is one."""
GONE: Final = 3
"""A node that has left the table: `pack` of its id."""
OPEN_FILE: Final = 4
"""OPENED."""
OPEN_DIRECTORY: Final = 5
"""`pack` of (handle, node, pid, cached, base, names); names: None before the first read, SHARED when they are those of
the directory's own snapshot."""
CLOSED: Final = 6
"""A handle of a file or directory: `pack` of its number."""
LISTINGS: Final = 7
"""`pack` of (id of a directory, listings, room)."""
NEGATIVES: Final = 8
"""`pack` of (id of a directory, names that the kernel was told not to exist)."""
NUMBERS: Final = 9
"""`pack` of what InoMap.state says."""
NUMBER: Final = 10
"""`pack` of (st_dev, st_ino, number, 0 for none)."""
HOME: Final = 11
"""`pack` of (branch, name, identity, source_dev, pending, links, counted), of a pseudo-link."""

NEXT: Final = 12
"""`pack` of the number that the next handle gets at least; none that is in the record is given again."""

NODE: Final = struct.Struct("=BBHIiiQQQQq")
"""FILE, dead, length of the name, S_IFMT bits, branch, descriptor without a name (-1: none, less: table.unkept),
id, st_dev, st_ino, parent (0: none), links added."""
OPENED: Final = struct.Struct("=BxxxiIIIIqqQi")
"""OPEN_FILE, descriptor, flags, uid, gid, pid, handle, group (-1: none), node, backing id."""
SHARED: Final = 0


class Negative(NamedTuple):
    """A name that the kernel is told not to exist; None: all those of the directory."""

    node: Dir
    name: bytes | None


class _Snapshots(NamedTuple):
    """The listings of a directory."""

    node: Dir


class Journal:
    """Writes the tables of one mount into its record."""

    def __init__(
        self,
        record: Record,
        table: InodeTable,
        handles: HandleTable,
        inomap: InoMap,
        homes: Callable[[], list[Plink]],
    ) -> None:
        """From now on what changes in these is written. homes: the pseudo-links there are."""
        self._record = record
        self._append = record.append
        self._table = table
        self._handles = handles
        self._inomap = inomap
        self._homes = homes
        self._listings: dict[int, object] = {}
        """By node id: those that were written."""
        self._writers: dict[type, Callable[[Any], None]] = {
            Node: self._node,
            Dir: self._directory,
            OpenFile: self._open_file,
            OpenDir: self._open_directory,
            Negative: self._negative,
            _Snapshots: lambda snapshots: self._snapshots(snapshots.node),
            InoMap: self._numbers,
            HandleTable: self._next_handle,
            tuple: self._number,
            Plink: self._home,
        }
        record.write = self._write
        record.live = self._live
        if not compiled.why_not():
            record.quick = cjournal.Writer(table, handles, inomap)
        table.record = handles.record = inomap.record = record

    def _write(self, one: Any) -> None:
        self._writers[type(one)](one)

    def _live(self) -> Iterator[Any]:
        self._table.read_all()
        return self.present()

    def present(self) -> Iterator[Any]:
        """All objects there are, but for nodes that were not made yet."""
        inomap, nodes = self._inomap, list(self._table.nodes.values())
        yield inomap
        yield self._handles
        yield from inomap.entries()
        yield from self._homes()
        yield from [*self._handles.files.values(), *self._handles.lost.values(), *self._handles.dirs.values()]
        for node in nodes:
            yield node
            if type(node) is Dir:
                if node.listings:
                    yield _Snapshots(node)
                if node.negatives:
                    yield Negative(node, None)

    # -- one of each ----------------------------------------------------------------------------------

    def _node(self, node: Node) -> None:
        if self._table.nodes.get(node.id) is not node:
            self._gone(node)
            return
        parent, name, plink = node.parent, node.name, node.plink
        payload = NODE.pack(
            FILE, node.dead, len(name), node.kind, node.branch.id, node.orphan_fd, node.id, node.dev, node.ino,
            0 if parent is None else parent.id, node.nlink_extra,
        ) + name  # fmt: skip
        if node.aliases or plink is not None:
            home = None if plink is None else (plink.branch.id, plink.name)
            payload += pack(([(above.id, other) for above, other in node.aliases or ()], home))
        node.place = self._append(payload, count=node.nlookup if node.nlookup > 0 else 0)

    def _directory(self, node: Dir) -> None:
        if self._table.nodes.get(node.id) is not node:
            self._listings.pop(node.id, None)
            self._gone(node)
            return
        parent = node.parent
        parts = node.layers if node.offline is None or node.layers[0].branch.offline else [*node.layers, *node.offline]
        layers = [(layer.branch.id, layer.dev, layer.ino, layer.nlink, layer.fd) for layer in parts]
        said = (
            node.id, 0 if parent is None else parent.id, node.name, node.dead, node.nlink_extra, node.floor,
            node.opaque, node.mtime_offset, node.listed, layers,
        )  # fmt: skip
        node.place = self._append(_entry(DIRECTORY, said), count=max(node.nlookup, 0))

    def _gone(self, node: Node) -> None:
        node.place = 0
        if node.id not in self._table.nodes:  # else another one has the number by now
            self._append(_entry(GONE, node.id))

    def closed(self, number: int) -> None:
        """A handle of this number is not open any more."""
        self._append(_entry(CLOSED, number))

    def _open_file(self, handle: OpenFile) -> None:
        files, lost = self._handles.files, self._handles.lost
        if files.get(handle.fh) is not handle and lost.get(handle.fh) is not handle:
            if handle.fh not in files and handle.fh not in lost:
                self.closed(handle.fh)
            return
        self._append(
            OPENED.pack(
                OPEN_FILE, handle.fd, handle.flags, handle.uid, handle.gid, handle.pid, handle.fh,
                -1 if handle.group is None else handle.group, handle.node.id, handle.backing_id,
            )
        )  # fmt: skip

    def _open_directory(self, handle: OpenDir) -> None:
        node = handle.node
        if node.listings and self._listings.get(node.id) is not node.listings:
            self._snapshots(node)
        if handle.fh not in self._handles.dirs:
            self.closed(handle.fh)
            return
        names = handle.names
        if names is not None and any(shared is names for _, _, shared in node.listings):
            packed = pack(SHARED)
        else:
            packed = _names(names)
        said = handle.fh, node.id, handle.pid, handle.cached, handle.base
        self._append(bytes((OPEN_DIRECTORY,)), tuple_of(6), *map(pack, said), packed)

    def _snapshots(self, node: Dir) -> None:
        self._listings[node.id] = node.listings
        parts = [bytes((LISTINGS,)), tuple_of(3), pack(node.id), tuple_of(len(node.listings))]
        for first, count, names in node.listings:
            parts += tuple_of(3), pack(first), pack(count), _names(names)
        self._append(*parts, pack(node.room))

    def _negative(self, negative: Negative) -> None:
        node, name = negative
        self._append(_entry(NEGATIVES, (node.id, list(node.negatives or ()) if name is None else [name])))

    def _numbers(self, inomap: InoMap) -> None:
        self._append(_entry(NUMBERS, inomap.state()))

    def _next_handle(self, handles: HandleTable) -> None:
        self._append(_entry(NEXT, handles.next))

    def _number(self, identity: tuple[int, int]) -> None:
        self._append(_entry(NUMBER, (*identity, self._inomap.entry(identity))))

    def _home(self, plink: Plink) -> None:
        said = plink.branch.id, plink.name, plink.identity, plink.source_dev, plink.pending, plink.links, plink.counted
        self._append(_entry(HOME, said))


def listings(said: Iterable[tuple[int, int, list[bytes] | None]]) -> tuple[Listing, ...]:
    """Those of a directory, from a LISTINGS entry."""
    return tuple([(first, count, None if names is None else Names(names)) for first, count, names in said])


def _names(names: Names | None) -> bytes:
    """Packed; there may be very many."""
    return pack(None) if names is None else names.packed()


def _entry(kind: int, said: object) -> bytes:
    return bytes((kind,)) + pack(said)


if not compiled.why_not():
    from udbad.inodes import cjournal  # the same for what most requests make; it needs the numbers above
