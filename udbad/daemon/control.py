"""The control socket of a mount process: one JSON object a line, answered by one JSON object a line.

Requests have "op" and whatever the operation needs; answers have "ok" and either the result's keys or
"error". The socket has mode 0600, and only the owner of the process or root is answered. A client gets
one request at a time, of at most MAX_LINE bytes, and is dropped when it is silent for too long.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import trio

log = logging.getLogger(__name__)

MAX_LINE = 64 * 1024
MAX_CLIENTS = 64
IDLE_SECONDS = 60
VERSION = 1

Request = dict[str, Any]
Command = Callable[[Request], Awaitable[dict[str, Any]]]


def listen(path: str) -> trio.SocketListener:
    """Bind the socket; a stale one of an earlier process is replaced, a living one is an OSError (EADDRINUSE)."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(path)
    except FileNotFoundError:
        pass
    except OSError:
        os.unlink(path)
    else:
        raise OSError(errno.EADDRINUSE, f"another process answers on {path}")
    finally:
        probe.close()
    sock = trio.socket.from_stdlib_socket(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    previous = os.umask(0o177)
    try:
        stdlib = socket.socket(fileno=os.dup(sock.fileno()))
        stdlib.bind(path)
        stdlib.close()
    finally:
        os.umask(previous)
    sock.listen(16)
    return trio.SocketListener(sock)


async def serve(listener: trio.SocketListener, commands: dict[str, Command]) -> None:
    """Answer clients until cancelled."""
    limit = trio.CapacityLimiter(MAX_CLIENTS)

    async def client(stream: trio.SocketStream) -> None:
        async with limit, stream:
            try:
                await _converse(stream, commands)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

    await trio.serve_listeners(client, [listener])


def _peer_uid(stream: trio.SocketStream) -> int:
    raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", raw)[1]
    return uid


async def _converse(stream: trio.SocketStream, commands: dict[str, Command]) -> None:
    if _peer_uid(stream) not in (0, os.getuid()):
        await _answer(stream, {"ok": False, "error": "not permitted"})
        return
    buffer = b""
    while True:
        with trio.move_on_after(IDLE_SECONDS) as idle:
            while b"\n" not in buffer:
                data = await stream.receive_some(4096)
                if not data:
                    return
                buffer += data
                if len(buffer) > MAX_LINE:
                    await _answer(stream, {"ok": False, "error": "request too long"})
                    return
        if idle.cancelled_caught:
            return
        line, _, buffer = buffer.partition(b"\n")
        await _answer(stream, await _run(line, commands))


async def _run(line: bytes, commands: dict[str, Command]) -> dict[str, Any]:
    try:
        request = json.loads(line)
        operation = request["op"]
        command = commands[operation]
    except (ValueError, TypeError, KeyError):
        return {"ok": False, "error": "not a request"}
    try:
        return {"ok": True, "version": VERSION, **await command(request)}
    except OSError as error:
        return {"ok": False, "error": str(error)}
    except Exception as error:
        log.exception("control request %r failed", operation)
        return {"ok": False, "error": f"internal error: {type(error).__name__}"}


async def _answer(stream: trio.SocketStream, answer: dict[str, Any]) -> None:
    await stream.send_all(json.dumps(answer).encode() + b"\n")
