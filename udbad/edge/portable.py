"""The portable edge: requests through pyfuse3's public interface, for who may not open /dev/fuse and mount himself.

Plain values go into the operations of operations.py, and pyfuse3's types come out. What cannot be answered at once
waits in waiting.py, as everywhere. pyfuse3 tells us nothing of requests that are interrupted, nor of answers that the
kernel did not take, so references and handles that went with those are kept until the mount ends.
"""

from __future__ import annotations

import errno
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial, wraps
from time import perf_counter
from typing import Any, Final, TypeVar, cast

import pyfuse3
import trio

from udbad.branch.credentials import in_group
from udbad.coherence.base import Coherence
from udbad.edge.operations import Attributes, Entry, Later, Operations
from udbad.edge.portable_session import PortableSession
from udbad.edge.waiting import RETRIED, Request, Waiting
from udbad.errors import os_error
from udbad.kernel import boundary, wire
from udbad.types import Caller
from udbad.union.fs import SetAttr, UnionFs
from udbad.union.superblock import NeedCopyUp

log = logging.getLogger(__name__)

MAX_TASKS: Final = 4096
"""Requests that may wait at a time, for copy-ups and disks."""
HEARTBEAT: Final = 1.0
"""Seconds that pyfuse3 may hold the event loop in the read(2) of a request that was taken back meanwhile: its client
was killed between "readable" and the read, which then waits for the next request."""

T = TypeVar("T")
Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])


class Portable:
    """Serves the requests of one mount. One for a process: pyfuse3 has one global session."""

    takes_events = False
    """Branch events are for Coherence.run to take."""

    def __init__(
        self, session: PortableSession, fs: UnionFs, coherence: Coherence, stale: Callable[[int], None]
    ) -> None:
        """stale: told the process (thread) id of who is told ESTALE."""
        self._session = session
        self.fs = fs
        self.stale = stale
        self._token: trio.lowlevel.TrioToken | None = None
        self._posted_late: list[Callable[[], object]] = []
        self.waiting = Waiting(fs, self.post)
        self.operations = Operations(fs, coherence, self.waiting.background, keep_listings=False)
        self.aborted = False
        """Whether the connection has ended because somebody has aborted it, through fusectl."""
        self._terminated = False
        session.attach(Handlers(self))

    def post(self, call: Callable[[], object]) -> None:
        """Have something called on the event loop, soon; any thread. After its end, `close` does."""
        try:
            if self._token is not None:
                self._token.run_sync_soon(call)
                return
        except trio.RunFinishedError:
            pass
        self._posted_late.append(call)

    def run(self, main: Callable[[], Awaitable[None]], soon: Callable[[Callable[[], object]], object]) -> None:
        """Run `main` on trio; requests are served while it is in `serve`. Raises what it raises. soon: as Native's,
        which has to wait for trio."""

        async def run() -> None:
            self._token = trio.lowlevel.current_trio_token()
            await main()

        soon(lambda: None)
        trio.run(run)

    async def serve(self) -> None:
        """Serve until the mount is gone, the connection aborted, or `terminate` called."""
        with _heartbeat():
            await pyfuse3.main(max_tasks=MAX_TASKS)
        self.aborted = not self._terminated and self._session.is_mounted()

    def terminate(self) -> None:
        """End `serve`; event loop only."""
        self._terminated = True
        pyfuse3.terminate()

    def close(self) -> None:
        """Give up what waits, and wait for the threads; after `run`."""
        self.waiting.close()
        while self._posted_late:
            self._posted_late.pop(0)()


@contextmanager
def _heartbeat() -> Iterator[None]:
    """Interrupt the main thread's system calls now and then (EINTR); Python's own go on by themselves (PEP 475)."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, HEARTBEAT, HEARTBEAT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


class _Awaited(Request):
    """An operation that a handler waits for."""

    __slots__ = ("_error", "_operation", "_over", "_portable", "_result")

    def __init__(
        self, portable: Portable, operation: Callable[[], object], pid: int, directories: tuple[int, ...]
    ) -> None:
        super().__init__(0, pid, directories)
        self._portable = portable
        self._operation = operation
        self._over = trio.Event()
        self._result: object = None
        self._error: Exception | None = None

    def perform(self) -> object:
        return self._operation()

    def answer(self, result: object, error: Exception | None) -> None:
        self._result, self._error = result, error
        self._over.set()

    def answer_from_thread(self, result: object, error: Exception | None) -> None:
        self._portable.post(partial(self.answer, result, error))

    async def result(self) -> object:
        await self._over.wait()
        if self._error is not None:
            raise self._error
        return self._result


def _handler(function: Handler) -> Handler:
    """The error boundary: anything but FUSEError that left a handler would end the whole mount."""
    name = function.__name__
    stats = boundary.operation(name)

    @wraps(function)
    async def wrapper(self: Handlers, *args: Any) -> Any:
        start = perf_counter()
        number = 0
        try:
            return await function(self, *args)
        except Exception as error:
            number = boundary.number_of(error, stats, name, args[0] if isinstance(args[0], int) else 0)
            if number == errno.ESTALE:
                self.portable.stale(next((arg.pid for arg in args if isinstance(arg, pyfuse3.RequestContext)), 0))
            raise pyfuse3.FUSEError(number) from None
        finally:
            stats.count(perf_counter() - start, number)
            table = self.portable.fs.table
            if table.over_budget():  # between operations, none of which has a descriptor of a directory
                table.trim()

    return cast("Handler", wrapper)


class Handlers(pyfuse3.Operations):
    """What pyfuse3 calls, one coroutine a request."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, portable: Portable) -> None:
        super().__init__()
        self.portable = portable
        self.operations = portable.operations

    async def _perform(self, operation: Callable[[], T], pid: int = 0, *directories: int) -> T:
        """Perform an operation, now or when that for which it has to wait is there.

        pid: who asks. directories: node ids to ask anew about when a branch has changed underneath. After this: it was
        done from its beginning, on what there was at its end.
        """
        try:
            return operation()
        except (NeedCopyUp, Later) as error:
            waiting: Exception = error
        except OSError as error:
            if error.errno not in RETRIED:
                raise
            waiting = error
        request = _Awaited(self.portable, operation, pid, directories)
        self.portable.waiting.go_on(request, waiting)
        return cast("T", await request.result())

    # -- replies ------------------------------------------------------------------------------

    def _attributes(self, found: Attributes) -> pyfuse3.EntryAttributes:
        node, st, attr_ttl = found
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
        entry.attr_timeout = attr_ttl
        return entry

    def _entry(self, found: Entry) -> pyfuse3.EntryAttributes:
        node, st, entry_ttl, attr_ttl = found
        entry = self._attributes((node, st, attr_ttl))
        entry.entry_timeout = entry_ttl
        return entry

    # -- names --------------------------------------------------------------------------------

    @_handler
    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        found = await self._perform(partial(self.operations.lookup, parent, name, ctx.pid), ctx.pid, parent)
        if isinstance(found, float):
            negative = pyfuse3.EntryAttributes()
            negative.st_ino = 0
            negative.entry_timeout = found
            return negative
        return self._entry(found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for node, count in inode_list:
            try:
                self.operations.forget(node, count)
            except Exception as error:
                boundary.number_of(error, boundary.operation("forget"), "forget", node)

    @_handler
    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        caller = _caller(ctx)
        make = partial(self.operations.mknod, parent, name, mode, rdev, caller)
        return self._entry(await self._perform(make, caller.pid, parent))

    @_handler
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        caller = _caller(ctx)
        make = partial(self.operations.mkdir, parent, name, mode, caller)
        return self._entry(await self._perform(make, caller.pid, parent))

    @_handler
    async def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        caller = _caller(ctx)
        make = partial(self.operations.symlink, parent, name, target, caller)
        return self._entry(await self._perform(make, caller.pid, parent))

    @_handler
    async def link(self, node: int, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        make = partial(self.operations.link, node, parent, name)
        return self._entry(await self._perform(make, ctx.pid, parent))

    @_handler
    async def unlink(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._perform(partial(self.operations.unlink, parent, name), ctx.pid, parent)

    @_handler
    async def rmdir(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._perform(partial(self.operations.rmdir, parent, name), ctx.pid, parent)

    @_handler
    async def rename(
        self, src_dir: int, src: bytes, dst_dir: int, dst: bytes, flags: int, ctx: pyfuse3.RequestContext
    ) -> None:
        move = partial(self.operations.rename, src_dir, src, dst_dir, dst, flags)
        await self._perform(move, ctx.pid, src_dir, dst_dir)

    @_handler
    async def readlink(self, node: int, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._perform(partial(self.operations.readlink, node), ctx.pid)

    # -- attributes ---------------------------------------------------------------------------

    @_handler
    async def getattr(self, node: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(await self._perform(partial(self.operations.getattr, node), ctx.pid))

    @_handler
    async def setattr(
        self,
        node: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        # A time of "now" comes as what our clock says.
        changes = SetAttr(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        caller = _caller(ctx)
        return self._attributes(
            await self._perform(partial(self.operations.setattr, node, changes, fh, caller), caller.pid)
        )

    @_handler
    async def getxattr(self, node: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        self._check_xattrs()
        return await self._perform(partial(self.operations.getxattr, node, name), ctx.pid)

    @_handler
    async def listxattr(self, node: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        self._check_xattrs()
        return await self._perform(partial(self.operations.listxattr, node, _caller(ctx)), ctx.pid)

    def _check_xattrs(self) -> None:
        """Raises EOPNOTSUPP; by ENOSYS, which no handler may send (boundary.py), the kernel would ask no more."""
        if not self.operations.fs.sb.options.xattrs:
            raise os_error(errno.EOPNOTSUPP)

    @_handler
    async def setxattr(self, node: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        # For XATTR_CREATE and XATTR_REPLACE pyfuse3 looks itself, before it asks. That an ACL costs the setgid bit is
        # for the kernel to say (fuse_set_acl()), which does so by a flag that pyfuse3 does not have.
        self._check_xattrs()
        caller, operations = _caller(ctx), self.operations

        def change() -> None:
            kill_sgid = (
                name == b"system.posix_acl_access"
                and caller.uid != 0
                and not in_group(caller, operations.getattr(node)[1].st_gid)
            )
            operations.setxattr(node, name, value, caller, 0, kill_sgid)

        await self._perform(change, ctx.pid)

    @_handler
    async def removexattr(self, node: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._check_xattrs()
        await self._perform(partial(self.operations.removexattr, node, name, _caller(ctx)), ctx.pid)

    # -- files --------------------------------------------------------------------------------

    @_handler
    async def open(self, node: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        fh, answer, _ = await self._perform(partial(self.operations.open, node, flags, _caller(ctx)), ctx.pid)
        return pyfuse3.FileInfo(fh=fh, keep_cache=bool(answer & wire.KEEP_CACHE))

    @_handler
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        make = partial(self.operations.create, parent, name, flags, mode, _caller(ctx))
        entry, (fh, _, _) = await self._perform(make, ctx.pid, parent)
        return pyfuse3.FileInfo(fh=fh), self._entry(entry)

    @_handler
    async def read(  # type: ignore[override]  # any buffer will do, and a copy into bytes costs
        self, fh: int, offset: int, size: int
    ) -> bytes | bytearray:
        return await self._perform(partial(self.operations.read, fh, offset, size))

    @_handler
    async def write(self, fh: int, offset: int, data: bytes) -> int:
        return await self._perform(partial(self.operations.write, fh, offset, data))

    @_handler
    async def flush(self, fh: int) -> None:
        await self._perform(partial(self.operations.flush, fh))

    @_handler
    async def release(self, fh: int) -> None:
        self.operations.release(fh)

    @_handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        if self.operations.fs.sb.options.volatile:
            return
        await self._perform(partial(self.operations.fsync, fh, datasync))

    # -- directories --------------------------------------------------------------------------

    @_handler
    async def opendir(self, node: int, ctx: pyfuse3.RequestContext) -> int:
        fh, _, _ = await self._perform(partial(self.operations.opendir, node, ctx.pid), ctx.pid, node)
        return fh

    @_handler
    async def readdir(self, fh: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        with closing(self.operations.entries(fh, start)) as entries:
            for name, node, st, entry_ttl, attr_ttl, after, _ in entries:
                entry = self._entry((node, st, entry_ttl, attr_ttl))
                if not pyfuse3.readdir_reply(token, name, entry, after):
                    break

    @_handler
    async def releasedir(self, fh: int) -> None:
        self.operations.releasedir(fh)

    @_handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        if self.operations.fs.sb.options.volatile:
            return
        await self._perform(partial(self.operations.fsyncdir, fh, datasync))

    # -- the whole ----------------------------------------------------------------------------

    @_handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        space = await self._perform(self.operations.statfs, ctx.pid)
        reply = pyfuse3.StatvfsData()
        reply.f_bsize = space.block_size
        reply.f_frsize = space.fragment_size
        reply.f_blocks = space.blocks
        reply.f_bfree = space.free
        reply.f_bavail = space.available
        reply.f_files = space.files
        reply.f_ffree = reply.f_favail = space.files_free
        reply.f_namemax = space.longest_name
        return reply


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid, ctx.umask)
