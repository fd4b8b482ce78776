"""The control socket of a mount process: server.py on trio."""

from __future__ import annotations

import socket

import trio

from udbad.control.protocol import BACKLOG, bind
from udbad.control.server import Command, Server

_CHUNK = 4096


def listen(path: str) -> trio.SocketListener:
    """`bind` for trio."""
    return trio.SocketListener(trio.socket.from_stdlib_socket(bind(path)))


def go_on(fd: int) -> trio.SocketListener:
    """A socket that another process has listened on; fd: owned from here on. Raises OSError."""
    sock = socket.socket(fileno=fd)
    sock.listen(BACKLOG)  # whoever connects is told that it is us, SO_PEERCRED
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


async def serve(listener: trio.SocketListener, commands: dict[str, Command]) -> None:
    """Answer clients until cancelled."""
    core = Server(commands)

    async def client(stream: trio.SocketStream) -> None:
        with trio.CancelScope() as scope:
            try:
                async with stream:
                    await core.converse(_Client(stream, scope))
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                pass

    await trio.serve_listeners(client, [listener])


class _Client:
    def __init__(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        self._stream = stream
        self.cancel = scope.cancel
        self.getsockopt = stream.socket.getsockopt

    async def receive(self, seconds: float) -> bytes:
        with trio.fail_after(seconds):
            return bytes(await self._stream.receive_some(_CHUNK))

    async def send(self, data: bytes, seconds: float) -> None:
        with trio.fail_after(seconds):
            await self._stream.send_all(data)
