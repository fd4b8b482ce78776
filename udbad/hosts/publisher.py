"""Tells what has changed on a branch: whatever it is given, in order, and nothing of it twice or never.

What has been changed while nobody could be told is kept, and told later; when that is too much, it is "everything".
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from udbad.hosts import message
from udbad.hosts.bus import Bus, BusError, BusSettings, connect, subject
from udbad.hosts.message import EVERYTHING, Message, Unreadable
from udbad.hosts.retry import Retry
from udbad.hosts.tasks import end

log = logging.getLogger(__name__)

_MOST_PATHS: Final = 100_000
"""That wait; then all of them are `EVERYTHING`."""
_MARKS_AT_ONCE: Final = 1000
"""In one message."""


@dataclass(slots=True)
class _Batch:
    """Paths with their words, and the marks that come after them."""

    changes: dict[str, str] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)


class Publisher:
    """That of one branch."""

    def __init__(
        self, settings: BusSettings, branch: str, host: str, role: str, drain: Callable[[], Awaitable[bool]]
    ) -> None:
        """host: unique. drain: has `changed` called for everything that has happened up to then; False: that cannot be
        known, and no mark is passed on."""
        self.branch = branch
        self.published = 0
        """Messages so far."""
        self.connected = False
        self._settings = settings
        self._host = host
        self._role = role
        self._drain = drain
        self._boot = secrets.token_hex(8)
        self._seq = 0
        self._batches: deque[_Batch] = deque([_Batch()])
        self._count = 0
        self._sending: tuple[str, list[tuple[str, str]], list[str]] | None = ("hello", [], [])
        """What was begun to be told, and has not been acknowledged: it is told again under the same number."""
        self._wake = asyncio.Event()
        self._ending = False

    def changed(self, path: str, words: str) -> None:
        """`path` on the branch, and what has become of it (`udbad feed`); a slash at its end: with all below it."""
        tail = self._batches[-1]
        if tail.marks:
            tail = _Batch()
            self._batches.append(tail)
        before = len(tail.changes)
        message.gather(tail.changes, path, words)
        self._count += len(tail.changes) - before
        if self._count > _MOST_PATHS:
            self.everything()
        self._wake.set()

    def everything(self) -> None:
        """Anything may have changed."""
        marks = [mark for batch in self._batches for mark in batch.marks]
        self._batches = deque([_Batch({EVERYTHING: ""}, marks)])
        self._count = 1
        self._wake.set()

    async def run(self) -> None:
        """Until `end`, and all was told; or until it is cancelled."""
        retry = Retry(f"{self.branch}: nothing can be published")
        while not self._ended:
            try:
                bus = await connect(self._settings)
                try:
                    await self._publish(bus, retry)
                finally:
                    self.connected = False
                    await bus.close()
            except BusError as error:
                await retry.wait(str(error))

    def end(self) -> None:
        """Have `run` return once everything was told that `changed` was called for."""
        self._ending = True
        self._wake.set()

    @property
    def _ended(self) -> bool:
        return self._ending and self._sending is None and not self._count and not self._batches[0].marks

    async def _publish(self, bus: Bus, retry: Retry) -> None:
        listening = asyncio.create_task(self._listen(bus))
        try:
            while not self._ended:
                if not self._next():
                    waking = asyncio.create_task(self._wake.wait())
                    try:
                        await asyncio.wait((waking, listening), return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        waking.cancel()
                    if listening.done():
                        listening.result()
                    self._wake.clear()
                    continue
                await self._send(bus)
                self.connected = True
                retry.done()
            if self._seq:
                self._sending = "bye", [], []
                await self._send(bus)
        finally:
            await end(listening)

    def _next(self) -> bool:
        """Whether there is something to be told: what comes next."""
        if self._sending is not None:
            return True
        batch = self._batches[0]
        if batch.changes:
            changes = message.portion(batch.changes)
            for path, _ in changes:
                del batch.changes[path]
            self._sending = "changes", changes, []
            self._count -= len(changes)
        elif batch.marks:
            self._sending = "passed", [], batch.marks[:_MARKS_AT_ONCE]
            del batch.marks[:_MARKS_AT_ONCE]
        if not batch.changes and not batch.marks and len(self._batches) > 1:
            self._batches.popleft()
        return self._sending is not None

    async def _send(self, bus: Bus) -> None:
        assert self._sending is not None
        kind, changes, marks = self._sending
        told = Message(
            kind, bus.identity, self._host, self._boot, self._seq + 1, self.branch, self._role, changes, marks
        )
        await bus.publish(subject(self._settings.prefix, self.branch, "changes"), told.encode())
        self._seq += 1
        self._sending = None
        self.published += 1

    async def _listen(self, bus: Bus) -> None:
        """Have marks passed on."""
        async for delivery in bus.read(subject(self._settings.prefix, self.branch, "marks"), None):
            try:
                mark = message.decode_mark(delivery.data)
            except Unreadable as error:
                log.info("%s: not a mark: %s", self.branch, error)
                continue
            if await self._drain():
                self._batches[-1].marks.append(mark)
                self._wake.set()
