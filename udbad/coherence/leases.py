"""Branches of which somebody else tells every change (udbad/hosts/), for as long as he vouches for that.

A branch on a network file system sends no events here. One who hears of all its changes elsewhere may take a lease on
it: until a moment that he names, nothing changes on it without a hint (`Coherence.hint`). He renews it, or gives it
back when he has missed something. When he does neither, as he was killed or stopped, or nobody reaches him, it ends by
itself; so all that can go wrong outside of this process ends in the same way, and without its help.
"""

from __future__ import annotations

import time

LONGEST = 600.0
"""Seconds that a lease can be given for at once."""


def now() -> float:
    """Seconds of the clock in which leases are given: it is the same for all processes, and goes on in a suspended
    machine, which hears nothing meanwhile (clock_gettime(2), CLOCK_BOOTTIME)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Leases:
    """Those of one mount, by branch index."""

    def __init__(self) -> None:
        self._until: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._until)

    def __contains__(self, index: int) -> bool:
        return index in self._until

    def give(self, index: int, until: float) -> bool:
        """Whether the branch had none, or had one and has none now: a moment that has passed takes it back."""
        had = index in self._until
        if until <= now():
            self._until.pop(index, None)
            return had
        self._until[index] = min(until, now() + LONGEST)
        return not had

    def end(self) -> list[int]:
        """Take those away whose time is over; which branches that were."""
        moment = now()
        over = [index for index, until in self._until.items() if until <= moment]
        for index in over:
            del self._until[index]
        return over

    @property
    def next_end(self) -> float | None:
        return min(self._until.values(), default=None)
