"""The control socket of the supervisor (protocol.py says what is spoken), on asyncio.

The same limits as in the mount process: mode 0600, peer checked, lines of MAX_LINE bytes, and of too many
clients the one that was silent for longest has to go.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

from udbad.control.protocol import (
    BACKLOG,
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


class Server:
    """Answers clients from `start` to `close`."""

    def __init__(self, commands: dict[str, Command]) -> None:
        self._commands = commands
        self._clients: dict[asyncio.Task[None], None] = {}  # longest silence first
        self._server: asyncio.Server | None = None

    async def start(self, sock: socket.socket) -> None:
        """sock: listening, from protocol.bind()."""
        self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=MAX_LINE, backlog=BACKLOG)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._clients):
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[task] = None
        if len(self._clients) > MAX_CLIENTS:
            oldest = next(iter(self._clients))
            del self._clients[oldest]
            oldest.cancel()
        try:
            await self._converse(reader, writer, task)
        except (OSError, asyncio.CancelledError):
            # Cancelled by close() or for a newer client: the end of this client and of nothing else. What it
            # did not take is dropped: close() would wait for it.
            writer.transport.abort()
        finally:
            self._clients.pop(task, None)
            writer.close()

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, task: asyncio.Task[None]
    ) -> None:
        if not may_ask(writer.get_extra_info("socket").getsockopt):
            await _send(writer, refusal("not permitted"))
            return
        while True:
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    line = await reader.readline()
            except ValueError:  # StreamReader.readline: a line above the limit
                await _send(writer, refusal("request too long"))
                return
            if not line.endswith(b"\n"):
                return
            self._clients.pop(task, None)
            self._clients[task] = None
            await _send(writer, await self._run(line))

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


async def _send(writer: asyncio.StreamWriter, answer: Message) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        writer.write(encode(answer))
        await writer.drain()
