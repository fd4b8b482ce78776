"""The control socket of a mount process (protocol.py says what is spoken).

The socket has mode 0600, and only the owner of the process or root is answered. A client gets one request
at a time, of at most MAX_LINE bytes, and is dropped when it is silent for too long, does not take its
answers, or was silent for longest when too many have connected: whoever hangs never keeps others out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Sequence

import trio

from udbad.control.protocol import (
    IDLE_SECONDS,
    MAX_CLIENTS,
    MAX_LINE,
    SEND_SECONDS,
    VERSION,
    Message,
    bind,
    decode_request,
    encode,
    may_ask,
    refusal,
    text_of,
)
from udbad.errors import ExitCode, UserError

log = logging.getLogger(__name__)

Request = Message
Command = Callable[[Request], Awaitable[Message]]


def path_of(request: Request) -> Sequence[bytes]:
    """The names of the path in the mount that a request is about. Raises UserError."""
    parts = os.fsencode(text_of(request, "path", "")).split(b"/")
    parts = [part for part in parts if part not in (b"", b".")]
    if b".." in parts:
        raise UserError("a path with '..' is not looked up here", ExitCode.OPTION)
    return parts


def listen(path: str) -> trio.SocketListener:
    """`bind` for trio."""
    return trio.SocketListener(trio.socket.from_stdlib_socket(bind(path)))


async def serve(listener: trio.SocketListener, commands: dict[str, Command]) -> None:
    """Answer clients until cancelled."""
    scopes: dict[trio.CancelScope, None] = {}  # longest silence first

    async def client(stream: trio.SocketStream) -> None:
        with trio.CancelScope() as scope:
            scopes[scope] = None
            if len(scopes) > MAX_CLIENTS:
                oldest = next(iter(scopes))
                del scopes[oldest]
                oldest.cancel()
            try:
                async with stream:
                    await _converse(stream, commands, scope, scopes)
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                pass
            finally:
                scopes.pop(scope, None)

    await trio.serve_listeners(client, [listener])


async def _converse(
    stream: trio.SocketStream,
    commands: dict[str, Command],
    scope: trio.CancelScope,
    scopes: dict[trio.CancelScope, None],
) -> None:
    if not may_ask(stream.socket.getsockopt):
        await _answer(stream, refusal("not permitted"))
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
                    await _answer(stream, refusal("request too long"))
                    return
        if idle.cancelled_caught:
            return
        line, _, buffer = buffer.partition(b"\n")
        # Whoever is being answered is not idle: ended only when everybody is.
        scopes.pop(scope, None)
        scopes[scope] = None
        await _answer(stream, await _run(line, commands))


async def _run(line: bytes, commands: dict[str, Command]) -> Message:
    operation = "?"
    try:
        request = decode_request(line, commands)
        operation = request["op"]
        return {"ok": True, "version": VERSION, **await commands[operation](request)}
    except UserError as error:
        return refusal(error.message, error.code)
    except OSError as error:
        return refusal(str(error))
    except Exception as error:
        log.exception("control request %r failed", operation)
        return refusal(f"internal error: {type(error).__name__}")


async def _answer(stream: trio.SocketStream, answer: Message) -> None:
    with trio.fail_after(SEND_SECONDS):
        await stream.send_all(encode(answer))
