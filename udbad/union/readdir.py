"""Listing a directory (spec section 5).

Each open directory has a private snapshot of names, taken at the first read and again at a rewind.
Offsets are the number of the snapshot and a position in it ("." and ".." first), so telldir and seekdir hold
whatever is created or removed meanwhile; names that are gone when their turn comes are left out. The kernel may
put the entries of one snapshot into a listing of its own and answer for other handles from it, until it is told
to forget that; a handle that then goes on here takes over the snapshot. No two have the same number, so the
kernel never joins parts of different ones.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from collections.abc import Iterator
from itertools import count

from udbad.errors import enoent
from udbad.inodes.handles import OpenDir
from udbad.inodes.table import Dir, Hit, Layer, Node
from udbad.union import lookup, view, whiteout
from udbad.union.tree import Tree

Entry = tuple[bytes, Node, os.stat_result, int]
"""name, node, attributes, offset of the entry after it."""

DOTS = 2
_S_IFMT, _S_IFDIR = 0o170000, st_mod.S_IFDIR
_stat = os.stat
_POSITION = (1 << 32) - 1
_numbers = count(1)


def snapshot(tree: Tree, handle: OpenDir) -> None:
    """Take the names of the directory as they are now. Raises ENOENT when the directory is gone."""
    node = handle.node
    handle.number = next(_numbers) & 0x7FFFFFFF
    if node.dead:
        handle.names, handle.hits = [], {}
        return
    if not node.trusted:
        lookup.refresh(tree, node)
    if not node.trusted and node.times is None:
        handle.hits = view.scan(tree, node)
    else:
        loaded = node.view if node.view is not None else view.load_view(tree, node)
        handle.hits = dict(loaded)
    handle.names = list(handle.hits)
    if handle.cached:
        node.listing = handle.number, handle.names
        node.listed = True
    if tree.options.show_whiteouts:
        handle.names += view.whiteout_names(tree, node)


def entries(tree: Tree, handle: OpenDir, start: int) -> Iterator[Entry]:
    """Entries from offset `start` (0 takes a new snapshot).

    "." and ".." come with the nodes' own attributes and must not be counted as looked up.
    """
    node = handle.node
    if start == 0:
        snapshot(tree, handle)
    elif start >> 32 != handle.number or handle.names is None:
        listing = node.listing
        if listing is not None and listing[0] == start >> 32:
            handle.number, handle.names = listing
            handle.hits = {}
        elif handle.names is None:
            snapshot(tree, handle)
    base = handle.number << 32
    start &= _POSITION
    if start == 0:
        yield b".", node, tree.stat(node), base + 1
    if start <= 1:
        above = node.parent if node.parent is not None else node
        yield b"..", above, tree.stat(above), base + DOTS
    names = handle.names
    assert names is not None
    hits = handle.hits
    trusted = node.trusted
    layers = {layer.branch.index: layer for layer in node.layers}
    prefix = whiteout.PREFIX
    for position in range(max(start - DOTS, 0), len(names)):
        name = names[position]
        if name == prefix:
            continue  # cannot be looked up, so it must not be promised
        try:
            found: tuple[Node, os.stat_result] | None
            if name.startswith(prefix):
                found = show_whiteout(tree, node, name)
            else:
                # A trusted view may have changed since the snapshot: believe the newer one.
                current = node.view.get(name, -1) if trusted and node.view is not None else hits.get(name)
                found = None if current == -1 else _by_hit(tree, node, layers, name, current)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EIO):
                raise
            continue  # gone meanwhile, or broken: asking for it by name says what is wrong
        if found is not None:
            yield name, found[0], found[1], base + position + DOTS + 1


def _by_hit(
    tree: Tree, parent: Dir, layers: dict[int, Layer], name: bytes, hit: Hit | None
) -> tuple[Node, os.stat_result] | None:
    """The node of a listed name; `hit` says where the listing saw it. layers: the directory's, by branch index."""
    if type(hit) is int:
        layer = layers.get(hit)
        if layer is not None:
            fd = layer.fd if layer.fd >= 0 else tree.layer_fd(parent, layer)
            try:
                st = _stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                pass
            else:
                if st.st_mode & _S_IFMT != _S_IFDIR:
                    return lookup.intern_file(tree, parent, name, layer.branch, st)
    found = lookup.resolve(tree, parent, name)
    if found is None:
        lookup.forget_name(tree, parent, name)
        return None
    return lookup.intern(tree, parent, name, found)


def show_whiteout(tree: Tree, parent: Dir, name: bytes) -> tuple[Node, os.stat_result]:
    """A `.wh.NAME` as an ordinary read-only file (option shwh). Raises ENOENT where no branch has it."""
    for layer in parent.layers:
        try:
            st = os.stat(name, dir_fd=tree.layer_fd(parent, layer), follow_symlinks=False)
        except FileNotFoundError:
            continue
        return lookup.intern_file(tree, parent, name, layer.branch, st)
    raise enoent()


def is_empty(tree: Tree, node: Dir) -> bool:
    """Whether no name is visible in a directory, asked of the branches (rmdir, rename)."""
    return not view.scan(tree, node)


def lower_hidden(tree: Tree, node: Dir, top: int) -> bool:
    """Whether everything in a directory's layers below branch `top` is whited out by the layer on it.

    Only then may the directory be renamed: its lower parts stay behind (spec section 6.6).
    """
    below = [layer for layer in node.layers if layer.branch.index > top]
    if not below:
        return True
    visible = view.scan(tree, node)
    return not any(
        (type(hit) is int and hit > top) or (type(hit) is tuple and hit[-1] > top) for hit in visible.values()
    )
