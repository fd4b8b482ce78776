"""Open files and directories of the mount, by file handle number.

The descriptor of an `OpenFile` always is of the object that holds its node's data: whoever moves the data to another
object (copy-up, carrying down) moves every open file in the same step (`OpenFile.reopen`). So it stays usable
whatever becomes of the object's names afterwards.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from collections.abc import Callable
from typing import Any

from udbad.branch import datacalls, syscalls
from udbad.errors import eio, os_error
from udbad.inodes.names import Names
from udbad.inodes.node import Dir, Node
from udbad.inodes.record import Record
from udbad.types import Caller, Fh

Number = int
"""Of a handle, or what the kernel says is one."""


class OpenFile:
    """One open(2) of a regular file. flags: as given by the caller; uid, gid, pid: who opened it.

    group: of the opener's supplementary groups the one that keeps the setgid bit, if any.
    writable: whether `fd` may be written. id_bits: setuid and setgid bits that the file had when the kernel was told of
    them; a write may take them away. backing_id: of the branch's file, when the kernel uses that itself
    (kernel/passthrough.py), else 0; of all open files of a node it is the same.
    """

    __slots__ = ("backing_id", "fd", "fh", "flags", "gid", "group", "id_bits", "node", "pid", "uid", "writable")

    def __init__(self, fh: Fh, node: Node, fd: int, flags: int, caller: Caller, writable: bool) -> None:
        self.fh = fh
        self.node = node
        self.fd = fd
        self.flags = flags
        self.uid = caller.uid
        self.gid = caller.gid
        self.pid = caller.pid
        self.group: int | None = None
        self.id_bits = 0
        self.backing_id = 0
        self.writable = writable

    def reopen(self, fd: int, writable: bool) -> None:
        """Have the handle lead to the object behind the descriptor `fd`, which stays the caller's.

        writable: whether that may be written to. The new descriptor gets the old number with dup2(2), so that a thread
        that reads meanwhile never sees a closed one. Where no new one is to be had (EMFILE, ENFILE, ENOMEM), `fd`
        itself is duplicated: its O_APPEND and O_SYNC count then, but nobody loses an open file. Raises OSError when
        `fd` is our own descriptor.

        dup2 does not tell what closing the old descriptor would have (dup(2)). Nothing is lost with that: what was
        written through it went into the copy that `fd` leads to, and how that fared was asked before it got its name.
        """
        flags = self.flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC)
        if not writable:
            flags = flags & ~os.O_ACCMODE | os.O_RDONLY
        try:
            opened = syscalls.reopen(fd, flags)
        except OSError:
            if fd == self.fd:
                raise
            os.dup2(fd, self.fd, inheritable=False)
        else:
            os.dup2(opened, self.fd, inheritable=False)
            datacalls.close_quietly(opened)  # the other descriptor of it tells, when that is closed
        self.writable = writable and flags & os.O_ACCMODE != os.O_RDONLY


def backing_id(node: Node) -> int:
    """By which the kernel uses the branch's file of a node itself, whose data must stay there then. 0: it does not."""
    return node.handles[0].backing_id if node.handles else 0


def written_behind(node: Node) -> bool:
    """Whether the kernel may write to a node's file without telling, so that attributes are good for now only."""
    return backing_id(node) != 0 and any(handle.writable for handle in node.handles or ())


ID_BITS = st_mod.S_ISUID | st_mod.S_ISGID


def note_id_bits(node: Node, st: os.stat_result) -> None:
    """The kernel asks for attributes of an open file anew, and will see these setuid and setgid bits."""
    for handle in node.handles or ():
        handle.id_bits = st.st_mode & ID_BITS


class OpenDir:
    """One opendir(3): a private snapshot of names, taken at the first read (semantics 5).

    base: the position at which the snapshot begins. cached: the kernel may answer from a listing of its own. numbering:
    how inode numbers of the branch directories are told (union/readdir.py), once somebody has asked.
    """

    __slots__ = ("base", "cached", "fh", "names", "node", "numbering", "pid")

    def __init__(self, fh: Fh, node: Dir, pid: int) -> None:
        self.fh = fh
        self.pid = pid
        self.node = node
        self.names: Names | None = None
        self.base = 0
        self.cached = False
        self.numbering: Any = None


def kept_number(node_id: Number) -> Fh:
    """Of what stands for everybody who has a node open without our knowing: the node's, negative.

    By Python's arithmetic: a compiled node's id is a number without a sign.
    """
    return Fh(-node_id)


class HandleTable:
    """File handle numbers. No locking: used from the event loop only."""

    def __init__(self) -> None:
        self.files: dict[int, OpenFile] = {}
        self.dirs: dict[int, OpenDir] = {}
        self.lost: dict[int, OpenFile] = {}
        """Files that are open on a branch that does not answer. Their descriptors are only kept: close(2) may wait."""
        self.unheard: dict[int, Dir] = {}
        """Directories whose readers a predecessor answered, by handle: the last answer may still be taken in."""
        self.unsure: set[Dir] = set()
        """Directories of which the kernel may come to have a listing in that way."""
        self.next = 1
        """The number of the next handle. One that was closed may be told of again, so none is given twice."""
        self.record: Record | None = None
        """As in InodeTable."""
        self.on_missing: Callable[[int], OpenFile] | None = None
        """Opens the file for a negative number, which no open(2) has given (union/kept.py)."""
        self.on_missing_dir: Callable[[int], OpenDir] | None = None
        """The same for directories."""

    def changed(self, handle: OpenFile | OpenDir) -> None:
        """What the record says of a handle is not so any more, in the same operation."""
        if self.record is not None:
            self.record.changed.add(handle)

    def put_back(self, handle: OpenFile | OpenDir) -> None:
        """A handle that a predecessor gave out."""
        if type(handle) is OpenDir:
            self.dirs[handle.fh] = handle
        elif type(handle) is OpenFile:
            self._keep(handle, handle.fh < 0)

    def put_back_lost(self, handle: OpenFile) -> None:
        """The same of a file that cannot be used now."""
        self.lost[handle.fh] = handle
        self.changed(handle)

    def _keep(self, handle: OpenFile, first: bool = False) -> OpenFile:
        node = handle.node
        self.files[handle.fh] = handle
        if node.handles is None:
            node.handles = [handle]
        else:
            node.handles.insert(0 if first else len(node.handles), handle)
        self.changed(handle)
        return handle

    def _number(self) -> Fh:
        fh = self.next
        self.next += 1
        return Fh(fh)

    def add_file(self, node: Node, fd: int, flags: int, caller: Caller, writable: bool) -> OpenFile:
        return self._keep(OpenFile(self._number(), node, fd, flags, caller, writable))

    def add_kept(self, node: Node, fd: int, flags: int, caller: Caller) -> OpenFile:
        """An open file of the node itself, whose number is the node's, negative."""
        return self._keep(OpenFile(kept_number(node.id), node, fd, flags, caller, False), first=True)

    def add_dir(self, node: Dir, pid: int) -> OpenDir:
        handle = OpenDir(self._number(), node, pid)
        self.dirs[handle.fh] = handle
        self.changed(handle)
        return handle

    def add_kept_dir(self, node: Dir) -> OpenDir:
        """What stands for all who have a directory open without our knowing; its number is the node's, negative."""
        handle = OpenDir(kept_number(node.id), node, 0)
        self.dirs[handle.fh] = handle
        handle.cached = True
        node.cached_opens += 1
        self.changed(handle)
        return handle

    def file(self, fh: Number) -> OpenFile:
        """Raises EBADF for a handle that is not open, EIO for one of a branch that does not answer."""
        try:
            return self.files[fh]
        except KeyError:
            if fh in self.lost:
                raise eio() from None
            if fh >= 0 or self.on_missing is None:
                raise os_error(errno.EBADF) from None
        return self.on_missing(fh)

    def directory(self, fh: int) -> OpenDir:
        """Raises EBADF for a handle that is not open."""
        try:
            return self.dirs[fh]
        except KeyError:
            if fh >= 0 or self.on_missing_dir is None:
                raise os_error(errno.EBADF) from None
        return self.on_missing_dir(fh)

    def remove_file(self, fh: Number) -> OpenFile:
        """Close an open file; what it was is returned. An error of close(2) goes nowhere here, FLUSH has told it."""
        handle = self.file(fh)
        del self.files[fh]
        self.changed(handle)
        handles = handle.node.handles
        if handles is not None:
            handles.remove(handle)
            if not handles:
                handle.node.handles = None
        datacalls.close_quietly(handle.fd)
        return handle

    def drop_lost(self, fh: int) -> OpenFile | None:
        """Forget a handle of a branch that does not answer; None when it is none. Its descriptor stays open."""
        handle = self.lost.pop(fh, None)
        if handle is not None:
            self.changed(handle)
        return handle

    def remove_dir(self, fh: int) -> None:
        handle = self.dirs.pop(fh, None)
        if handle is not None:
            self.changed(handle)
            if handle.cached:
                handle.node.cached_opens -= 1

    def __len__(self) -> int:
        return len(self.files) + len(self.dirs) + len(self.lost)
