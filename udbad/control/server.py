"""What a control server does with its clients (protocol.py says what is spoken), whatever event loop carries them.

Only root and the owner of the process are answered. A client gets one request at a time, of at most MAX_LINE bytes,
and is dropped when it is silent for too long, does not take its answers, or was silent for longest when too many have
connected: whoever hangs never keeps others out. asyncserver.py and trioserver.py bring the bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from udbad.control.protocol import (
    IDLE_SECONDS,
    MAX_CLIENTS,
    MAX_LINE,
    SEND_SECONDS,
    VERSION,
    Message,
    decode_request,
    encode,
    may_ask,
    refusal,
)
from udbad.errors import UserError

log = logging.getLogger(__name__)

Command = Callable[[Message], Awaitable[Message]]
"""Raises UserError or OSError for what it refuses; its text is the answer."""


class Client(Protocol):
    """A connection, as an event loop has it. What its methods raise ends the conversation and is the transport's."""

    def getsockopt(self, level: int, option: int, size: int) -> bytes: ...

    async def receive(self, seconds: float) -> bytes:
        """What has come, b"" at the end; raises when nothing has come for so long."""

    async def send(self, data: bytes, seconds: float) -> None:
        """Returns when all of it is on its way; raises when that takes longer."""

    def cancel(self) -> object:
        """End its conversation, from another task."""


class Server:
    """Answers with a table of commands, by the name of the operation."""

    def __init__(self, commands: dict[str, Command]) -> None:
        self._commands = commands
        self._clients: dict[Client, None] = {}
        """Longest silence first; less those that have been told to go."""

    async def converse(self, client: Client) -> None:
        """Answer one client until it leaves or has to go."""
        self._clients[client] = None
        if len(self._clients) > MAX_CLIENTS:
            oldest = next(iter(self._clients))
            del self._clients[oldest]
            oldest.cancel()
        try:
            await self._answer_all(client)
        finally:
            self._clients.pop(client, None)

    async def _answer_all(self, client: Client) -> None:
        if not may_ask(client.getsockopt):
            await client.send(encode(refusal("not permitted")), SEND_SECONDS)
            return
        buffer = bytearray()
        while True:
            try:
                line = await _next_line(client, buffer)
            except UserError as error:
                await client.send(encode(refusal(error.message)), SEND_SECONDS)
                return
            if line is None:
                return
            # Whoever is being answered is not idle: ended only when everybody is.
            if client in self._clients:
                del self._clients[client]
                self._clients[client] = None
            await client.send(encode(await self._run(line)), SEND_SECONDS)

    async def _run(self, line: bytes) -> Message:
        operation = "?"
        try:
            request = decode_request(line, self._commands)
            operation = request["op"]
            return {"ok": True, "version": VERSION, **await self._commands[operation](request)}
        except UserError as error:
            return refusal(error.message, error.code)
        except OSError as error:
            return refusal(str(error) or type(error).__name__)
        except Exception as error:
            log.exception("control request %r failed", operation)
            return refusal(f"internal error: {type(error).__name__}")


async def _next_line(client: Client, buffer: bytearray) -> bytes | None:
    """The next line, without its end; None when none comes. Raises UserError when it is too long.

    buffer: what has come and is not used yet.
    """
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        length = buffer.find(b"\n")
        if length > MAX_LINE or (length < 0 and len(buffer) > MAX_LINE):
            raise UserError("request too long")
        if length >= 0:
            line = bytes(buffer[:length])
            del buffer[: length + 1]
            return line
        data = await client.receive(max(deadline - time.monotonic(), 0.0))
        if not data:
            return None
        buffer += data
