"""The control socket of a mount process: server.py on trio."""

from __future__ import annotations

import socket

import trio

from udbad.control.server import Command, Server

_CHUNK = 4096


async def serve(listener: socket.socket, commands: dict[str, Command]) -> None:
    """Answer clients until cancelled, and close the listening socket."""
    core = Server(commands)

    async def client(stream: trio.SocketStream) -> None:
        with trio.CancelScope() as scope:
            try:
                async with stream:
                    await core.converse(_Client(stream, scope))
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                pass

    await trio.serve_listeners(client, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])


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
