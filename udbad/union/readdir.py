"""Listing a directory (semantics 5).

Each open directory has a private snapshot of names, taken at the first read and again at a rewind. Every snapshot of a
directory has a range of positions of its own ("." and ".." first), so telldir and seekdir hold whatever is created or
removed meanwhile; names that are gone when their turn comes are left out. The kernel may put the entries of one
snapshot into a listing of its own and answer for other handles from it, until it is told to forget that; a handle that
then goes on here takes over the snapshot. It puts an entry behind another one when the positions say so
(fuse_add_dirent_to_cache()), so parts of different snapshots are never joined. While the names are the same, handles
share one, and any of them can complete what another one began.

Positions stay below 2**31. A directory of 100,000 names has used them up when it has changed and was listed 21,000
times; then those that nobody can have any more are given out again.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from collections.abc import Iterator

from udbad.branch import whiteout
from udbad.branch.syscalls import find_at
from udbad.errors import GONE, eio, enoent
from udbad.inodes.handles import OpenDir
from udbad.inodes.inomap import InoMap
from udbad.inodes.names import UNKNOWN, Hit, Names
from udbad.inodes.node import POSITIONS, Dir, Layer, Node
from udbad.union import lookup, resolve, view
from udbad.union.resolve import FOUND
from udbad.union.superblock import Superblock

Entry = tuple[bytes, Node, os.stat_result, int]
"""name, node, attributes, position of the entry after it."""

DOTS = 2
_ANY = (1 << 32) - 2
"""A number for what has none that we know: not 0, which getdents64(2) takes for no entry."""
_S_IFMT, _S_IFDIR, _S_IFCHR = 0o170000, st_mod.S_IFDIR, st_mod.S_IFCHR

Index = int
"""Of a branch."""
Number = int
"""Of an inode."""

Layers = dict[int, Layer]
_KEPT = 4
"""Snapshots of one directory whose names are kept while somebody may be reading them from the kernel's listing."""


def snapshot(sb: Superblock, handle: OpenDir) -> None:
    """Take the names of the directory as they are now. Raises ENOENT when the directory is gone."""
    node = handle.node
    handle.numbering = None
    if node.dead:
        handle.names = Names()
        _place(sb, handle)
        return
    if not node.trusted:
        lookup.refresh(sb, node)
    if not node.trusted and node.times is None and not node.quiet:
        names = view.scan(sb, node)
    else:
        names = (view.load_view(sb, node) if node.view is None else node.view).copy()
    if handle.cached and not node.listed:
        node.listed = True
        sb.table.changed(node)
    if sb.options.show_whiteouts:
        for name in view.whiteout_names(sb, node):
            names[name] = UNKNOWN
    handle.names = names
    _place(sb, handle)


def _place(sb: Superblock, handle: OpenDir) -> None:
    """Give the snapshot of a handle its positions."""
    sb.handles.changed(handle)
    node, names = handle.node, handle.names
    assert names is not None
    listings = node.listings
    if handle.cached and listings:
        first, _, shared = listings[-1]
        if shared is not None and shared.same(names):
            shared.take(names)  # what is said of them is newer
            handle.base, handle.names = first, shared
            return
    size = _size(len(names))
    first, end = node.room
    if end - first < size:
        first, end = _gap(sb, node, size)
    node.room = first + size, end
    handle.base = first
    others = handle.fh < 0 or node.cached_opens > (1 if handle.cached else 0)
    kept = [listing for listing in listings[1 - _KEPT :] if listing[2] is not None] if others else ()
    node.listings = (*kept, (first, len(names), names if handle.cached else None))


def _size(names: int) -> int:
    """How many positions a snapshot takes: before each entry and after the last."""
    return names + DOTS + 1


def _gap(sb: Superblock, node: Dir, size: int) -> tuple[int, int]:
    """Positions that are in use no more, once all have been given out: (first, end)."""
    used = [(first, first + _size(count)) for first, count, _ in node.listings]
    used += [
        (handle.base, handle.base + _size(len(handle.names)))
        for handle in sb.handles.dirs.values()
        if handle.node is node and handle.names is not None
    ]
    at, end = POSITIONS
    for first, after in sorted(used):
        if first - at >= size:
            return at, first
        at = max(at, after)
    return at, end


def _go_on(sb: Superblock, handle: OpenDir, start: int) -> int:
    """Find the snapshot that a position belongs to which is not in the handle's own; the position in it.

    Of one whose names were let go the place is what counts: in a new snapshot, what nobody has changed is where it was.
    """
    place = DOTS
    for first, count, names in reversed(handle.node.listings):
        if first < start < first + _size(count):
            if names is not None:
                handle.base, handle.names, handle.numbering = first, names, None
                sb.handles.changed(handle)
                return start - first
            place = start - first
            break
    snapshot(sb, handle)
    return place


def _begin(sb: Superblock, handle: OpenDir, start: int) -> int:
    """Have the snapshot that position `start` belongs to; the position in it."""
    if start == 0:
        snapshot(sb, handle)
        return 0
    if handle.names is None or not handle.base < start < handle.base + _size(len(handle.names)):
        return _go_on(sb, handle, start)
    return start - handle.base


Name = tuple[bytes, int, int, int]
"""name, node id, S_IFMT bits (0: not known), position of the entry after it."""


Numbering = dict[int, tuple[int, int, int, set[int]]]
"""How inode numbers of a directory's branch directories are told, by the index of the branch: its st_dev, and what
InoMap.many says."""


class Run:
    """Names of a snapshot in their order, as long as nobody has to be asked about one.

    first: the place of the next one, which whoever goes through them leaves at the one that he did not take.
    """

    __slots__ = (
        "after", "base", "children", "current", "first", "highest", "index", "inomap", "limit", "lowest", "names",
        "numbering",
    )  # fmt: skip

    def __init__(
        self, names: Names, current: Names, children: dict[bytes, Node], inomap: InoMap, numbering: Numbering,
        first: int, after: int,
    ) -> None:  # fmt: skip
        """current: what is known of the names now; children: the nodes of those that the kernel may know. after: what
        is added to a name's place for the position of the entry after it."""
        self.names = names
        self.current = current
        self.children = children
        self.inomap = inomap
        self.numbering = numbering
        self.first = first
        self.after = after
        self.index = -1
        """The branch whose area these are: from where numbers are counted, below which limit, and between which two it
        has exceptions (InoMap.many)."""
        self.base = self.limit = self.lowest = self.highest = 0

    def __iter__(self) -> Iterator[Name]:
        while self.first < len(self.names):
            name, hit, number, kind = self.names.at(self.first)
            if name.startswith(whiteout.PREFIX):
                return
            if self.current is not self.names:
                found = self.current.find(name)
                if found is None:
                    self.first += 1  # gone meanwhile
                    continue
                hit, number, kind = found
            if hit is None:
                return
            child = self.children.get(name)
            if child is not None:
                number, kind = child.id, child.kind
            elif kind:
                number, kind = self.number(hit[0] if isinstance(hit, tuple) else hit, number), kind << 12
            if not kind or not number:
                return
            self.first += 1
            yield name, number, kind, self.after + self.first - 1

    def number(self, index: Index, own: Number) -> Number:
        """InoMap.number of what has the number `own` on the branch with this index; 0 where the directory is not on it
        any more. Names follow each other branch by branch, and most are no exceptions."""
        if index not in self.numbering:
            return 0
        device, base, limit, exceptions = self.numbering[index]
        if index != self.index:
            self.index, self.base, self.limit = index, base, limit
            self.lowest, self.highest = (min(exceptions), max(exceptions)) if exceptions else (1, 0)
        if 1 < own < limit and own not in exceptions:
            return base + own
        return self.inomap.number(device, own)


def names_only(sb: Superblock, handle: OpenDir, start: int) -> Iterator[Name | Run]:
    """As `entries`, for who wants no attributes: no system call, no node and hardly ever an object for a name.

    Type and number are as the branch directories said when they were read, as those are that getdents64(2) has put into
    a buffer; of what the kernel knows they are those that it knows.
    """
    node = handle.node
    start = _begin(sb, handle, start)
    names = handle.names
    assert names is not None
    # As in `entries`: a trusted view may have changed since the snapshot.
    current = node.view if node.trusted and node.view is not None else names
    children = node.children if node.trusted else {}
    if handle.numbering is None:
        _fill(sb, node, current, children)
        handle.numbering = {
            layer.branch.index: (layer.dev, *sb.inomap.many(layer.dev, len(names))) for layer in node.layers
        }
    base = handle.base
    if start == 0:
        yield b".", node.id, _S_IFDIR, base + 1
    if start <= 1:
        yield b"..", node.id if node.parent is None else node.parent.id, _S_IFDIR, base + DOTS
    run = Run(names, current, children, sb.inomap, handle.numbering, max(start - DOTS, 0), base + DOTS + 1)
    while True:
        yield run
        if run.first >= len(names):
            return
        name, _, _, _ = names.at(run.first)
        run.first += 1
        after = base + DOTS + run.first
        if name.startswith(whiteout.PREFIX):
            if name != whiteout.PREFIX:
                yield name, _ANY, st_mod.S_IFREG, after
            continue
        asked = _ask(sb, node, name)
        if asked is not None:
            yield name, *asked, after


def _fill(sb: Superblock, node: Dir, names: Names, known: dict[bytes, Node]) -> None:
    """Read the branch directories once more where that takes less than to ask for each of the names of which they have
    not said anything: those that were made since, or that a predecessor has listed. known: the others."""
    if not node.dead and names.lacking(known) > 1 + len(names) // 64:
        names.fill(view.scan(sb, node))


def _ask(sb: Superblock, parent: Dir, name: bytes) -> tuple[int, int] | None:
    """Number and S_IFMT bits of a name of which nothing is known; None: it does not exist, or is broken."""
    try:
        found = resolve.resolve(sb, parent, name)
    except OSError as error:
        if (error.errno not in GONE and error.errno != errno.EIO) or parent.offline:
            raise
        return None
    if found.answer is not FOUND:
        sb.changes.found_gone(parent, name)
        return None
    resolve.discard(sb, parent, name, found)
    return sb.inomap.number(found.st.st_dev, found.st.st_ino), st_mod.S_IFMT(found.st.st_mode)


def entries(sb: Superblock, handle: OpenDir, start: int) -> Iterator[Entry]:
    """Entries from position `start` (0 takes a new snapshot).

    "." and ".." come with the nodes' own attributes and must not be counted as looked up.
    """
    node = handle.node
    start = _begin(sb, handle, start)
    base = handle.base
    if start == 0:
        yield b".", node, sb.stat(node), base + 1
    if start <= 1:
        above = node.parent if node.parent is not None else node
        yield b"..", above, sb.stat(above), base + DOTS
    names = handle.names
    assert names is not None
    trusted = node.trusted
    layers = {layer.branch.index: layer for layer in node.layers}
    prefix = whiteout.PREFIX
    for position in range(max(start - DOTS, 0), len(names)):
        name, hit, _, _ = names.at(position)
        if name == prefix:
            continue  # cannot be looked up, so it must not be promised
        try:
            found: tuple[Node, os.stat_result] | None
            if name.startswith(prefix):
                found = show_whiteout(sb, node, name)
            else:
                # A trusted view may have changed since the snapshot: believe the newer one.
                current = node.view.get(name, -1) if trusted and node.view is not None else hit
                found = None if current == -1 else _by_hit(sb, node, layers, name, current)
        except OSError as error:
            if (error.errno not in GONE and error.errno != errno.EIO) or node.offline:
                raise
            continue  # gone meanwhile, or broken: asking for it by name says what is wrong
        if found is not None:
            yield name, found[0], found[1], base + position + DOTS + 1


def _by_hit(
    sb: Superblock, parent: Dir, layers: Layers, name: bytes, hit: Hit | None
) -> tuple[Node, os.stat_result] | None:
    """The node of a listed name; `hit` says where the listing saw it. layers: the directory's, by branch index."""
    if type(hit) is int:
        layer = layers.get(hit)
        if layer is not None:
            fd = layer.fd if layer.fd >= 0 else sb.layer_fd(parent, layer)
            st = find_at(fd, name)
            if st is not None:
                kind = st.st_mode & _S_IFMT
                if kind != _S_IFDIR and not (kind == _S_IFCHR and layer.branch.overlay):
                    return lookup.intern_file(sb, parent, name, layer.branch, st)
    found = resolve.resolve(sb, parent, name)
    if found.answer is FOUND:
        return lookup.intern(sb, parent, name, found)
    sb.changes.found_gone(parent, name)
    return None


def show_whiteout(sb: Superblock, parent: Dir, name: bytes) -> tuple[Node, os.stat_result]:
    """A `.wh.NAME` as an ordinary read-only file (option shwh). Raises ENOENT where no branch has it."""
    for layer in parent.layers:
        st = find_at(sb.layer_fd(parent, layer), name)
        if st is None:
            continue
        return lookup.intern_file(sb, parent, name, layer.branch, st)
    raise enoent()


def is_empty(sb: Superblock, node: Dir) -> bool:
    """Whether no name is visible in a directory, asked of the branches (rmdir, rename)."""
    return not view.scan(sb, node)


def lower_hidden(sb: Superblock, node: Dir, top: int) -> bool:
    """Whether everything in a directory's layers below branch `top` is whited out by the layer on it.

    Only then may the directory be renamed: its lower parts stay behind (semantics 6.6).
    """
    if node.offline:
        raise eio()
    below = [layer for layer in node.layers if layer.branch.index > top]
    if not below:
        return True
    visible = view.scan(sb, node)
    return not any((type(hit) is int and hit > top) or (type(hit) is tuple and hit[-1] > top) for hit in visible.hits())
