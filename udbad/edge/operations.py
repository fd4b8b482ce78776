"""Every operation that the kernel asks for, once, in plain values: what both edges (native.py, portable.py) call.

A method takes node ids, bytes, numbers and a Caller, runs to its end on the event loop, and returns what the answer
says. Of nodes that it names the kernel then holds a reference, of handles that they are open: who cannot deliver the
answer takes both back (`unlisted`, `forget`, `release`, `releasedir`). Nothing here waits. An operation raises

- NeedCopyUp, before it has changed anything: it is started again after the copy-up (waiting.py), or, where the copy-up
  is the whole operation, is ended by `NeedCopyUp.then`;
- Later, when what is left may take long (a disk, a server) and needs no event loop, but for its end;
- OSError: ESTALE, EMFILE and ENFILE have changed nothing either.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Final, NamedTuple, NoReturn

from udbad.branch import datacalls, whiteout
from udbad.coherence.base import Coherence
from udbad.inodes.handles import OpenFile
from udbad.inodes.node import Dir, Node
from udbad.kernel.passthrough import Passthrough
from udbad.kernel.wire import CACHE_DIR, KEEP_CACHE, NO_FLUSH, PASSTHROUGH
from udbad.types import Caller
from udbad.union import remove
from udbad.union.fs import SetAttr, UnionFs
from udbad.union.ranges import Change, seeker
from udbad.union.readdir import Name, Run
from udbad.union.superblock import NeedCopyUp

Attributes = tuple[Node, os.stat_result, float]
"""node, status, how long (seconds) the kernel may keep it."""
Entry = tuple[Node, os.stat_result, float, float]
"""node, status, how long the name may be kept, how long the status; a reference on the node goes with it."""
Opened = tuple[int, int, int]
"""handle, FOPEN_* flags (kernel/wire.py), backing id (kernel/passthrough.py)."""
Listed = tuple[bytes, Node, os.stat_result, float, float, int, bool]
"""name, node, status, time-outs as in Entry, position of the entry after it, whether a reference goes with it."""

Number = int
Found = tuple[Node, os.stat_result]
"""What has a name."""
DOTS: Final = (b".", b"..")
_FEW: Final = 64 << 10
"""Bytes that may be looked for again and again, each time with those copied that are there."""
AHEAD: Final = 16 << 10
"""Bytes of a file whose reading is begun when it is opened for the first time: what the kernel asks the disk for when
it is asked for the first page (get_init_ra_size() in mm/readahead.c). Its answer travels while the disk is at it."""


Negative = float
"""The answer to LOOKUP of a name that does not exist: how long (seconds) that may be kept."""


class Space(NamedTuple):
    """The answer to STATFS, statvfs(3)."""

    block_size: int
    fragment_size: int
    blocks: int
    free: int
    available: int
    files: int
    files_free: int
    longest_name: int


class Later(Exception):
    """What is left of an operation: `call` with `args`, to be made in a thread; what it returns is the result.

    then: called on the event loop before the answer, with what `call` has raised, None if nothing.

    quick: a read, which keeps a disk busy for a moment; otherwise something that may take seconds (fsync). look: gives
    the result without waiting where it is there by now, else None; a quick disk is faster than a thread. There is
    nothing to check afterwards. The kernel sends RELEASE only after the last READ, FLUSH and FSYNC were answered, and a
    copy-up meanwhile puts the new file under the same descriptor.
    """

    def __init__(
        self,
        quick: bool,
        call: Callable[..., object],
        *args: object,
        then: Callable[[Exception | None], object] | None = None,
        look: Callable[[], object] | None = None,
    ) -> None:
        super().__init__()
        self.quick = quick
        self.look = look
        self.call = call
        self.args = args
        self.then = then


Background = Callable[[Callable[[], object], Callable[[], object]], None]
"""Have the first called in a thread, and then the second one on the event loop."""


class Operations:
    """The operations of one mount. `coherence` is another one after the mode was changed."""

    def __init__(
        self,
        fs: UnionFs,
        coherence: Coherence,
        background: Background,
        keep_listings: bool = True,
        passthrough: Passthrough | None = None,
    ) -> None:
        """keep_listings: the edge can tell the kernel to keep the listing of a directory (FOPEN_CACHE_DIR).
        passthrough: gives files to the kernel; None: it asks for all it does with them."""
        self.fs = fs
        self.coherence = coherence
        self._background = background
        self._keep_listings = keep_listings
        self._passthrough = passthrough

    # -- what the kernel holds ----------------------------------------------------------------

    def entry(self, parent: Number, found: Found) -> Entry:
        """An entry of the directory `parent`, which need not be the node's: one of several links."""
        node, st = found
        table = self.fs.table
        table.refer(node)
        return node, st, table.directory(parent).ttl, self.coherence.attr_ttl(node, st)

    def forget(self, node_id: int, count: int) -> None:
        """The kernel has given back that many references."""
        self.fs.forget(node_id, count)

    # -- names --------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes, pid: int) -> Entry | Negative:
        """pid: who asks. Raises ENOENT where the kernel may not keep that there is no such name."""
        fs = self.fs
        found = fs.lookup(parent, name)
        if fs.walks.callers:
            found = fs.look_again(pid, parent, name, found)
        if found is None:
            ttl = self.coherence.negative_ttl(fs.table.directory(parent), name)
            if ttl:
                return ttl
            raise OSError(errno.ENOENT, "")
        return self.entry(parent, found)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Entry:
        return self.entry(parent, self.fs.mknod(parent, name, mode, rdev, caller))

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Entry:
        return self.entry(parent, self.fs.mkdir(parent, name, mode & 0o7777, caller))

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Entry:
        return self.entry(parent, self.fs.symlink(parent, name, target, caller))

    def link(self, node_id: int, parent: int, name: bytes) -> Entry:
        try:
            found = self.fs.link(node_id, parent, name)
        except NeedCopyUp as need:
            finish = need.then
            if finish is not None:
                need.then = lambda: self.entry(parent, finish())
            raise
        return self.entry(parent, found)

    def unlink(self, parent: int, name: bytes) -> None:
        self.fs.unlink(parent, name)

    def rmdir(self, parent: int, name: bytes) -> None:
        fs = self.fs
        fs.rmdir(parent, name)
        if fs.sb.trash:
            trash, fs.sb.trash = fs.sb.trash, []
            # After this: nothing is used but the number, which may be that of another directory by now; it is asked
            # again.
            self._background(lambda: remove.empty_trash(trash), lambda: fs.removed_later(parent))

    def rename(self, src_dir: int, src: bytes, dst_dir: int, dst: bytes, flags: int) -> None:
        self.fs.rename(src_dir, src, dst_dir, dst, flags)

    def readlink(self, node_id: int) -> bytes:
        return self.fs.readlink(node_id)

    # -- attributes ---------------------------------------------------------------------------

    def getattr(self, node_id: int) -> Attributes:
        node, st = self.fs.getattr(node_id)
        if type(node) is Dir and node.listed and not node.trusted:
            # Who has it open from better times, or opens it without telling, must not be shown the listing of then.
            self.fs.table.changed(node)
            node.mtime_offset += 1
            node.listed = False
        return node, st, self.coherence.attr_ttl(node, st)

    def statx(self, node_id: int) -> tuple[Attributes, int]:
        """Attributes, and when it was made: ns since the epoch, 0 where nobody knows."""
        attributes = self.getattr(node_id)
        return attributes, self.fs.birth_ns(attributes[0])

    def setattr(self, node_id: int, changes: SetAttr, fh: int | None, caller: Caller) -> Attributes:
        try:
            node, st = self.fs.setattr(node_id, changes, fh, caller)
        except NeedCopyUp as need:
            finish = need.then
            if finish is not None:
                need.then = lambda: self._attributes(finish())
            raise
        return node, st, self.coherence.attr_ttl(node, st)

    def _attributes(self, found: Found) -> Attributes:
        node, st = found
        return node, st, self.coherence.attr_ttl(node, st)

    def getxattr(self, node_id: int, key: bytes) -> bytes:
        return self.fs.getxattr(node_id, key)

    def find_xattr(self, node_id: Number, key: bytes) -> bytes | None:
        """`getxattr`; None for ENODATA."""
        return self.fs.find_xattr(node_id, key)

    def listxattr(self, node_id: int, caller: Caller) -> list[bytes]:
        return self.fs.listxattr(node_id, caller)

    def setxattr(
        self, node_id: int, key: bytes, value: bytes, caller: Caller, flags: int = 0, kill_sgid: bool = False
    ) -> None:
        self.fs.setxattr(node_id, key, value, caller, flags, kill_sgid)

    def removexattr(self, node_id: int, key: bytes, caller: Caller) -> None:
        self.fs.removexattr(node_id, key, caller)

    # -- files --------------------------------------------------------------------------------

    def create(self, parent: int, name: bytes, flags: int, mode: int, caller: Caller) -> tuple[Entry, Opened]:
        handle, st = self.fs.create(parent, name, flags, mode & 0o7777, caller)
        created = self.created(parent, flags, handle, st)
        self.fs.xattrs.note_new(handle.node)
        return created

    def tmpfile(self, parent: int, flags: int, mode: int, caller: Caller) -> tuple[Entry, Opened]:
        return self.created(parent, flags, *self.fs.tmpfile(parent, flags, mode & 0o7777, caller))

    def created(self, parent: int, flags: int, handle: OpenFile, st: os.stat_result) -> tuple[Entry, Opened]:
        opened = self._opened(handle, flags, st, keep=False)
        entry = self.entry(parent, (handle.node, st))
        if self.fs.kept is not None:
            # There is no RELEASE with no_open (fuse_file_put()), so the kernel gets no handle, as with open(2).
            if handle.fh >= 0:
                self.fs.release(handle.fh)
            return entry, (0, *opened[1:])
        return entry, opened

    def open(self, node_id: int, flags: int, caller: Caller) -> Opened:
        handle, st = self.fs.open(node_id, flags, caller)
        try:
            return self._opened(handle, flags, st, keep=True)
        except BaseException:
            self.fs.release(handle.fh)
            raise

    def _opened(self, handle: OpenFile, flags: int, st: os.stat_result, keep: bool) -> Opened:
        """How the kernel is to go on with a file that was opened; keep: it may have pages from earlier."""
        if self._passthrough is not None:
            backing = self._passthrough.give(handle, flags, st)
            if backing:
                self.coherence.opened_behind(handle.node, st)
                return handle.fh, PASSTHROUGH | NO_FLUSH, backing
        answer = 0 if self.fs.needs_flush(flags) else NO_FLUSH
        if keep:
            first = handle.node.seen is None
            if self.coherence.keep_cache(handle.node, st):
                answer |= KEEP_CACHE
            if first and 0 < st.st_size <= AHEAD and handle.node.branch.local:
                datacalls.start_reading(handle.fd)
        return handle.fh, answer, 0

    def read(self, fh: int, offset: int, size: int) -> bytes | bytearray:
        """What is in memory; for the rest, Later."""
        fd = self.fs.handles.file(fh).fd
        data = datacalls.read_cached(fd, size, offset)
        if type(data) is not bool:
            return data
        call: Callable[[int, int, int], bytes] = os.pread
        own = fh < 0  # may be closed before a RELEASE, of which there is none
        if own:
            fd, call = os.dup(fd), datacalls.read_and_close
        look = partial(_look, fd, size, offset, own) if data and size <= _FEW else None
        raise Later(True, call, fd, size, offset, look=look)

    def write(self, fh: int, offset: int, data: bytes | memoryview) -> int:
        return self.fs.write(fh, offset, data)

    def write_kept(self, fh: int, offset: int, data: bytes | memoryview, flags: int) -> int:
        """flags: of the open(2) that nobody has told of."""
        return self.fs.write_kept(fh, offset, data, flags)

    def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        self._change(self.fs.fallocate(fh, mode, offset, length))

    def copy_file_range(self, fh_in: int, offset_in: int, fh_out: int, offset_out: int, length: int) -> int:
        self._change(self.fs.copy_file_range(fh_in, offset_in, fh_out, offset_out, length))

    def _change(self, change: Change) -> NoReturn:
        """Zeros to write, extents to look for, data to copy."""
        raise Later(False, change.run, then=lambda error: self.fs.changed(change, error is not None))

    def lseek(self, fh: int, offset: int, whence: int) -> int:
        handle = self.fs.handles.file(fh)
        seek = seeker(handle, whence)
        if fh >= 0 and not handle.node.branch.local:
            raise Later(True, seek, handle.fd, offset, whence)
        return seek(handle.fd, offset, whence)

    def flush(self, fh: int) -> None:
        # Never ENOSYS, which would hold for branches that are added later, too: OPEN says per file whether to ask.
        fd = self.fs.flush(fh)
        if fd is not None:
            raise Later(False, datacalls.flush, fd)

    def fsync(self, fh: int, data_only: bool) -> None:
        # Whatever the descriptor was opened for, as fsync(2) is about the file: `sync FILE` opens it for reading. On
        # a read-only branch too, where others write.
        fd = self.fs.handles.file(fh).fd
        if fh < 0:
            raise Later(False, _sync_all, [os.dup(fd)], data_only)
        raise Later(False, datacalls.sync_file, fd, data_only)

    def release(self, fh: int) -> None:
        self.fs.release(fh)

    # -- directories --------------------------------------------------------------------------

    def opendir(self, node_id: int, pid: int) -> Opened:
        handle = self.fs.opendir(node_id, pid)
        node = handle.node
        if not self._keep_listings or not node.ttl or self.fs.sb.options.show_whiteouts:
            return handle.fh, 0, 0
        flags = CACHE_DIR | KEEP_CACHE
        if self.fs.handles.unsure and node in self.fs.handles.unsure:
            flags = self._listing_anew(node)
            if not flags:
                return handle.fh, 0, 0
        handle.cached = True
        node.cached_opens += 1
        return handle.fh, flags, 0

    def _listing_anew(self, node: Dir) -> int:
        """How a directory is opened that others were reading when this process took over.

        What they had been answered is perhaps taken in only now, and was true then. Until each of them has been heard
        of, nobody uses the kernel's listing; who comes next drops it (fuse_dir_open()), and may fill it again.
        """
        handles = self.fs.handles
        if node in handles.unheard.values():
            return 0
        handles.unsure.discard(node)
        return CACHE_DIR

    def _heard(self, fh: int) -> None:
        """Whoever asks has taken in what was answered before."""
        node = self.fs.handles.unheard.pop(fh, None)
        if node is not None:
            self.coherence.notifier.data(node.id)  # who has it open as well may begin anew

    def entries(self, fh: int, start: int) -> Generator[Listed, None, None]:
        """Entries from a position on, with attributes. Who takes one asks for the next; who has no room for one closes
        the generator, and then no reference goes with it.

        An error comes as from getdents64(2): first what there is, and it when it is met again at the start of a reply.
        """
        fs, attr_ttl = self.fs, self.coherence.attr_ttl
        if fs.handles.unheard:
            self._heard(fh)
        directory = fs.handles.directory(fh).node
        given: list[Node] = []
        begun = False
        try:
            for name, node, st, after in fs.readdir(fh, start):
                try:
                    if name in DOTS:
                        yield name, node, st, 0.0, 0.0, after, False
                    else:
                        yield name, node, st, directory.ttl, attr_ttl(node, st), after, True
                        fs.table.refer(node)
                        given.append(node)
                except GeneratorExit:
                    self.coherence.not_sent(node)
                    fs.table.not_sent(node)
                    return
                begun = True
        except OSError:
            if not begun:
                raise
        except Exception:
            self.unlisted(given)
            raise

    def names(self, fh: int, start: int) -> Iterator[Name | Run]:
        """Names from a position on, without attributes; no reference goes with any. OSError comes first."""
        if self.fs.handles.unheard:
            self._heard(fh)
        return self.fs.readdir_names(fh, start)

    def unlisted(self, nodes: list[Node]) -> None:
        """The kernel has not taken these entries after all."""
        for node in nodes:
            self.fs.forget(node.id, 1)

    def releasedir(self, fh: int) -> None:
        if self.fs.handles.unheard:
            self._heard(fh)
        self.fs.releasedir(fh)

    def fsyncdir(self, fh: int, data_only: bool) -> None:
        raise Later(False, _sync_all, self.fs.directory_fds(fh), data_only)

    # -- the whole ----------------------------------------------------------------------------

    def statfs(self) -> Space:
        parts = self.fs.statfs()
        size = min(part.f_frsize for part in parts)
        return Space(
            block_size=parts[0].f_bsize,
            fragment_size=size,
            blocks=sum(part.f_blocks * part.f_frsize for part in parts) // size,
            free=sum(part.f_bfree * part.f_frsize for part in parts) // size,
            available=sum(part.f_bavail * part.f_frsize for part in parts) // size,
            files=sum(part.f_files for part in parts),
            files_free=sum(part.f_ffree for part in parts),
            longest_name=whiteout.MAX_NAME,
        )


def _look(fd: int, size: int, offset: int, own: bool) -> bytes | bytearray | None:
    """What is in memory by now, None where it is not; own: the descriptor is closed then."""
    try:
        data = datacalls.read_cached(fd, size, offset)
    except OSError:
        return None  # which the thread is told as well
    if type(data) is bool:
        return None
    if own:
        os.close(fd)
    return data


def _sync_all(fds: list[int], data_only: bool) -> None:
    """fsync(2), by descriptors that are closed then. In a thread."""
    try:
        for fd in fds:
            datacalls.sync_file(fd, data_only)
    finally:
        for fd in fds:
            os.close(fd)
