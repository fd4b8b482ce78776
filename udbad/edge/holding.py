"""Whoever is told ESTALE will look again: what is held for that (union/held.py) is let go of in time."""

from __future__ import annotations

from udbad.union.held import HOLD_SECONDS, HeldWalks


class Holding:
    """Event loop only."""

    def __init__(self, walks: HeldWalks) -> None:
        self._walks = walks
        self._waiting = False
        self._on_trio = False

    def stale(self, pid: int) -> None:
        """A process (thread) is told ESTALE."""
        self._walks.stale(pid)
        if self._on_trio and not self._waiting:
            self._let_go_in_time()

    def begin(self) -> None:
        """Trio runs from now on: what has been held since before that goes, too."""
        self._on_trio = True
        self._let_go_in_time()

    def _let_go_in_time(self) -> None:
        import trio  # not for serving

        self._waiting = True
        trio.lowlevel.spawn_system_task(self._let_go)

    async def _let_go(self) -> None:
        import trio

        try:
            while not self._walks.expire():  # noqa: ASYNC110  # not waiting for anybody: what was held longer is to go
                await trio.sleep(HOLD_SECONDS)
        finally:
            self._waiting = False
