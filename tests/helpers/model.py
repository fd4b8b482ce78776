"""A plain in-memory model of a union: layers of dictionaries and the operations of semantics 6.

It says what a caller with every privilege (root) sees through the mount after each operation, and with
which errno an operation fails (Linux VFS order of checks, fs/namei.c). It shares no code with udbad. The
layers inside the model are its way to know; how the branches really look is compared separately (merge.py).

Limits: default policies (create=tdp, cpup=tdp), layer 0 writable, at most one more writable layer and
that one at the bottom; no owners, times or link counts; symlinks are dangling, so a path that leads
through one does not exist. Paths are relative to the root of the union; the root is the empty path.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.helpers.merge import OPAQUE, WH_PREFIX, Tree
from tests.helpers.posix import EXCHANGE, NOREPLACE

PathT = tuple[bytes, ...]
"""A path relative to the root of the union, as components."""


@dataclass(eq=False)
class Node:
    """One object of one layer; hard links are one Node under several paths.

    moved: the copy that took this node's place for every name of it (copy-up, pseudo-link). opened: how often it is
    held open. passed: the kernel itself writes to it, while it is.
    """

    kind: int
    mode: int = 0o644
    data: bytes = b""
    target: bytes | None = None
    xattrs: dict[str, bytes] = field(default_factory=dict)
    moved: Node | None = None
    opened: int = 0
    passed: bool = False

    def final(self) -> Node:
        node = self
        while node.moved is not None:
            node = node.moved
        return node

    def copy(self) -> Node:
        return replace(self, xattrs=dict(self.xattrs), moved=None)

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.kind)


@dataclass
class Layer:
    """One branch: objects, names it whites out, directories it makes opaque."""

    writable: bool
    whable: bool
    nodes: dict[PathT, Node] = field(default_factory=dict)
    whiteouts: set[PathT] = field(default_factory=set)
    opaque: set[PathT] = field(default_factory=set)

    @classmethod
    def of(cls, perm: str) -> Layer:
        """From a branch permission: "rw", "ro+wh" or "ro"."""
        return cls(writable=perm == "rw", whable=perm in ("rw", "ro+wh"))

    def children(self, path: PathT) -> set[bytes]:
        depth = len(path)
        return {p[-1] for p in self.nodes if len(p) == depth + 1 and p[:depth] == path}

    def is_dir(self, path: PathT) -> bool:
        return not path or (path in self.nodes and self.nodes[path].is_dir)

    def drop(self, path: PathT) -> dict[PathT, object]:
        """Take the object and all below it out; returns {path below `path`: Node, or the name of a mark}."""
        depth = len(path)
        taken: dict[PathT, object] = {}
        for p in [p for p in self.nodes if p[:depth] == path]:
            taken[p[depth:]] = self.nodes.pop(p)
        for p in [p for p in self.whiteouts if p[:depth] == path and len(p) > depth]:
            self.whiteouts.remove(p)
            taken[*p[depth:], b"/wh"] = "whiteout"
        for p in [p for p in self.opaque if p[:depth] == path]:
            self.opaque.remove(p)
            taken[*p[depth:], b"/opq"] = "opaque"
        return taken

    def put(self, path: PathT, taken: dict[PathT, object]) -> None:
        """The reverse of drop, at another path."""
        for below, what in taken.items():
            if isinstance(what, Node):
                self.nodes[path + below] = what
            else:
                (self.whiteouts if what == "whiteout" else self.opaque).add(path + below[:-1])

    def materialise(self, root: Path) -> None:
        """Write the layer into an empty branch directory (hard links as hard links)."""
        made: dict[int, str] = {}
        for path in sorted(self.nodes):
            node, real = self.nodes[path], os.path.join(root, *map(os.fsdecode, path))
            if id(node) in made:
                os.link(made[id(node)], real, follow_symlinks=False)
                continue
            made[id(node)] = real
            make_node(real, node)
        for path in self.whiteouts:
            (root.joinpath(*map(os.fsdecode, path[:-1])) / os.fsdecode(WH_PREFIX + path[-1])).touch(0o444)
        for path in self.opaque:
            (root.joinpath(*map(os.fsdecode, path)) / os.fsdecode(OPAQUE)).touch(0o444)


def make_node(real: str, node: Node) -> None:
    """Make one object on a branch as `node` says."""
    if node.is_dir:
        os.mkdir(real)
    elif stat.S_ISLNK(node.kind):
        assert node.target is not None
        os.symlink(os.fsdecode(node.target), real)
        return
    elif stat.S_ISFIFO(node.kind):
        os.mkfifo(real)
    else:
        Path(real).write_bytes(node.data)
    os.chmod(real, node.mode)
    for key, value in node.xattrs.items():
        os.setxattr(real, key, value)


def fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Model:
    """The union. Every operation raises OSError as the system call on the mount is expected to."""

    def __init__(self, layers: Iterable[Layer], dirren: bool = False, io: str = "requests") -> None:
        """dirren: a directory that has parts on lower layers, none of them writable, can be renamed. io: by which way
        files are read and written, which decides what new content costs."""
        self.layers = list(layers)
        self.dirren = dirren
        self.io = io

    # -- looking --------------------------------------------------------------------------------

    def hits(self, path: PathT, start: int = 0, marks: bool = True) -> list[int]:
        """Layers in which the visible `path` lives, top first; [] when it is absent (semantics 4.2).

        start: leave the layers above out. marks: whether an opaque mark in `path` itself counts.
        """
        if not path:
            return list(range(len(self.layers)))
        found: list[int] = []
        kind: int | None = None
        for i in self.hits(path[:-1]):
            if i < start:
                continue
            layer = self.layers[i]
            node = layer.nodes.get(path)
            if node is not None and kind in (None, node.kind):
                kind = node.kind
                found.append(i)
                if not node.is_dir or (marks and layer.whable and path in layer.opaque):
                    break
            if layer.whable and path in layer.whiteouts:
                break
        return found

    def top(self, path: PathT) -> int | None:
        found = self.hits(path)
        return found[0] if found else None

    def get(self, path: PathT) -> Node | None:
        """The visible object, or None."""
        if not path:
            return Node(stat.S_IFDIR)
        top = self.top(path)
        return None if top is None else self.layers[top].nodes[path].final()

    def names(self, path: PathT) -> list[bytes]:
        """Visible names in a directory."""
        every = set[bytes]().union(*(self.layers[i].children(path) for i in self.hits(path)))
        return sorted(name for name in every if self.hits((*path, name)))

    def walk(self, path: PathT) -> None:
        """Resolve the directory part as a system call does: ENOENT or ENOTDIR."""
        for depth in range(1, len(path)):
            node = self.get(path[:depth])
            if node is None or stat.S_ISLNK(node.kind):  # every symlink dangles
                raise fail(errno.ENOENT)
            if not node.is_dir:
                raise fail(errno.ENOTDIR)

    def existing(self, path: PathT, follow: bool = False) -> Node:
        self.walk(path)
        node = self.get(path)
        if node is None or (follow and stat.S_ISLNK(node.kind)):
            raise fail(errno.ENOENT)
        return node

    def visible(self) -> dict[bytes, tuple[object, ...]]:
        """The whole tree as `view` makes it of a snapshot."""
        tree: dict[bytes, tuple[object, ...]] = {}
        todo: list[PathT] = [()]
        while todo:
            parent = todo.pop()
            for name in self.names(parent):
                path = (*parent, name)
                node = self.get(path)
                assert node is not None
                tree[b"/".join(path)] = node_view(node)
                if node.is_dir:
                    todo.append(path)
        return tree

    # -- where to write -------------------------------------------------------------------------

    def _can_host(self, path: PathT, i: int) -> bool:
        """Whether an object put at `path` in layer i would be seen, its parents made there first."""
        for depth in range(1, len(path) + 1):
            prefix = path[:depth]
            for upper in self.layers[:i]:
                if upper.whable and (prefix in upper.whiteouts or (depth < len(path) and prefix in upper.opaque)):
                    return False
            if depth < len(path) and prefix in self.layers[i].nodes and not self.layers[i].is_dir(prefix):
                return False
        return True

    def _writable_at_or_above(self, path: PathT, i: int) -> int:
        while not (self.layers[i].writable and self._can_host(path, i)):
            i -= 1
        return i

    def _ensure_dir(self, path: PathT, i: int) -> None:
        """Copy a visible directory and its parents, without content, to layer i (up or down)."""
        layer = self.layers[i]
        if layer.is_dir(path):
            return
        self._ensure_dir(path[:-1], i)
        node = self.get(path)
        assert node is not None
        layer.nodes[path] = node.copy()
        self._uncover(path, i)

    def _uncover(self, path: PathT, i: int) -> None:
        """Remove a whiteout that a new object replaced; a new directory must not show what was below it."""
        layer = self.layers[i]
        if path in layer.whiteouts:
            layer.whiteouts.remove(path)
            if layer.is_dir(path):
                layer.opaque.add(path)

    def _place(self, path: PathT, node: Node, i: int | None = None) -> None:
        """Make a new object (semantics 6.5) in layer i, or where create=tdp says (semantics 7.2)."""
        if i is None:
            top = self.top(path[:-1])
            assert top is not None
            i = self._writable_at_or_above(path, top)
        self._ensure_dir(path[:-1], i)
        self.layers[i].nodes[path] = node
        self._uncover(path, i)

    def _own(self, path: PathT, i: int | None = None) -> int:
        """Copy up, when it is not there already, to a writable layer (to layer i when given); that layer."""
        top = self.top(path)
        assert top is not None
        if i is None:
            i = self._writable_at_or_above(path, top)
        if i == top:
            return i
        self._ensure_dir(path[:-1], i)
        old = self.layers[top].nodes[path]
        if old.is_dir:
            self.layers[i].nodes[path] = old.copy()
        else:
            self.layers[i].nodes[path] = self._moved_copy(old)
        return i

    @staticmethod
    def _moved_copy(old: Node) -> Node:
        last = old.final()
        if last is old:  # not copied up yet, under any of its names
            last.moved = last.copy()
        return last.final()

    def _whiteout_if_needed(self, path: PathT, i: int) -> None:
        if self.hits(path):
            self.layers[i].whiteouts.add(path)

    # -- operations -----------------------------------------------------------------------------

    def create(self, path: PathT, node: Node) -> None:
        """open(O_CREAT|O_EXCL), mkdir, symlink, mkfifo."""
        self.walk(path)
        if self.get(path) is not None:
            raise fail(errno.EEXIST)
        self._place(path, node)

    def link(self, src: PathT, dst: PathT) -> None:
        old = self.existing(src)
        self.walk(dst)
        if self.get(dst) is not None:
            raise fail(errno.EEXIST)
        if old.is_dir:
            raise fail(errno.EPERM)
        top = self.top(src)
        assert top is not None
        target = self._writable_at_or_above(dst, top)
        source = self.layers[top].nodes[src]
        self._place(dst, source.final() if target == top else self._moved_copy(source), target)

    def unlink(self, path: PathT) -> None:
        if self.existing(path).is_dir:
            raise fail(errno.EISDIR)
        self._remove(path)

    def rmdir(self, path: PathT) -> None:
        if not self.existing(path).is_dir:
            raise fail(errno.ENOTDIR)
        if self.names(path):
            raise fail(errno.ENOTEMPTY)
        self._remove(path)

    def _remove(self, path: PathT) -> None:
        top = self.top(path)
        assert top is not None
        i = self._writable_at_or_above(path, top)
        if i == top:
            self.layers[i].drop(path)
        else:
            self._ensure_dir(path[:-1], i)
        self._whiteout_if_needed(path, i)

    def change(self, path: PathT, edit: Callable[[Node], None], gives: str = "") -> None:
        """chmod, setxattr, write, truncate: `edit` may raise; symlinks are followed (and dangle).

        gives: as for `given`, where it gives new content.
        """
        self.existing(path, follow=True)
        probe = self.get(path)
        assert probe is not None
        edit(probe.copy())  # errors come before the copy-up
        i = self._own(path)
        node = self.layers[i].nodes[path].final()
        edit(node)
        if gives:
            self.given(node, gives)

    def given(self, node: Node, call: str) -> None:
        """A file has new content by write(2), fallocate(2) or copy_file_range(2). Root's costs no set-user-ID bit, but
        where the kernel writes it itself, or where it is written with nobody's rights (docs/modes.md)."""
        if self.io == "cached" or (node.opened and node.passed and call == "write"):
            node.mode &= ~stat.S_ISUID

    def hold(self, path: PathT) -> Node:
        """open(2) of a regular file, which stays open until `release`. Who opens it first decides how it is written."""
        top = self.top(path)
        assert top is not None
        found = self.layers[top].nodes[path]
        node = found.final()
        if not node.opened:
            stays = node is not found or self.layers[top].writable
            node.passed = self.io == "passthrough" and stays and not node.mode & stat.S_ISUID
        node.opened += 1
        return node

    def write_open(self, node: Node, path: PathT, edit: Callable[[Node], None]) -> None:
        """write(2) to what `hold` has returned for `path`, which may have other names by now, or none: then there is
        nothing to copy up, and nobody else sees it."""
        node = node.final()
        names = (tuple(name.split(b"/")) for name in self.visible())
        place = next((name for name in (path, *names) if self.get(name) is node), None)
        if place is None:
            edit(node)
            self.given(node, "write")
        else:
            self.change(place, edit, "write")

    @staticmethod
    def release(node: Node) -> None:
        node.final().opened -= 1

    def copy_range(self, dst: PathT, src: PathT, offset_in: int, offset_out: int, count: int) -> None:
        """open(2) of `dst` for writing and of `src` for reading, copy_file_range(2); no data, no change."""
        new = self.existing(dst, follow=True)
        if not stat.S_ISREG(new.kind):
            raise fail(errno.EISDIR if new.is_dir else errno.ENXIO)  # fifo(7): without a reader
        old = self.existing(src, follow=True)
        if not stat.S_ISREG(old.kind):
            raise fail(errno.EISDIR if old.is_dir else errno.EINVAL)
        data = old.data[offset_in : offset_in + count]
        if not data:
            return
        if old is new and offset_out < offset_in + len(data) and offset_in < offset_out + len(data):
            raise fail(errno.EINVAL)
        self.change(dst, lambda node: setattr(node, "data", spliced(node.data, offset_out, data)), "copy_file_range")

    def open_trunc(self, path: PathT) -> None:
        """open(2) with O_RDONLY | O_TRUNC, which empties a file and does nothing to a FIFO."""
        node = self.existing(path, follow=True)
        if node.is_dir:
            raise fail(errno.EISDIR)
        if stat.S_ISREG(node.kind):
            self.change(path, lambda node: setattr(node, "data", b""))

    def tmpfile(self, path: PathT, node: Node) -> None:
        """open(2) with O_TMPFILE of the directory, then linkat(2): where the file is was chosen before its name was."""
        self.walk(path)
        parent = path[:-1]
        top = self.top(parent)
        assert top is not None
        i = self._writable_at_or_above((*parent, b"/"), top)
        self._ensure_dir(parent, i)
        if self.get(path) is not None:
            raise fail(errno.EEXIST)
        if not self._can_host(path, i):
            raise fail(errno.EXDEV)
        self._place(path, node, i)

    # -- rename ---------------------------------------------------------------------------------

    def rename(self, src: PathT, dst: PathT, flags: int = 0) -> None:
        """renameat2(2): the checks of do_renameat2() and vfs_rename(), then semantics 6.6."""
        self.walk(src)
        self.walk(dst)
        old, new = self.get(src), self.get(dst)
        if old is None:
            raise fail(errno.ENOENT)
        if flags & NOREPLACE and new is not None:
            raise fail(errno.EEXIST)
        if flags & EXCHANGE and new is None:
            raise fail(errno.ENOENT)
        if src == dst:
            return
        if dst[: len(src)] == src:
            raise fail(errno.EINVAL)
        if src[: len(dst)] == dst:
            raise fail(errno.EINVAL if flags & EXCHANGE else errno.ENOTEMPTY)
        if old is new:
            return
        if new is not None and not flags & EXCHANGE:
            self._check_replace(old, new, dst)
        target = self._rename_target(src, dst)
        if flags & EXCHANGE:
            self._exchange(src, dst, target)
            return
        self._make_movable(src, target)
        self._ensure_dir(dst[:-1], target)
        self._own(src, target)
        beyond = bool(self.hits(dst, target + 1)) or dst in self.layers[target].whiteouts
        self.layers[target].drop(dst)
        moving = self.layers[target].drop(src)
        self._whiteout_if_needed(src, target)
        self.layers[target].put(dst, moving)
        self.layers[target].whiteouts.discard(dst)
        if beyond and old.is_dir:
            self.layers[target].opaque.add(dst)

    def _check_replace(self, old: Node, new: Node, dst: PathT) -> None:
        if old.is_dir and not new.is_dir:
            raise fail(errno.ENOTDIR)
        if new.is_dir and not old.is_dir:
            raise fail(errno.EISDIR)
        if new.is_dir and self.names(dst):
            raise fail(errno.ENOTEMPTY)

    def _rename_target(self, src: PathT, dst: PathT) -> int:
        i, over = self.top(src), self.top(dst)
        assert i is not None
        if over is not None:
            i = min(i, over)
        while not (self.layers[i].writable and self._can_host(dst, i) and self._can_host(src, i)):
            i -= 1
        return i

    def _make_movable(self, path: PathT, target: int) -> None:
        """Where a redirect keeps the lower parts of a directory, all of it is as if it were in the target already."""
        node = self.get(path)
        assert node is not None
        if not self.dirren or not node.is_dir or any(layer.writable for layer in self.layers[target + 1 :]):
            self._check_movable(path, target)
            return
        if self.hits(path, marks=False)[-1] == target:
            return
        self._own(path, target)
        layer = self.layers[target]
        shown: dict[PathT, Node] = {}
        todo = [path]
        while todo:
            here = todo.pop()
            for name in self.names(here):
                child = (*here, name)
                top = self.top(child)
                assert top is not None
                found = self.layers[top].nodes[child]
                shown[child] = found if top == target else found.copy() if found.is_dir else found.final()
                if found.is_dir:
                    todo.append(child)
        layer.whiteouts = {one for one in layer.whiteouts if one[: len(path)] != path or one == path}
        layer.nodes |= shown
        layer.opaque.add(path)

    def _check_movable(self, path: PathT, target: int) -> None:
        """EXDEV for a directory of which something would stay behind below the target.

        A lower file under a file of the target is not visible, so it is no obstacle (aufs wants it whited
        out); a lower directory under one of the target is, even when that one is opaque.
        """
        node = self.get(path)
        assert node is not None
        if node.is_dir and any(self.hits((*path, name), marks=False)[-1] != target for name in self.names(path)):
            raise fail(errno.EXDEV)

    def _exchange(self, src: PathT, dst: PathT, target: int) -> None:
        self._make_movable(src, target)
        self._make_movable(dst, target)
        self._own(src, target)
        self._own(dst, target)
        layer = self.layers[target]
        below = {path: bool(self.hits(path, target + 1)) or path in layer.whiteouts for path in (src, dst)}
        first, second = layer.drop(src), layer.drop(dst)
        layer.put(dst, first)
        layer.put(src, second)
        for path in (src, dst):
            layer.whiteouts.discard(path)
            if layer.is_dir(path) and below[path]:
                layer.opaque.add(path)


def spliced(data: bytes, offset: int, new: bytes) -> bytes:
    """`data` after a write of `new` at `offset`."""
    return data[:offset].ljust(offset, b"\0") + new + data[offset + len(new) :]


def node_view(node: Node) -> tuple[object, ...]:
    """What of an object the model promises: kind, mode, content or target, extended attributes."""
    is_link = stat.S_ISLNK(node.kind)
    sha = hashlib.sha256(node.data).hexdigest() if stat.S_ISREG(node.kind) else None
    return (node.kind, 0o777 if is_link else node.mode, sha or node.target, tuple(sorted(node.xattrs.items())))


def tree_view(tree: Tree) -> dict[bytes, tuple[object, ...]]:
    """The same of a snapshot or a merge."""
    return {path: (e.type, e.mode, e.sha or e.target, e.xattrs) for path, e in tree.items()}
