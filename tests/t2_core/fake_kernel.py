"""The kernel's side of a mount as far as it remembers: entries, attributes, listings, and what drops them.

It asks the union as edge/operations.py lets it, keeps what it was told with a time-out, and changes it
with its own operations as fs/fuse/dir.c and file.c do; the strategy's notifications arrive at once.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tests.t2_core.fake_notifier import OneByOne
from udbad.coherence.base import Coherence
from udbad.inodes.handles import OpenFile
from udbad.inodes.node import Dir, Node
from udbad.types import ROOT_ID, Caller
from udbad.union.fs import Attributes, SetAttr, UnionFs

T = TypeVar("T")

Held = dict[str, int]
"""Attributes by name, those that the kernel would not ask for."""


def fields(node: Node, st: os.stat_result) -> Held:
    """What a reply says of a node; times left out, as the union may nudge them."""
    return {
        "mode": st.st_mode, "nlink": st.st_nlink + node.nlink_extra, "uid": st.st_uid, "gid": st.st_gid,
        "size": st.st_size, "ctime": st.st_ctime_ns,
    }  # fmt: skip


class FakeKernel(OneByOne):
    """Implements coherence.base.KernelNotifier. Bind it with `mount` before the first request."""

    since: float | None = None

    def __init__(self, epochs: bool) -> None:
        self.epochs = epochs
        self.entries: dict[tuple[int, bytes], int] = {}
        """(directory, name) to node id, 0 for a name that does not exist."""
        self.attributes_of: dict[int, Held] = {}
        self.listings: dict[int, int] = {}
        """Directory to the mtime that it had when it was listed: with another one, the listing is not used."""
        self.references: Counter[int] = Counter()
        self._locked: set[int] = set()
        self._waiting: list[tuple[int, bytes]] = []
        self.notified: Counter[str] = Counter()
        self.fs: UnionFs
        self.coherence: Coherence

    def mount(self, fs: UnionFs, coherence: Coherence) -> None:
        self.fs, self.coherence = fs, coherence

    # -- notifications ------------------------------------------------------------------------

    def entry(self, parent: int, name: bytes) -> None:
        self.notified["entry"] += 1
        self._drop(parent, name)

    def expire(self, parent: int, name: bytes) -> None:
        self.notified["expire"] += 1
        self._drop(parent, name)

    def _drop(self, parent: int, name: bytes) -> None:
        """fuse_reverse_inval_entry(), which waits while a request has the directory locked."""
        if parent in self._locked:
            self._waiting.append((parent, name))
        else:
            self.entries.pop((parent, name), None)

    @contextmanager
    def _lock(self, *directories: int) -> Iterator[None]:
        self._locked = set(directories)
        try:
            yield
        finally:
            self._locked = set()
            for parent, name in self._waiting:
                self.entries.pop((parent, name), None)
            self._waiting.clear()

    def attributes(self, node: int) -> None:
        self.notified["attributes"] += 1
        self.attributes_of.pop(node, None)

    def data(self, node: int) -> None:
        self.notified["data"] += 1
        self.attributes_of.pop(node, None)
        self.listings.pop(node, None)  # its pages: fuse_readdir_cached() begins anew where one is missing

    def everything(self) -> bool:
        if self.epochs:
            self.notified["epoch"] += 1
            self.entries.clear()
            self.listings.clear()
        return self.epochs

    # -- replies ------------------------------------------------------------------------------

    def _told_attributes(self, node: Node, st: os.stat_result) -> None:
        if self.coherence.attr_ttl(node, st):
            self.attributes_of[node.id] = fields(node, st)
        else:
            self.attributes_of.pop(node.id, None)

    def _told_entry(self, parent: int, name: bytes, found: Attributes) -> int:
        node, st = found
        self._told_attributes(node, st)
        if type(node) is Dir:  # has one dentry: d_splice_alias()
            self.entries = {key: number for key, number in self.entries.items() if number != node.id}
        if self.fs.table.directory(parent).ttl:
            self.entries[parent, name] = node.id
        else:
            self.entries.pop((parent, name), None)
        self.fs.table.refer(node)
        self.references[node.id] += 1
        return node.id

    def _perform(self, operation: Callable[[], T], *directories: int) -> T:
        """As edge/waiting.py: once more when a branch changed underneath."""
        try:
            return self.fs.run(operation)
        except OSError as error:
            if error.errno != errno.ESTALE or not directories:
                raise
        for number in directories:
            self.fs.recover(number)
        return self.fs.run(operation)

    def _dir_changed(self, *directories: int) -> None:
        """fuse_dir_changed()."""
        for number in directories:
            self.attributes_of.pop(number, None)
            self.listings.pop(number, None)

    def _masked(self, number: int, *names: str) -> None:
        """fuse_invalidate_attr_mask()."""
        for name in names:
            self.attributes_of.get(number, {}).pop(name, None)

    # -- requests -----------------------------------------------------------------------------

    def look_up(self, parent: int, name: bytes) -> int:
        """Node id, 0 for none; asked for only when it is not remembered."""
        if (parent, name) in self.entries:
            return self.entries[parent, name]
        with self._lock(parent):
            found = self._perform(lambda: self.fs.lookup(parent, name), parent)
            if found is not None:
                return self._told_entry(parent, name, found)
            self.entries.pop((parent, name), None)
            if self.coherence.negative_ttl(self.fs.table.directory(parent), name):
                self.entries[parent, name] = 0
            return 0

    def walk(self, path: Sequence[bytes]) -> int:
        """Raises FileNotFoundError, NotADirectoryError."""
        number: int = ROOT_ID
        for name in path:
            if type(self.fs.table.node(number)) is not Dir:
                raise NotADirectoryError
            number = self.look_up(number, name)
            if not number:
                raise FileNotFoundError
        return number

    def stat(self, number: int, *wanted: str) -> Held:
        """fuse_update_get_attr(): asks when one of the wanted attributes (none: all) is not held."""
        held = self.attributes_of.get(number, {})
        names = wanted or ("mode", "nlink", "uid", "gid", "size", "ctime")
        if all(name in held for name in names):
            return held
        node, st = self._perform(lambda: self.fs.getattr(number))
        if type(node) is Dir and node.cached_opens and not node.trusted:
            self.fs.table.changed(node)
            node.mtime_offset += 1  # as edge/operations.py
        self._told_attributes(node, st)
        return fields(node, st)

    def create(self, parent: int, name: bytes, mode: int, caller: Caller) -> OpenFile:
        flags = os.O_RDWR | os.O_CREAT
        with self._lock(parent):
            handle, st = self._perform(lambda: self.fs.create(parent, name, flags, mode, caller), parent)
            self._told_entry(parent, name, (handle.node, st))
        self._dir_changed(parent)
        return handle

    def mkdir(self, parent: int, name: bytes, caller: Caller) -> None:
        self._made(parent, name, lambda: self.fs.mkdir(parent, name, 0o755, caller))

    def link(self, number: int, parent: int, name: bytes) -> None:
        self._made(parent, name, lambda: self.fs.link(number, parent, name))

    def _made(self, parent: int, name: bytes, operation: Callable[[], Attributes]) -> None:
        with self._lock(parent):
            self._told_entry(parent, name, self._perform(operation, parent))
        self._dir_changed(parent)

    def unlink(self, parent: int, name: bytes, number: int) -> None:
        with self._lock(parent):
            self._perform(lambda: self.fs.unlink(parent, name), parent)
        self._gone(parent, name, number)

    def rmdir(self, parent: int, name: bytes, number: int) -> None:
        with self._lock(parent, number):
            self._perform(lambda: self.fs.rmdir(parent, name), parent)
        self._gone(parent, name, number)
        self.entries = {key: child for key, child in self.entries.items() if key[0] != number}

    def _gone(self, parent: int, name: bytes, number: int) -> None:
        self.entries.pop((parent, name), None)
        self._masked(number, "nlink", "ctime")
        self._dir_changed(parent)

    def rename(self, src_dir: int, src: bytes, dst_dir: int, dst: bytes, flags: int = 0) -> None:
        with self._lock(src_dir, dst_dir):
            self._perform(lambda: self.fs.rename(src_dir, src, dst_dir, dst, flags), src_dir, dst_dir)
            # d_move() and d_exchange(): a dentry takes its time-out along.
            moved, other = self.entries.pop((src_dir, src), 0), self.entries.pop((dst_dir, dst), 0)
            if moved:
                self.entries[dst_dir, dst] = moved
            if flags and other:
                self.entries[src_dir, src] = other
        self._dir_changed(src_dir, dst_dir)
        for number in (moved, other):
            self._masked(number, "ctime", "nlink")

    def set_attributes(self, number: int, changes: SetAttr, caller: Caller) -> None:
        node, st = self._perform(lambda: self.fs.setattr(number, changes, None, caller))
        self._told_attributes(node, st)

    def open(self, number: int, flags: int, caller: Caller) -> OpenFile:
        handle, st = self._perform(lambda: self.fs.open(number, flags, caller))
        self.coherence.keep_cache(handle.node, st)
        if flags & os.O_TRUNC:
            self._masked(number, "size", "ctime")
        return handle

    def write(self, handle: OpenFile, data: bytes) -> None:
        self._perform(lambda: self.fs.write(handle.fh, 0, data))
        self._masked(handle.node.id, "size", "ctime")

    def release(self, handle: OpenFile) -> None:
        self.fs.release(handle.fh)

    def read_directory(self, number: int) -> list[bytes]:
        """READDIRPLUS of a whole directory, kept where edge/operations.py lets it be (FOPEN_CACHE_DIR)."""
        handle = self._perform(lambda: self.fs.opendir(number), number)
        node = handle.node
        names = []
        try:
            if node.ttl:
                handle.cached = True
                node.cached_opens += 1
                self.listings[number] = self._mtime(node)
            for name, child, st, _ in self.fs.readdir(handle.fh, 0):
                if name not in (b".", b".."):
                    self._told_entry(number, name, (child, st))
                    names.append(name)
        finally:
            self.fs.releasedir(handle.fh)
        return names

    def _mtime(self, node: Dir) -> int:
        return self.fs.sb.stat(node).st_mtime_ns + node.mtime_offset

    def forget_all(self) -> None:
        for number, count in reversed(list(self.references.items())):
            self.fs.forget(number, count)
        self.references.clear()
        self.entries.clear()
        self.attributes_of.clear()

    # -- what is to hold ----------------------------------------------------------------------

    def too_much(self) -> list[str]:
        """What the kernel remembers of directories that are not trusted, which nobody would tell it to forget."""
        nodes = self.fs.table.nodes
        found = []
        for (parent, name), number in self.entries.items():
            directory = nodes.get(parent)
            if type(directory) is not Dir or not directory.trusted:
                found.append(f"{name!r} of directory {parent} as {number or 'missing'}")
        for number in self.attributes_of:
            node = nodes.get(number)
            if node is None or node.dead:
                continue  # open at most: its own descriptor is what counts
            directories = [node] if type(node) is Dir else [parent for parent, _ in node.names()]
            if not any(directory.trusted for directory in directories):
                found.append(f"attributes of {number}")
        for number, mtime in self.listings.items():
            node = nodes.get(number)
            if type(node) is Dir and not node.dead and not node.trusted and self._mtime(node) == mtime:
                found.append(f"listing of {number}")
        return found
