"""The time a run may take, and what it is spent on: fewer repetitions before fewer rows.

Pure but for the clock. In the first round every workload runs once on every system; in each further one those run whose
last repetition says that they will end in time. In further rounds a system that takes much longer than what is to be
compared does not run (union file systems that ask the branches at every step): its figure is far from the others', and
its time is better spent on repetitions of these.
"""

import math
import time
from collections.abc import Callable, Mapping

PACE = ("udbad-none", "udbad-notify")
SLOW = 2.0
"""A system is slow in a workload when it takes more than so many times what the slowest of PACE takes."""
LEAST = 5.0
"""Seconds that one client may take even at the end of the run."""


class Budget:
    """seconds: how long the run may take from now on, 0 for as long as it takes. clock: monotonic, in seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self._end = clock() + seconds if seconds else math.inf

    def left(self) -> float:
        """Seconds; not below 0."""
        return max(0.0, self._end - self.now())

    def deadline(self, seconds: float) -> float:
        """The deadline of one client that would have so many seconds if there were no end."""
        return min(seconds, max(self.left(), LEAST))

    def next_round(self, taken: Mapping[str, float]) -> list[str]:
        """Systems to run a workload on once more, in their order; none when they would not end in time.

        taken: seconds that each one's last repetition of it took.
        """
        if self._end == math.inf:
            return list(taken)
        limit = SLOW * max((taken[name] for name in PACE if name in taken), default=math.inf)
        chosen = {system: seconds for system, seconds in taken.items() if seconds <= limit}
        return list(chosen) if sum(chosen.values()) <= self.left() else []
