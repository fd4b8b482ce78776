"""Whoever is told ESTALE will look again: what is held for that (union/held.py) is let go of in time."""

from __future__ import annotations

import trio

from udbad.union.held import HOLD_SECONDS, HeldWalks


class Holding:
    """Event loop only, while trio runs."""

    def __init__(self, walks: HeldWalks) -> None:
        self._walks = walks
        self._waiting = False

    def stale(self, pid: int) -> None:
        """A process (thread) is told ESTALE."""
        self._walks.stale(pid)
        if not self._waiting:
            self._waiting = True
            trio.lowlevel.spawn_system_task(self._let_go)

    async def _let_go(self) -> None:
        try:
            while not self._walks.expire():  # noqa: ASYNC110  # not waiting for anybody: what was held longer is to go
                await trio.sleep(HOLD_SECONDS)
        finally:
            self._waiting = False
