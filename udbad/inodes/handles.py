"""Open files and directories of the mount, by file handle number.

An `OpenFile` follows its node: when the node's data moves to another branch (copy-up), the next
operation re-opens it there and puts the new descriptor under the old number with dup2, so that a
worker thread that reads meanwhile never sees a closed descriptor.
"""

from __future__ import annotations

import errno

from udbad.branch import syscalls
from udbad.errors import os_error
from udbad.inodes.table import Dir, Node
from udbad.types import Caller, Fh


class OpenFile:
    """One open(2) of a regular file. flags: as given by the caller; uid, gid, pid: who opened it.

    group: of the opener's supplementary groups the one that keeps the setgid bit, if any.
    writable: whether `fd` may be written. gen: generation of the node's data that `fd` belongs to.
    """

    __slots__ = ("fd", "fh", "flags", "gen", "gid", "group", "node", "pid", "uid", "writable")

    def __init__(self, fh: Fh, node: Node, fd: int, flags: int, caller: Caller, writable: bool) -> None:
        self.fh = fh
        self.node = node
        self.fd = fd
        self.flags = flags
        self.uid = caller.uid
        self.gid = caller.gid
        self.pid = caller.pid
        self.group: int | None = None
        self.gen = node.gen
        self.writable = writable


class OpenDir:
    """One opendir(3): a private snapshot of names, taken at the first read (spec section 5).

    number: of the snapshot, part of every offset in it. cached: the kernel may answer from a listing of its own.
    """

    __slots__ = ("cached", "fh", "hits", "names", "node", "number", "pid")

    def __init__(self, fh: Fh, node: Dir, pid: int) -> None:
        self.fh = fh
        self.pid = pid
        self.node = node
        self.names: list[bytes] | None = None
        self.number = 0
        self.cached = False
        self.hits: dict[bytes, int | tuple[int, ...] | None] = {}


class HandleTable:
    """File handle numbers. No locking: used from the event loop only."""

    def __init__(self) -> None:
        self.files: dict[int, OpenFile] = {}
        self.dirs: dict[int, OpenDir] = {}
        self._next = 1

    def _number(self) -> Fh:
        fh = self._next
        self._next += 1
        return Fh(fh)

    def add_file(self, node: Node, fd: int, flags: int, caller: Caller, writable: bool) -> OpenFile:
        handle = OpenFile(self._number(), node, fd, flags, caller, writable)
        self.files[handle.fh] = handle
        if node.handles is None:
            node.handles = [handle]
        else:
            node.handles.append(handle)
        return handle

    def add_dir(self, node: Dir, pid: int) -> OpenDir:
        handle = OpenDir(self._number(), node, pid)
        self.dirs[handle.fh] = handle
        return handle

    def file(self, fh: int) -> OpenFile:
        """Raises EBADF for a handle that is not open."""
        try:
            return self.files[fh]
        except KeyError:
            raise os_error(errno.EBADF) from None

    def directory(self, fh: int) -> OpenDir:
        try:
            return self.dirs[fh]
        except KeyError:
            raise os_error(errno.EBADF) from None

    def remove_file(self, fh: int) -> OpenFile:
        """Close an open file; what it was is returned. An error of close(2) goes nowhere here, FLUSH has told it."""
        handle = self.file(fh)
        del self.files[fh]
        handles = handle.node.handles
        if handles is not None:
            handles.remove(handle)
            if not handles:
                handle.node.handles = None
        syscalls.close_quietly(handle.fd)
        return handle

    def remove_dir(self, fh: int) -> None:
        handle = self.dirs.pop(fh, None)
        if handle is not None and handle.cached:
            handle.node.cached_opens -= 1

    def __len__(self) -> int:
        return len(self.files) + len(self.dirs)
