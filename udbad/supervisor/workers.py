"""Mount processes seen from the supervisor: forked from a fork server, or adopted; watched through pidfds.

A mount process is in a session of its own and outlives both the supervisor and the fork server. Only
signals and sockets, no mount point. asyncio.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from udbad.mount.keeper import Left
from udbad.ourselves import COMMAND, environment

_FORK_SECONDS = 60.0
"""For the fork server to answer, the time of its imports included."""
_EXPECT_SECONDS = 2.0
_END_SECONDS = 2.0
"""For a process to end that has been killed, or has said why it could not start."""
_LAST_WORDS_SECONDS = 0.2
"""To read what a process has said before it ended."""


class Worker:
    """One mount process."""

    def __init__(self, pid: int, pidfd: int, job: socket.socket | None = None, keeper: int = -1) -> None:
        """pidfd is owned from here on. job: where a new process gets its job and answers. keeper: an eventfd, owned
        too, by which its keeper tells that it has ended, as a thread of it may outlive a SIGKILL (mount/keeper.py)."""
        self.pid = pid
        self._pidfd = pidfd
        self._keeper = keeper
        self._job = job
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for fd in self._watched():
            asyncio.get_running_loop().add_reader(fd, self._on_end)

    def _watched(self) -> list[int]:
        return [fd for fd in (self._pidfd, self._keeper) if fd >= 0]

    def _on_end(self) -> None:
        self.forget()
        if not self._ended.done():
            self._ended.set_result(None)

    def forget(self) -> None:
        """Stop watching; the process goes on without us."""
        for fd in self._watched():
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
        self._pidfd = self._keeper = -1

    @property
    def alive(self) -> bool:
        return self._pidfd >= 0

    async def ended(self) -> None:
        """Return when the process has ended."""
        await asyncio.shield(self._ended)

    async def ends(self) -> bool:
        """Whether the process ends within _END_SECONDS."""
        try:
            async with asyncio.timeout(_END_SECONDS):
                await self.ended()
        except TimeoutError:
            return False
        return True

    def send_signal(self, number: signal.Signals) -> None:
        """Harmless when it has ended: the pidfd cannot mean another process."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                return

    async def give(
        self, job: dict[str, Any], told: Callable[[Left], None] = lambda left: None
    ) -> dict[str, Any] | None:
        """Hand over the job; the last line that a mount process says: that it serves, or why not.

        told: called with what it will leave, where another process could go on with its mount. None when it died
        without a word.
        """
        assert self._job is not None
        answer = asyncio.create_task(self._converse(self._job, job, told))
        self._job = None
        ended = asyncio.create_task(self.ended())
        try:
            # The end of the process is none of the connection while its keeper has that, too.
            await asyncio.wait({answer, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                await asyncio.wait({answer}, timeout=_LAST_WORDS_SECONDS)
            return answer.result() if answer.done() else None
        finally:
            answer.cancel()
            ended.cancel()

    async def _converse(
        self, sock: socket.socket, job: dict[str, Any], told: Callable[[Left], None]
    ) -> dict[str, Any] | None:
        loop = asyncio.get_running_loop()
        said = b""
        with sock:
            try:
                await loop.sock_sendall(sock, json.dumps(job).encode() + b"\n")
                while True:
                    piece = await loop.sock_recv(sock, 65536)
                    if not piece:
                        return None
                    *lines, said = (said + piece).split(b"\n")
                    for line in lines:
                        answer = json.loads(line)
                        if not isinstance(answer, dict):
                            return None
                        if "keeper" not in answer:
                            return answer
                        told((answer["keeper"], answer["record"]))
            except OSError:
                return None


class Pool:
    """Makes mount processes, by way of a fork server that is started when it is needed and not there."""

    def __init__(self) -> None:
        self.log_format = "plain"
        """Of what the fork server says, or json."""
        self._server: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._turn = asyncio.Lock()

    def begin(self) -> None:
        """Start the fork server; for a caller that has something else to do before it takes a process. Raises
        OSError."""
        self._start()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                self._server = subprocess.Popen(
                    [*COMMAND, "mount-server"],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    env=environment(),
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self._sock = ours
        return ours

    async def take(self) -> Worker:
        """A process that waits for its job. Raises OSError when none can be made."""
        async with self._turn:
            for _ in range(2):
                # The second time with a new server: the old one may have been killed.
                sock = self._sock or self._start()
                try:
                    async with asyncio.timeout(_FORK_SECONDS):
                        worker = await _fork(sock, self.log_format)
                except OSError:
                    worker = None
                except asyncio.CancelledError:
                    self._end()  # its answer would be taken for that to the next request
                    raise
                if worker is not None:
                    return worker
                self._end()
        raise OSError(0, "the fork server does not answer")

    async def expect_end(self, pid: int) -> None:
        """Have the fork server be silent about the end of a process that the caller is going to kill, and tells why."""
        async with self._turn:
            if self._sock is None:
                return
            try:
                async with asyncio.timeout(_EXPECT_SECONDS):
                    self._sock.send(str(pid).encode())
                    await _readable(self._sock)
                    self._sock.recv(64)
            except (OSError, asyncio.CancelledError) as error:
                self._end()  # its answer would be taken for that to the next request
                if isinstance(error, asyncio.CancelledError):
                    raise

    async def kill(self, worker: Worker) -> bool:
        """Kill a process; whether it ends by that within _END_SECONDS. The caller tells why."""
        await self.expect_end(worker.pid)
        worker.send_signal(signal.SIGKILL)
        return await worker.ends()

    def _end(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    def close(self) -> None:
        """End the fork server; what was forked goes on."""
        self._end()


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)


async def _fork(sock: socket.socket, log_format: str) -> Worker | None:
    """None when the server has ended. log_format: what it says from now on."""
    ours, theirs = socket.socketpair()
    with ExitStack() as undo:
        undo.callback(ours.close)
        keeper = os.eventfd(0)
        undo.callback(os.close, keeper)
        with theirs:
            socket.send_fds(sock, [log_format.encode()], [theirs.fileno(), keeper])
        await _readable(sock)
        reply, descriptors, _, _ = socket.recv_fds(sock, 64, 1)
        if not reply:
            return None
        ours.setblocking(False)
        undo.pop_all()
        return Worker(int(reply), descriptors[0], ours, keeper)
