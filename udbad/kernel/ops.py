"""pyfuse3's handlers: conversion of types, and the decision what may run on the event loop.

The frequent operations come here only when they need an await (kernel/fast.py has the others). Those of which
pyfuse3 would lose a part (SETATTR: "now" as a time, SETXATTR: its flags) do not come here at all.

Everything that only asks for names and attributes runs inline: a thread costs more than the work. In a
thread go data that is not in the page cache, fsync, and the bytes of a copy-up. Only descriptors,
bytes, ints and copy-up jobs cross into a thread. Each await says what may have changed after it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

import pyfuse3
import trio

from udbad.branch import syscalls, whiteout
from udbad.coherence.base import Coherence
from udbad.inodes.table import Node
from udbad.kernel import wire
from udbad.kernel.boundary import handler
from udbad.types import Caller, Trigger
from udbad.union import copyup, create, remove
from udbad.union.fs import UnionFs
from udbad.union.held import HOLD_SECONDS
from udbad.union.superblock import NeedCopyUp

T = TypeVar("T")

INLINE_COPY = 64 * 1024
"""Bytes up to which a copy-up that is not synced is done on the event loop: a thread would take longer."""

_ATTEMPTS = 8


class Operations(pyfuse3.Operations):
    """The request handlers of one mount."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False  # our INIT reply decides, see protocol.py

    def __init__(self, fs: UnionFs, coherence: Coherence) -> None:
        super().__init__()
        self.fs = fs
        self.coherence = coherence
        self._copy_limit = trio.CapacityLimiter(4)
        self._io_limit = trio.CapacityLimiter(32)
        self._holding = False
        self.copyups: dict[int, copyup.Job] = {}
        self.on_copyup: Callable[[copyup.Job, float], None] | None = None
        self.on_copyup_failed: Callable[[Trigger, int], None] | None = None

    # -- replies ------------------------------------------------------------------------------

    def _attributes(self, node: Node, st: os.stat_result) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.id
        entry.st_mode = st.st_mode
        entry.st_nlink = wire.links(node, st)
        entry.st_uid = st.st_uid
        entry.st_gid = st.st_gid
        entry.st_rdev = st.st_rdev
        entry.st_size = st.st_size
        entry.st_blksize = st.st_blksize
        entry.st_blocks = st.st_blocks
        entry.st_atime_ns = st.st_atime_ns
        entry.st_mtime_ns = st.st_mtime_ns + node.mtime_offset
        entry.st_ctime_ns = st.st_ctime_ns
        entry.attr_timeout = self.coherence.attr_ttl(node, st)
        return entry

    def _entry(self, parent: int, node: Node, st: os.stat_result) -> pyfuse3.EntryAttributes:
        """An entry of the directory `parent`, which need not be the node's: one of several links; with a reference."""
        entry = self._attributes(node, st)
        entry.entry_timeout = self.fs.table.directory(parent).ttl
        node.nlookup += 1
        return entry

    # -- retrying -----------------------------------------------------------------------------

    async def perform(self, operation: Callable[[], T]) -> T:
        """Run an operation with the copy-ups it needs first. It starts from scratch after each await."""
        return await self._perform(operation)

    async def _perform(self, operation: Callable[[], T], *dirs: int) -> T:
        """Run an operation, with the copy-ups it needs first, and once more when a branch changed underneath.

        The operation starts from scratch after each await, so nothing it saw before is used again.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return operation()
            except NeedCopyUp as need:
                done = await self._copy_up(need)
                if done and need.trigger is Trigger.LINK and need.name is not None:
                    parent, name = need.name
                    st = create.finish_link(self.fs.sb, need.node, parent, name)
                    return (need.node, st)  # type: ignore[return-value]  # the result of link, the one that asks so
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and not attempt and self.fs.table.shed():
                    continue
                if error.errno != errno.ESTALE or not dirs or attempt:
                    raise
                for node_id in dirs:
                    self.fs.recover(node_id)
        raise OSError(errno.EIO, "the branches changed too often during one operation")

    async def _copy_up(self, need: NeedCopyUp) -> bool:
        """Bring a node up; False when the caller should look again (somebody else did it, or it moved)."""
        node = need.node
        waiting = node.busy
        if waiting is not None:
            # After this: the node may be up, gone, or have failed to come up. The caller starts again.
            await waiting.wait()
            return False
        started = trio.current_time()
        job = None
        try:
            job = copyup.begin(self.fs.sb, need)
            if job is None:
                return True
            if not job.fsync and (job.st.st_size <= INLINE_COPY or job.length == 0):
                copyup.transfer(job)
            else:
                event = node.busy = trio.Event()
                self.copyups[node.id] = job
                try:
                    # After this: names may have changed; commit checks that the source still is what it was.
                    await trio.to_thread.run_sync(copyup.transfer, job, limiter=self._copy_limit)
                finally:
                    del self.copyups[node.id]
                    node.busy = None
                    event.set()
            copyup.commit(self.fs.sb, job)
            if copyup.takes_away(job):
                # After this: the source may be another file, or in use; it is looked at again.
                await trio.to_thread.run_sync(copyup.settle_names, self.fs.sb, job, limiter=self._copy_limit)
                copyup.take_away(self.fs.sb, job)
        except OSError as error:
            if self.on_copyup_failed is not None:
                self.on_copyup_failed(need.trigger, error.errno or errno.EIO)
            if error.errno in (errno.ESTALE, errno.EEXIST) and job is not None:
                return False
            raise
        finally:
            if job is not None:
                copyup.abort(job)
        if self.on_copyup is not None:
            self.on_copyup(job, trio.current_time() - started)
        return True

    def stale(self, pid: int) -> None:
        """A process is told ESTALE, and will look again (union/held.py)."""
        self.fs.walks.stale(pid)
        if not self._holding:
            self._holding = True
            trio.lowlevel.spawn_system_task(self._let_go)

    async def _let_go(self) -> None:
        try:
            while not self.fs.walks.expire():  # noqa: ASYNC110  # not waiting for anybody: what was held longer is to go
                await trio.sleep(HOLD_SECONDS)
        finally:
            self._holding = False

    # -- names --------------------------------------------------------------------------------

    @handler
    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        fs = self.fs
        try:
            found = fs.lookup(parent, name)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            fs.recover(parent)
            found = fs.lookup(parent, name)
        if fs.walks.callers:
            found = fs.look_again(ctx.pid, parent, name, found)
        if found is None:
            ttl = self.coherence.negative_ttl(fs.table.nodes[parent], name)
            if ttl:
                negative = pyfuse3.EntryAttributes()
                negative.st_ino = 0
                negative.entry_timeout = ttl
                return negative
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._entry(parent, found[0], found[1])

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for node_id, count in inode_list:
            self.fs.forget(node_id, count)

    @handler
    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        caller = _caller(ctx)
        return self._entry(
            parent, *await self._perform(lambda: self.fs.mknod(parent, name, mode, rdev, caller), parent)
        )

    @handler
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        caller = _caller(ctx)
        return self._entry(
            parent, *await self._perform(lambda: self.fs.mkdir(parent, name, mode & 0o7777, caller), parent)
        )

    @handler
    async def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        caller = _caller(ctx)
        return self._entry(parent, *await self._perform(lambda: self.fs.symlink(parent, name, target, caller), parent))

    @handler
    async def link(self, node: int, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(parent, *await self._perform(lambda: self.fs.link(node, parent, name), parent))

    @handler
    async def unlink(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._perform(lambda: self.fs.unlink(parent, name), parent)

    @handler
    async def rmdir(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._perform(lambda: self.fs.rmdir(parent, name), parent)
        if self.fs.sb.trash:
            trash, self.fs.sb.trash = self.fs.sb.trash, []
            trio.lowlevel.spawn_system_task(self._empty_trash, trash, parent)

    async def _empty_trash(self, trash: list[tuple[int, bytes]], parent: int) -> None:
        # After this: nothing is used but the number, which may be that of another directory by now; it is asked again.
        await trio.to_thread.run_sync(remove.empty_trash, trash)
        self.fs.removed_later(parent)

    @handler
    async def rename(
        self, src_dir: int, src: bytes, dst_dir: int, dst: bytes, flags: int, ctx: pyfuse3.RequestContext
    ) -> None:
        await self._perform(lambda: self.fs.rename(src_dir, src, dst_dir, dst, flags), src_dir, dst_dir)

    @handler
    async def readlink(self, node: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self.fs.readlink(node)

    # -- attributes ---------------------------------------------------------------------------

    @handler
    async def getattr(self, node: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(*self.fs.getattr(node))

    @handler
    async def getxattr(self, node: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return self.fs.getxattr(node, name)

    @handler
    async def listxattr(self, node: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return self.fs.listxattr(node, _caller(ctx))

    @handler
    async def removexattr(self, node: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        caller = _caller(ctx)
        await self._perform(lambda: self.fs.removexattr(node, name, caller))

    # -- files --------------------------------------------------------------------------------

    @handler
    async def open(self, node: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        caller = _caller(ctx)
        handle, st = await self._perform(lambda: self.fs.open(node, flags, caller))
        return pyfuse3.FileInfo(fh=handle.fh, keep_cache=self.coherence.keep_cache(handle.node, st))

    @handler
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        caller = _caller(ctx)
        handle, st = await self._perform(lambda: self.fs.create(parent, name, flags, mode & 0o7777, caller), parent)
        self.coherence.keep_cache(handle.node, st)
        return pyfuse3.FileInfo(fh=handle.fh), self._entry(parent, handle.node, st)

    @handler
    async def read(  # type: ignore[override]  # any buffer will do, and a copy into bytes costs
        self, fh: int, offset: int, size: int
    ) -> bytes | bytearray:
        handle = self.fs.handles.file(fh)
        data = syscalls.read_cached(handle.fd, size, offset)
        if data is not None:
            return data
        # After this: nothing to check. The kernel sends RELEASE only after the last READ was answered, and
        # a copy-up meanwhile puts the new file under the same descriptor.
        return await trio.to_thread.run_sync(os.pread, handle.fd, size, offset, limiter=self._io_limit)

    @handler
    async def write(self, fh: int, offset: int, data: bytes) -> int:
        try:
            return self.fs.write(fh, offset, data)
        except NeedCopyUp:
            return await self._perform(lambda: self.fs.write(fh, offset, data))

    @handler
    async def flush(self, fh: int) -> None:
        # Never ENOSYS, which would hold for branches that are added later, too: fast.py says per file whether to ask.
        fd = self.fs.flush(fh)
        if fd is not None:
            # After this: nothing is used any more. As for a read, the descriptor stays while this is not answered.
            await trio.to_thread.run_sync(syscalls.flush, fd, limiter=self._io_limit)

    @handler
    async def release(self, fh: int) -> None:
        self.fs.release(fh)

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        # Whatever the descriptor was opened for, as fsync(2) is about the file: `sync FILE` opens it for reading. On
        # a read-only branch too, where others write.
        handle = self.fs.handles.file(fh)
        # After this: nothing is used any more. As for a read, the descriptor stays while this is not answered.
        await trio.to_thread.run_sync(syscalls.sync_file, handle.fd, datasync, limiter=self._io_limit)

    # -- directories --------------------------------------------------------------------------

    @handler
    async def opendir(self, node: int, ctx: pyfuse3.RequestContext) -> int:
        return (await self._perform(lambda: self.fs.opendir(node, ctx.pid), node)).fh

    @handler
    async def readdir(self, fh: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        reply = pyfuse3.readdir_reply
        sent: list[Node] = []
        begun = False
        directory = self.fs.handles.directory(fh).node
        try:
            for name, node, st, after in self.fs.readdir(fh, start):
                entry = self._attributes(node, st)
                entry.entry_timeout = directory.ttl
                if not reply(token, name, entry, after):
                    self.coherence.not_sent(node)
                    self.fs.table.not_sent(node)
                    break
                begun = True
                if name not in _DOTS:
                    node.nlookup += 1
                    sent.append(node)
        except OSError:
            if not begun:
                raise
            # As getdents64(2): first what there is, and the error when it is met again at the start of a reply.
        except Exception:
            for node in sent:
                self.fs.forget(node.id, 1)
            raise

    @handler
    async def releasedir(self, fh: int) -> None:
        self.fs.releasedir(fh)

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        with ExitStack() as opened:
            fds = self.fs.directory_fds(fh)
            for fd in fds:
                opened.callback(os.close, fd)
            for fd in fds:
                # After this: nothing is used but the descriptors taken before.
                await trio.to_thread.run_sync(syscalls.sync_file, fd, datasync, limiter=self._io_limit)

    @handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        parts = self.fs.statfs()
        first = parts[0]
        size = min(part.f_frsize for part in parts)
        reply = pyfuse3.StatvfsData()
        reply.f_bsize = first.f_bsize
        reply.f_frsize = size
        reply.f_blocks = sum(part.f_blocks * part.f_frsize for part in parts) // size
        reply.f_bfree = sum(part.f_bfree * part.f_frsize for part in parts) // size
        reply.f_bavail = sum(part.f_bavail * part.f_frsize for part in parts) // size
        reply.f_files = sum(part.f_files for part in parts)
        reply.f_ffree = sum(part.f_ffree for part in parts)
        reply.f_favail = sum(part.f_favail for part in parts)
        reply.f_namemax = whiteout.MAX_NAME
        return reply


_DOTS = (b".", b"..")


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid, ctx.umask)
