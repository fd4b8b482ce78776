"""The control socket of the supervisor: server.py on asyncio."""

from __future__ import annotations

import asyncio
import socket

from udbad.control.protocol import BACKLOG
from udbad.control.server import Command, Server

_CHUNK = 4096


class AsyncServer:
    """Answers clients from `start` to `close`."""

    def __init__(self, commands: dict[str, Command]) -> None:
        self._core = Server(commands)
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Server | None = None

    async def start(self, sock: socket.socket) -> None:
        """sock: listening, from protocol.bind()."""
        self._listening = await asyncio.start_unix_server(self._serve, sock=sock, limit=_CHUNK, backlog=BACKLOG)

    async def close(self) -> None:
        if self._listening is not None:
            self._listening.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._core.converse(_Client(reader, writer, task))
        except (OSError, asyncio.CancelledError):
            # Cancelled by close() or for a newer client: the end of this client and of nothing else. What it
            # did not take is dropped: close() would wait for it.
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()


class _Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, task: asyncio.Task[None]) -> None:
        self._reader = reader
        self._writer = writer
        self.cancel = task.cancel
        self.getsockopt = writer.get_extra_info("socket").getsockopt

    async def receive(self, seconds: float) -> bytes:
        async with asyncio.timeout(seconds):
            return await self._reader.read(_CHUNK)

    async def send(self, data: bytes, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            self._writer.write(data)
            await self._writer.drain()
