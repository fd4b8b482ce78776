"""The frequent requests, answered without pyfuse3: read, performed by the same core, and replied to in one go.

What pyfuse3 spends on a request (a coroutine, objects for attributes) is more than most operations take. So
`take` reads from /dev/fuse, and whatever has a row in `HANDLERS` and needs no await is answered here. All
else, and what turns out to need an await (a copy-up, a branch that changed underneath), is handed over to
libfuse through a socket pair, where it begins from the start: an operation of union/fs.py that raises
NeedCopyUp, ESTALE or EMFILE has changed nothing. Requests of which libfuse or pyfuse3 would lose a part
(`_KEPT`) are begun again here instead, in a task that awaits the copy-up.

It also knows two flags that pyfuse3 does not: the kernel may keep the listing of a directory that is trusted
(FOPEN_CACHE_DIR), until the coherence strategy tells it that a name has come or gone.

Runs on the event loop only, between two turns of it, but for reads from the disk. Counting and the meaning of errors
are as in boundary.py.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Protocol, TypeVar

import trio

from udbad.branch import syscalls
from udbad.coherence.base import Coherence
from udbad.inodes.table import Dir, Node
from udbad.kernel import boundary, protocol, wire
from udbad.types import Caller
from udbad.union.fs import NOW, SetAttr, Time, UnionFs
from udbad.union.superblock import NeedCopyUp

log = logging.getLogger(__name__)

T = TypeVar("T")

_DOTS = (b".", b"..")
_KEPT = frozenset({wire.SETATTR, wire.SETXATTR})
_GONE = (errno.ENOENT, errno.EINTR)
_TAKEN_BACK = (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED)
"""Errors of an answer that nobody waits for any more."""
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
_WAITERS = 16
"""Threads that wait for disks and servers at the same time: as many reads keep an array of disks busy."""
_BIG_REPLY = 4096
"""Bytes of data from which on copying it behind a header costs more than a second vector."""


class Ended(Exception):
    """There is no connection any more: unmounted, or aborted."""

    def __init__(self, aborted: bool) -> None:
        super().__init__()
        self.aborted = aborted


class _Later(Exception):
    """The reply comes from a thread: what a call with its arguments returns, bytes or None."""


Handler = Callable[[int, int], bytes | bytearray]
"""(node id, length of the request) to the body of the reply."""


class Perform(Protocol):
    """Run an operation with the copy-ups it needs first (Operations.perform)."""

    def __call__(self, operation: Callable[[], T]) -> Awaitable[T]: ...


class FastPath:
    """Reads the requests of one mount and answers those it can."""

    def __init__(
        self,
        fd: int,
        pyfuse3s: socket.socket,
        fs: UnionFs,
        coherence: Coherence,
        perform: Perform,
        stale: Callable[[int], None],
        setxattr_ext: bool = True,
    ) -> None:
        """fd: /dev/fuse, non-blocking. pyfuse3s: where libfuse reads what is sent, and its answers come back.

        setxattr_ext: FUSE_SETXATTR_EXT was agreed on.
        """
        self._fd = fd
        self._pyfuse3s = pyfuse3s
        self._waiters = ThreadPoolExecutor(_WAITERS, "wait")
        self.fs = fs
        self.coherence = coherence
        self._buffer = bytearray(protocol.MAX_REQUEST + 4096)
        self._view = memoryview(self._buffer)
        self._into = [self._buffer]
        self._perform = perform
        self._stale = stale
        self._setxattr_ext = setxattr_ext
        self._undo: Callable[[], None] | None = None
        """Takes back what the answer would give to the kernel, if it is an error after all, or is not taken."""
        self._handed_over: dict[int, int] = {}
        """Of requests that pyfuse3 has: unique to opcode, where the answer gives the kernel something."""
        self._handlers: dict[int, tuple[Handler, boundary.OpStats]] = {
            opcode: (getattr(self, "_" + name), boundary.operation(name.rstrip("2")))
            for opcode, name in HANDLERS.items()
        }

    def take(self) -> bool:
        """Serve one request, if there is one; False when pyfuse3 has to read now. Raises Ended."""
        try:
            size = os.readv(self._fd, self._into)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno in _GONE:  # taken back while it was read
                return True
            raise Ended(error.errno == errno.ECONNABORTED) from None  # FUSE_ABORT_ERROR; unmounted: ENODEV
        table = self.fs.table
        if table.over_budget():  # between operations, none of which has a descriptor of a directory
            table.trim()
        opcode, unique, node_id = wire.REQUEST.unpack_from(self._buffer)
        row = self._handlers.get(opcode)
        if row is None:
            return self._silent(opcode, node_id) or self._hand_over(unique, size)
        handler, stats = row
        start = perf_counter()
        number = 0
        body: bytes | bytearray = b""
        try:
            try:
                body = handler(node_id, size)
            except OSError as error:
                if error.errno not in _NO_DESCRIPTOR or not table.shed():
                    raise
                body = handler(node_id, size)  # the first time, it has changed nothing
        except NeedCopyUp:
            if opcode not in _KEPT:
                return self._hand_over(unique, size)
            again = self._again(handler, node_id, size)
            pid = self._caller().pid
            trio.lowlevel.spawn_system_task(self._finish_after_copyup, again, pid, unique, stats, start)
            return True
        except _Later as later:
            self._waiters.submit(self._finish, unique, opcode, stats, start, *later.args)
            return True
        except OSError as error:
            if error.errno == errno.ESTALE and opcode not in _KEPT:
                return self._hand_over(unique, size)  # to look again, or to say so
            number = boundary.error_number(error)
            if number == errno.ESTALE:
                self._stale(self._caller().pid)
        except Exception:
            stats.bugs += 1
            number = errno.EIO
            log.exception("%s of node %d failed", HANDLERS[opcode], node_id)
        undo, self._undo = self._undo, None
        stats.count(perf_counter() - start, number)
        if (not self._send(unique, number, body) or number) and undo is not None:
            undo()
        return True

    def _silent(self, opcode: int, node_id: int) -> bool:
        """Do what is not answered; False when the opcode is another one."""
        try:
            if opcode == wire.FORGET:
                self.fs.forget(node_id, wire.QWORD.unpack_from(self._buffer, wire.BODY)[0])
            elif opcode == wire.BATCH_FORGET:
                count = wire.TWO_WORDS.unpack_from(self._buffer, wire.BODY)[0]
                start = wire.BODY + 8
                for one, times in wire.FORGET_ONE.iter_unpack(self._view[start : start + 16 * count]):
                    self.fs.forget(one, times)
            else:
                # The caller has a signal: nothing that waits here can be stopped half-way.
                return opcode == wire.INTERRUPT
        except Exception:
            log.exception("forgetting failed")
        return True

    def _hand_over(self, unique: int, size: int) -> bool:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()
        opcode = wire.REQUEST.unpack_from(self._buffer)[0]
        if opcode in wire.REFERRING:
            self._handed_over[unique] = opcode
        try:
            self._pyfuse3s.send(self._view[:size])
        except OSError as error:
            log.error("cannot hand over a request: %s", error.strerror)
            self._send(unique, errno.EIO, b"")
            return True
        return False

    def _again(self, handler: Handler, node_id: int, size: int) -> Callable[[], bytes | bytearray]:
        """The request in the buffer, to be performed once more when the buffer has long held others."""
        request = bytearray(self._view[:size])

        def perform() -> bytes | bytearray:
            held = self._buffer, self._view
            self._buffer, self._view = request, memoryview(request)
            try:
                return handler(node_id, size)
            finally:
                self._buffer, self._view = held

        return perform

    async def _finish_after_copyup(
        self,
        again: Callable[[], bytes | bytearray],
        pid: int,
        unique: int,
        stats: boundary.OpStats,
        start: float,
    ) -> None:
        """pid: of the process that asked."""
        number = 0
        body: bytes | bytearray = b""
        try:
            # After this: the request is done, from the start and on what there was at its end.
            body = await self._perform(again)
        except OSError as error:
            number = boundary.error_number(error)
            if number == errno.ESTALE:
                self._stale(pid)
        except Exception:
            stats.bugs += 1
            number = errno.EIO
            log.exception("a request that needed a copy-up failed")
        stats.count(perf_counter() - start, number)
        self._send(unique, number, body)

    def relay(self) -> None:
        """Pass on what pyfuse3 has answered. That to INIT, which was ours to answer, the kernel does not know."""
        try:
            while True:
                answer = self._pyfuse3s.recv(protocol.MAX_REQUEST + 4096, socket.MSG_DONTWAIT)
                if not answer:
                    return
                _, number, unique = wire.REPLY.unpack_from(answer)
                opcode = self._handed_over.pop(unique, 0)
                try:
                    os.write(self._fd, answer)
                except OSError as error:
                    if error.errno not in _TAKEN_BACK:
                        log.error("cannot answer a request: %s", error.strerror)
                    if opcode and not number:
                        self._take_back(opcode, answer[wire.REPLY.size :])
        except BlockingIOError:
            return

    def _take_back(self, opcode: int, body: bytes) -> None:
        """The kernel did not take this answer, which would have given it references and an open file or directory."""
        fs = self.fs
        nodes, fh = wire.references(opcode, body)
        if fh is not None:
            (fs.releasedir if opcode == wire.OPENDIR else fs.release)(fh)
        for number in nodes:
            fs.forget(number, 1)

    def _send(self, unique: int, number: int, body: bytes | bytearray) -> bool:
        """Any thread. False when the kernel has not taken the answer, because whoever asked was killed meanwhile."""
        try:
            if number:
                os.write(self._fd, wire.REPLY.pack(16, -number, unique))
            elif len(body) > _BIG_REPLY:
                os.writev(self._fd, [wire.REPLY.pack(16 + len(body), 0, unique), body])
            else:
                os.write(self._fd, wire.REPLY.pack(16 + len(body), 0, unique) + body)
        except OSError as error:
            if error.errno not in _TAKEN_BACK:
                log.error("cannot answer a request: %s", error.strerror)
            return False
        return True

    def _caller(self, umask: int = 0) -> Caller:
        uid, gid, pid = wire.CALLER.unpack_from(self._buffer, wire.CALLER_AT)
        return Caller(uid, gid, pid, umask)

    def _name(self, start: int, size: int) -> bytes:
        return bytes(self._view[start : size - 1])

    # -- names --------------------------------------------------------------------------------

    def _entry(self, parent: int, node: Node, st: os.stat_result) -> bytes:
        """An entry of the directory `parent`, which need not be the node's: one of several links; with a reference."""
        node.nlookup += 1
        return wire.entry(node, st, self.fs.table.nodes[parent].ttl, self.coherence.attr_ttl(node, st))

    def _lookup(self, parent: int, size: int) -> bytes:
        fs = self.fs
        name = self._name(wire.BODY, size)
        found = fs.lookup(parent, name)
        if fs.walks.callers:
            found = fs.look_again(self._caller().pid, parent, name, found)
        if found is None:
            ttl = self.coherence.negative_ttl(fs.table.nodes[parent], name)
            if ttl:
                return wire.negative(ttl)
            raise OSError(errno.ENOENT, "")
        node = found[0]
        self._undo = lambda: fs.forget(node.id, 1)
        return self._entry(parent, node, found[1])

    def _unlink(self, parent: int, size: int) -> bytes:
        self.fs.unlink(parent, self._name(wire.BODY, size))
        return b""

    def _rename(self, src_dir: int, size: int) -> bytes:
        (dst_dir,) = wire.QWORD.unpack_from(self._buffer, wire.BODY)
        src, dst = self._name(wire.BODY + 8, size).split(b"\0")
        self.fs.rename(src_dir, src, dst_dir, dst, 0)
        return b""

    def _rename2(self, src_dir: int, size: int) -> bytes:
        (dst_dir,) = wire.QWORD.unpack_from(self._buffer, wire.BODY)
        flags, _ = wire.TWO_WORDS.unpack_from(self._buffer, wire.BODY + 8)
        src, dst = self._name(wire.BODY + 16, size).split(b"\0")
        self.fs.rename(src_dir, src, dst_dir, dst, flags)
        return b""

    def _create(self, parent: int, size: int) -> bytes:
        flags, mode, umask, _ = wire.FOUR_WORDS.unpack_from(self._buffer, wire.BODY)
        name = self._name(wire.BODY + 16, size)
        handle, st = self.fs.create(parent, name, flags, mode & 0o7777, self._caller(umask))
        node = handle.node
        self.coherence.keep_cache(node, st)

        def undo() -> None:
            self.fs.release(handle.fh)
            self.fs.forget(node.id, 1)

        self._undo = undo
        return self._entry(parent, node, st) + wire.OPENED.pack(
            handle.fh, 0 if self.fs.needs_flush(flags) else wire.NO_FLUSH, 0
        )

    # -- attributes ---------------------------------------------------------------------------

    def _getattr(self, node_id: int, size: int) -> bytes:
        node, st = self.fs.getattr(node_id)
        if type(node) is Dir and node.cached_opens and not node.trusted:
            node.mtime_offset += 1  # somebody who has it open from better times must not be shown a listing of then
        return wire.attributes(node, st, self.coherence.attr_ttl(node, st))

    def _setattr(self, node_id: int, size: int) -> bytes:
        valid, fh, length, atime, mtime, _, atime_nsec, mtime_nsec, _, mode, uid, gid = wire.SETATTR_IN.unpack_from(
            self._buffer, wire.BODY
        )
        atime_ns: Time = NOW if valid & wire.SET_ATIME_NOW else atime * wire.BILLION + atime_nsec
        mtime_ns: Time = NOW if valid & wire.SET_MTIME_NOW else mtime * wire.BILLION + mtime_nsec
        changes = SetAttr(
            mode=mode if valid & wire.SET_MODE else None,
            uid=uid if valid & wire.SET_UID else None,
            gid=gid if valid & wire.SET_GID else None,
            size=length if valid & wire.SET_SIZE else None,
            atime_ns=atime_ns if valid & wire.SET_ATIME else None,
            mtime_ns=mtime_ns if valid & wire.SET_MTIME else None,
        )
        node, st = self.fs.setattr(node_id, changes, fh if valid & wire.SET_FH else None, self._caller())
        return wire.attributes(node, st, self.coherence.attr_ttl(node, st))

    def _getxattr(self, node_id: int, size: int) -> bytes:
        room, _ = wire.TWO_WORDS.unpack_from(self._buffer, wire.BODY)
        value = self.fs.getxattr(node_id, self._name(wire.BODY + 8, size))
        if room == 0:
            return wire.TWO_WORDS.pack(len(value), 0)
        if len(value) > room:
            raise OSError(errno.ERANGE, "")
        return value

    def _setxattr(self, node_id: int, size: int) -> bytes:
        length, flags = wire.TWO_WORDS.unpack_from(self._buffer, wire.BODY)
        start = wire.BODY + wire.TWO_WORDS.size
        more = 0
        if self._setxattr_ext:
            (more,) = wire.SETXATTR_FLAGS.unpack_from(self._buffer, start)
            start += wire.SETXATTR_FLAGS.size
        key = bytes(self._view[start : size - length - 1])
        value = bytes(self._view[size - length : size])
        self.fs.setxattr(node_id, key, value, self._caller(), flags, more & wire.ACL_KILL_SGID != 0)
        return b""

    # -- files --------------------------------------------------------------------------------

    def _open(self, node_id: int, size: int) -> bytes:
        flags, _ = wire.TWO_WORDS.unpack_from(self._buffer, wire.BODY)
        handle, st = self.fs.open(node_id, flags, self._caller())
        self._undo = lambda: self.fs.release(handle.fh)
        answer = 0 if self.fs.needs_flush(flags) else wire.NO_FLUSH
        if self.coherence.keep_cache(handle.node, st):
            answer |= wire.KEEP_CACHE
        return wire.OPENED.pack(handle.fh, answer, 0)

    def _read(self, node_id: int, size: int) -> bytearray:
        fh, offset, wanted = wire.READ_IN.unpack_from(self._buffer, wire.BODY)
        handle = self.fs.handles.file(fh)
        data = syscalls.read_cached(handle.fd, wanted, offset)
        if data is None:
            raise _Later(os.pread, handle.fd, wanted, offset)
        return data

    def _flush(self, node_id: int, size: int) -> bytes:
        fd = self.fs.flush(wire.QWORD.unpack_from(self._buffer, wire.BODY)[0])
        if fd is not None:
            raise _Later(syscalls.flush, fd)
        return b""

    def _finish(
        self,
        unique: int,
        opcode: int,
        stats: boundary.OpStats,
        start: float,
        call: Callable[..., bytes | None],
        *args: int,
    ) -> None:
        """In a thread, which answers by itself: two turns of the event loop would take as long as the disk.

        There is nothing to check after the wait. The kernel sends RELEASE only after the last READ and FLUSH were
        answered, and a copy-up meanwhile puts the new file under the same descriptor.
        """
        number, body = 0, b""
        try:
            body = call(*args) or b""
        except OSError as error:
            number = boundary.error_number(error)
        except Exception:
            stats.bugs += 1
            number = errno.EIO
            log.exception("%s failed", HANDLERS[opcode])
        self._send(unique, number, body)
        boundary.count_in_thread(stats, perf_counter() - start, number)

    def close(self) -> None:
        """Wait for the reads under way; after the end of the connection, before the descriptor is closed."""
        self._waiters.shutdown()

    def _write(self, node_id: int, size: int) -> bytes:
        fh, offset, length = wire.READ_IN.unpack_from(self._buffer, wire.BODY)
        data = self._view[wire.WRITE_DATA : wire.WRITE_DATA + length]
        return wire.TWO_WORDS.pack(self.fs.write(fh, offset, data), 0)

    def _release(self, node_id: int, size: int) -> bytes:
        self.fs.release(wire.QWORD.unpack_from(self._buffer, wire.BODY)[0])
        return b""

    # -- directories --------------------------------------------------------------------------

    def _opendir(self, node_id: int, size: int) -> bytes:
        handle = self.fs.opendir(node_id, self._caller().pid)
        node = handle.node
        flags = 0
        if node.ttl and not self.fs.sb.options.show_whiteouts:
            flags = wire.CACHE_DIR | wire.KEEP_CACHE
            handle.cached = True
            node.cached_opens += 1
        self._undo = lambda: self.fs.releasedir(handle.fh)
        return wire.OPENED.pack(handle.fh, flags, 0)

    def _readdir(self, node_id: int, size: int) -> bytes:
        """READDIRPLUS: each entry but "." and ".." is a reference that the kernel takes."""
        fh, start, room = wire.READ_IN.unpack_from(self._buffer, wire.BODY)
        coherence = self.coherence
        attr_ttl = coherence.attr_ttl
        parts: list[bytes] = []
        referred: list[int] = []
        directory = self.fs.handles.directory(fh).node

        def undo() -> None:
            for number in referred:
                self.fs.forget(number, 1)

        self._undo = undo
        entry, dirent, least = wire.entry, wire.dirent, wire.ENTRY_SIZE + wire.DIRENT_SIZE
        try:
            for name, node, st, after in self.fs.readdir(fh, start):
                room -= least + (len(name) + 7 & ~7)
                if room < 0:
                    self.fs.table.not_sent(node)
                    break
                if name in _DOTS:
                    parts.append(wire.NO_ENTRY)
                else:
                    parts.append(entry(node, st, directory.ttl, attr_ttl(node, st)))
                    node.nlookup += 1
                    referred.append(node.id)
                parts.append(dirent(node.id, node.kind, name, after))
        except OSError:
            if not parts:
                raise
            # As getdents64(2): first what there is, and the error when it is met again at the start of a reply.
        return b"".join(parts)

    def _releasedir(self, node_id: int, size: int) -> bytes:
        self.fs.releasedir(wire.QWORD.unpack_from(self._buffer, wire.BODY)[0])
        return b""


HANDLERS = {
    wire.LOOKUP: "lookup",
    wire.GETATTR: "getattr",
    wire.SETATTR: "setattr",
    wire.GETXATTR: "getxattr",
    wire.SETXATTR: "setxattr",
    wire.UNLINK: "unlink",
    wire.RENAME: "rename",
    wire.RENAME2: "rename2",
    wire.CREATE: "create",
    wire.OPEN: "open",
    wire.READ: "read",
    wire.WRITE: "write",
    wire.FLUSH: "flush",
    wire.RELEASE: "release",
    wire.OPENDIR: "opendir",
    wire.READDIRPLUS: "readdir",
    wire.RELEASEDIR: "releasedir",
}
"""Opcodes and the method that answers them, which is counted under its name; a second form of one with the first."""
