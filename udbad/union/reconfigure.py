"""Changing the branches of a mounted union (semantics 11).

The new set is opened and checked like that of a new mount; branches that stay keep their descriptors,
so that what is open on them stays on one mount. Then every node, layer and handle is brought over in one
step: an operation runs before it or after it. The caller makes the coherence strategy start anew
and has the kernel forget everything afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from udbad.branch import syscalls
from udbad.branch.branches import Branch, BranchSet
from udbad.inodes.handles import OpenFile
from udbad.inodes.node import Dir, Layer
from udbad.inodes.paths import last_path
from udbad.union import homes
from udbad.union.superblock import Superblock, lower_links


class InUse(NamedTuple):
    """Why a branch cannot go: an open file (pid: who opened it) or directory of it, by a path in the mount."""

    path: bytes
    pid: int
    what: str


def carry_over(old: BranchSet, fresh: BranchSet, used: Iterable[int] = ()) -> BranchSet:
    """The fresh set with the ids and descriptors of branches that are in the old one as well.

    Closes the fresh descriptors of those. New branches get ids that were never used before; used: some that were.
    """
    kept = {_identity(branch): branch for branch in old.branches}
    next_id = 1 + max(*(branch.id for branch in old.branches), *used, 0)
    result = []
    for branch in fresh.branches:
        before = kept.get(_identity(branch))
        if before is None:
            result.append(branch.but(id=next_id))
            next_id += 1
        else:
            branch.close()
            result.append(
                branch.but(id=before.id, root_fd=before.root_fd, anchor_fd=before.anchor_fd, private=before.private)
            )
    return BranchSet(tuple(result), old.generation + 1)


def _identity(branch: Branch) -> tuple[int, int]:
    st = os.fstat(branch.root_fd)
    return st.st_dev, st.st_ino


def removed(old: BranchSet, new: BranchSet) -> list[Branch]:
    """Branches of the old set that are not in the new one."""
    ids = {branch.id for branch in new.branches}
    return [branch for branch in old.branches if branch.id not in ids]


def missing(old: BranchSet, fresh: BranchSet) -> list[Branch]:
    """Branches of the old set whose directories are not in a fresh one, before `carry_over`."""
    found = {_identity(branch) for branch in fresh.branches}
    return [branch for branch in old.branches if _identity(branch) not in found]


def users(sb: Superblock, branch: Branch, openers: Iterable[tuple[int, int]] = ()) -> list[InUse]:
    """What keeps a branch from being removed: files open on it, directories open that are only on it.

    openers: (node id, pid) of files and directories that the kernel has opened without telling.
    """
    opened = [(handle.node, handle.pid) for handle in sb.handles.files.values() if handle.fh > 0]
    directories = [(handle.node, handle.pid) for handle in sb.handles.dirs.values() if handle.fh > 0]
    for number, pid in openers:
        node = sb.table.find(number)
        if type(node) is Dir:
            directories.append((node, pid))
        elif node is not None and (node, pid) not in opened:
            opened.append((node, pid))
    found = [
        InUse(last_path(node), pid, "open file")
        for node, pid in opened
        if node.branch.id == branch.id and node.orphan_fd < 0
    ]
    for directory, pid in directories:
        layers = directory.layers
        if len(layers) == 1 and layers[0].branch.id == branch.id:
            found.append(InUse(last_path(directory), pid, "open directory"))
    return found


def written_behind(sb: Superblock, fresh: BranchSet) -> list[InUse]:
    """What keeps a branch from not being written to any more: files that the kernel may write to without asking."""
    writable = {_identity(branch) for branch in fresh.branches if branch.writable}
    return [
        InUse(last_path(handle.node), handle.pid, "open file")
        for handle in sb.handles.files.values()
        if handle.backing_id
        and handle.writable
        and handle.node.orphan_fd < 0
        and _identity(handle.node.branch) not in writable
    ]


def apply(sb: Superblock, new: BranchSet) -> None:
    """Make `new` (from `carry_over`) the branches of the union. Precondition: no copy-up is under way, and
    nothing uses what is removed (`users`). The caller closes the removed branches afterwards."""
    sb.table.read_all()
    by_id = {branch.id: branch for branch in new.branches}
    sb.branches = new
    homes.keep(sb)
    sb.ask_redirects()
    _rebuild_root(sb, new)
    for node in list(sb.table.nodes.values()):
        if node is sb.root:
            continue
        if type(node) is Dir:
            _rebuild_directory(sb, node, by_id)
        elif node.branch.id in by_id:
            node.branch = by_id[node.branch.id]
            if node.ino in sb.plinks and node.plink is None:
                homes.part(sb, node)  # whether a home that has come is its own is for the next lookup to say
        elif node.orphan_fd < 0:
            sb.changes.left(node)
    for handle in sb.handles.files.values():
        if handle.writable and not handle.node.branch.writable and handle.node.orphan_fd < 0:
            _for_reading(handle)  # the next write copies up, or meets EROFS
    for opened in sb.handles.dirs.values():
        if opened.names is not None:
            opened.names.doubt()
        opened.numbering = None
    sb.warned.clear()
    sb.forget_space()


def _for_reading(handle: OpenFile) -> None:
    """Nothing is written through the handle any more, and the mount of its branch can become read-only."""
    fd = syscalls.reopen(handle.fd, handle.flags & ~(os.O_ACCMODE | os.O_APPEND | os.O_TRUNC) | os.O_RDONLY)
    os.dup2(fd, handle.fd, inheritable=False)
    os.close(fd)
    handle.writable = False


def _rebuild_root(sb: Superblock, new: BranchSet) -> None:
    layers = []
    for branch in new.branches:
        st = os.fstat(branch.root_fd)
        layers.append(Layer(branch, st.st_dev, st.st_ino, st.st_nlink, branch.root_fd))
        sb.inomap.alias(st.st_dev, st.st_ino, sb.root.id)
    root = sb.root
    sb.table.open_fds += len(layers) - len(root.layers)
    root.layers = layers
    root.branch, root.dev, root.ino = layers[0].branch, layers[0].dev, layers[0].ino
    root.floor = len(new) - 1
    root.nlink_extra = lower_links(layers)
    sb.table.changed(root)


def _rebuild_directory(sb: Superblock, node: Dir, by_id: dict[int, Branch]) -> None:
    layers = []
    for layer in node.layers:
        branch = by_id.get(layer.branch.id)
        if branch is not None:
            layer.branch = branch
            layers.append(layer)
        elif layer.fd >= 0:
            os.close(layer.fd)
            layer.fd = -1
            sb.table.open_fds -= 1
    if not layers:
        sb.changes.left(node)
        return
    layers.sort(key=lambda layer: layer.branch.index)
    node.layers = layers
    node.branch, node.dev, node.ino = layers[0].branch, layers[0].dev, layers[0].ino
    # Until it is asked for again: anything above may hide or add to it.
    node.opaque = None
    node.floor = len(by_id) - 1
    sb.table.changed(node)
