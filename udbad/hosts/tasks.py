"""Tasks that belong to a connection: when they have begun, and that they end with it."""

from __future__ import annotations

import asyncio
from typing import Final

_AGAIN: Final = 2.0
"""Seconds; what tasks do at their end takes less, as it would be cut off."""


async def ready_or_failed(ready: asyncio.Event, task: asyncio.Task[None]) -> None:
    """Wait until the event is set; raises what the task does when that ends first."""
    waiting = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait((waiting, task), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        waiting.cancel()


async def end(*tasks: asyncio.Future[None]) -> None:
    """Cancel tasks, and return when they have ended, however that was.

    Once is not enough: a reader that waits in redis-py may go on after it.
    """
    while any(not task.done() for task in tasks):
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=_AGAIN)
    await asyncio.gather(*tasks, return_exceptions=True)  # what they raised is known
