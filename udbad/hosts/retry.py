"""Trying again, later and later, and saying so once."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

log = logging.getLogger(__name__)

_FIRST: Final = 0.2
_LONGEST: Final = 5.0


class Retry:
    def __init__(self, what: str) -> None:
        """what: is the matter, for the log."""
        self._what = what
        self._seconds = _FIRST
        self._failed = False

    async def wait(self, reason: str) -> None:
        if not self._failed:
            log.warning("%s: %s", self._what, reason)
        self._failed = True
        await asyncio.sleep(self._seconds)
        self._seconds = min(self._seconds * 2, _LONGEST)

    def done(self) -> None:
        """It works."""
        if self._failed:
            log.info("%s: it works again", self._what)
        self._failed = False
        self._seconds = _FIRST
