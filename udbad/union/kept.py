"""io=cached: what the kernel opens by itself, without telling (no_open and no_opendir, linux/fuse.h).

A request about such a file names no handle. It is served by one open file for each node, which is opened when it is
made or the first request needs it, and kept: of nodes with a name as long as there is room, of those without, which
nothing else leads to any more, until the kernel forgets them. In the table of handles its number is the node's,
negative, so that whatever is done for open files (moving to a copy, telling the kernel of new content) is done for it.

Who opened the file in the kernel, and whether to write, is not known. It is opened for reading, for writing with the
first write, and closed soon after the last one: a file that is open for writing cannot be executed on its branch.
New content is written with nobody's rights, so that setuid and setgid bits go, whoever writes.

Of a directory, one open directory in the same way stands for all who read it. That is given up when others are read:
where somebody is in a listing, the position tells, by the listings of the node (readdir.py).
"""

from __future__ import annotations

import os
import stat as st_mod
from collections import OrderedDict
from collections.abc import Callable, Container
from time import monotonic
from typing import Final

from udbad.branch import syscalls
from udbad.branch.credentials import Credentials
from udbad.inodes.handles import ID_BITS, OpenDir, OpenFile, kept_number
from udbad.inodes.node import Node
from udbad.types import Caller
from udbad.union import ranges
from udbad.union.superblock import Superblock

_WRITE_FLAGS: Final = os.O_APPEND | os.O_SYNC | os.O_DSYNC
_NOBODY: Final = Caller(65534, 65534, 0, 0)
WRITING_SECONDS: Final = 1.0
"""How long a file stays open for writing after the last write."""
_LISTINGS: Final = 64
"""Directories, of those that were read last, whose snapshots are kept as they were."""


class KeptFiles:
    """The open files that nobody closes. Event loop only."""

    def __init__(self, sb: Superblock, most: int, open_fd: Callable[[Node, int], tuple[int, os.stat_result]]) -> None:
        """most: how many of nodes with a name are kept. open_fd: opens the object of a node (UnionFs)."""
        self._sb = sb
        self._most = most
        self._open_fd = open_fd
        self._named: OrderedDict[int, OpenFile] = OrderedDict()
        """By node id, oldest first; some of their nodes may have lost their names."""
        self._nameless: dict[int, OpenFile] = {}
        self._changes: dict[ranges.Change, list[OpenFile]] = {}
        self._in_use: dict[int, int] = {}
        """By node id: how many threads use the descriptor."""
        self._written: dict[int, float] = {}
        """By node id: when it was last written to."""
        self.on_written: Callable[[], None] = lambda: None
        """Called when something is open for writing, and nothing was: from then on `rest` has something to do."""
        sb.handles.on_missing = self.open
        sb.handles.on_missing_dir = self.open_directory

    def open(self, fh: int) -> OpenFile:
        """The open file of the node -fh, which has none yet. Raises ESTALE when nothing leads to it."""
        node = self._sb.table.node(-fh)
        fd, st = self._open_fd(node, os.O_RDONLY)
        return self._add(node, fd, st)

    def created(self, node: Node, fd: int, st: os.stat_result) -> OpenFile:
        """The open file of what was just made, which its maker is about to write to. fd: open for reading and
        writing."""
        handle = self._add(node, fd, st)
        handle.writable = True
        self.written(handle)
        return handle

    def _add(self, node: Node, fd: int, st: os.stat_result) -> OpenFile:
        handle = self._sb.handles.add_kept(node, fd, os.O_RDWR, _NOBODY)
        handle.id_bits = st.st_mode & ID_BITS
        self._named[node.id] = handle
        if len(self._named) > self._most:
            self._make_room()
        return handle

    def open_directory(self, fh: int) -> OpenDir:
        """The open directory of the node -fh, which has none. Raises ESTALE for what is no directory."""
        handles = self._sb.handles
        node = self._sb.table.directory(-fh)
        if len(handles.dirs) >= _LISTINGS:
            handles.remove_dir(next(iter(handles.dirs)))
        return handles.add_kept_dir(node)

    def put_back(self, handle: OpenFile) -> None:
        """A file that a predecessor kept."""
        node = handle.node
        if node.dead or node.parent is None:
            self._nameless[node.id] = handle
        else:
            self._named[node.id] = handle
        if handle.writable:
            self.written(handle)

    def _make_room(self) -> None:
        """Close the oldest that can be closed; never the newest, which is about to be used."""
        for _ in range(len(self._named) - 1):
            node_id, handle = self._named.popitem(last=False)
            node = handle.node
            if node.dead or node.parent is None:
                self._nameless[node_id] = handle
            elif node_id in self._in_use:
                self._named[node_id] = handle
                continue
            else:
                self._close(handle)
            if len(self._named) <= self._most:
                return

    def hold(self, node: Node | None) -> None:
        """A node may be about to lose its last name, and somebody may have it open."""
        if node is None or node.kind != st_mod.S_IFREG or node.nlookup <= 0 or node.handles or node.orphan_fd >= 0:
            return
        record = self._sb.handles.record
        try:
            self.open(kept_number(node.id))
            if record is not None:
                record.flush()  # whoever is killed when the name is gone has said by then what leads there
        except OSError:
            pass  # gone already, or no room: that is said after the operation, which nobody is denied for it

    def released(self, handle: OpenFile) -> None:
        """A file that was just made is about to be closed here, as the kernel gets no handle. If nothing else leads to
        its node, it is kept, for who has it open."""
        node = handle.node
        nameless = node.dead or node.parent is None
        if nameless and node.handles == [handle] and node.nlookup > 0 and node.orphan_fd < 0:
            try:
                self.open(kept_number(node.id))
            except OSError:
                pass  # EMFILE: it is ESTALE for whoever that is

    def forget(self, node_id: int) -> None:
        """The kernel has forgotten the node: nobody has it open."""
        self._sb.handles.remove_dir(-node_id)
        handle = self._named.pop(node_id, None) or self._nameless.pop(node_id, None)
        if handle is not None:
            self._close(handle)

    def leave(self, opened: Container[int]) -> None:
        """Close all but those that somebody has open, by their node ids: the branches will be others."""
        for files in (self._named, self._nameless):
            for node_id, handle in list(files.items()):
                if node_id not in opened and node_id not in self._in_use:
                    del files[node_id]
                    self._close(handle)

    def _close(self, handle: OpenFile) -> None:
        self._written.pop(handle.node.id, None)
        self._sb.handles.remove_file(handle.fh)

    # -- while it is used ---------------------------------------------------------------------------

    def begin(self, change: ranges.Change, handles: list[OpenFile]) -> None:
        """A thread is about to use the descriptors of these, until `end`."""
        self._changes[change] = handles
        for handle in handles:
            self._in_use[handle.node.id] = self._in_use.get(handle.node.id, 0) + 1
            if handle.writable:
                self.written(handle)

    def end(self, change: ranges.Change) -> None:
        for handle in self._changes.pop(change):
            node_id = handle.node.id
            self._in_use[node_id] -= 1
            if not self._in_use[node_id]:
                del self._in_use[node_id]

    def write(self, creds: Credentials, handle: OpenFile, offset: int, data: bytes | memoryview, flags: int) -> int:
        """Bytes written, which `flags` of open(2) are about. Raises NeedCopyUp at the first write to a lower file."""
        if not handle.writable:
            ranges.require_writable(handle)
        self.written(handle)
        changes = self._sb.changes
        changes.before_data(handle.node, handle.fd)
        if flags & os.O_APPEND and self._sb.slot is not None:
            self._sb.slot.intend(1, syscalls.fstat(handle.fd).st_size)
        with creds.writing(handle.uid, handle.gid):
            if flags & _WRITE_FLAGS:
                count = os.pwritev(handle.fd, [data], offset, _write_flags(flags))
            else:
                count = os.pwrite(handle.fd, data, offset)
        changes.data(handle.node, True, None, handle.fd)
        if handle.id_bits:
            ranges.look_at_id_bits(self._sb, handle)
        return count

    def written(self, handle: OpenFile) -> None:
        if not self._written:
            self.on_written()
        self._written[handle.node.id] = monotonic()

    def rest(self, seconds: float = WRITING_SECONDS) -> bool:
        """Have nothing open for writing that has not been written to for so long; whether anything still is."""
        before = monotonic() - seconds
        for node_id in [node_id for node_id, last in self._written.items() if last <= before]:
            handle = self._sb.handles.files.get(-node_id)
            if node_id in self._in_use:
                continue
            del self._written[node_id]
            if handle is None or not handle.writable:
                continue
            node = handle.node
            if node.dead or node.parent is None:
                continue  # nobody will execute it
            fd = syscalls.reopen(handle.fd, os.O_RDONLY)
            os.dup2(fd, handle.fd, inheritable=False)
            os.close(fd)
            handle.writable = False
        return bool(self._written)

    def __len__(self) -> int:
        return len(self._named) + len(self._nameless)


def _write_flags(flags: int) -> int:
    """RWF_* of pwritev2(2) for the flags of an open file."""
    result = 0
    if flags & os.O_APPEND:
        result |= os.RWF_APPEND
    if flags & os.O_SYNC == os.O_SYNC:
        result |= os.RWF_SYNC
    elif flags & os.O_DSYNC:
        result |= os.RWF_DSYNC
    return result
