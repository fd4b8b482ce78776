"""Asking mount processes from the supervisor's event loop: client of protocol.py on asyncio."""

from __future__ import annotations

import asyncio

from udbad.control.protocol import MAX_ANSWER, VERSION, Message, decode_answer, encode


async def ask_async(path: str, request: Message, timeout: float) -> Message:
    """`protocol.ask` for an event loop; raises the same."""
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_unix_connection(path, limit=MAX_ANSWER)
        try:
            writer.write(encode({"version": VERSION, **request}))
            await writer.drain()
            return decode_answer(await reader.readline(), path)
        except ValueError as error:  # StreamReader: a line above the limit
            raise ConnectionError(f"{path}: {error}") from None
        finally:
            writer.close()
