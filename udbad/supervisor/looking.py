"""Looking at file systems that may hang, in threads that nobody waits for: the supervisor waits for no branch."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def missing(paths: list[str]) -> list[str]:
    """Which of these directories are not there."""
    return await in_a_thread(lambda: [path for path in paths if not os.path.isdir(path)])


async def in_a_thread(look: Callable[[], T]) -> T:
    """What `look` returns; in a thread that nobody waits for at the end: NFS may hang."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def answer(found: T) -> None:
        if not result.done():
            result.set_result(found)

    def run() -> None:
        found = look()
        try:
            loop.call_soon_threadsafe(answer, found)
        except RuntimeError:  # the loop is closed, nobody wants to know
            return

    threading.Thread(target=run, daemon=True).start()
    return await result
