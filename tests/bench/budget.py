"""The time a run may take, and what it is spent on: fewer repetitions before fewer rows.

Pure but for the clock. In the first round every workload runs once on every system; in each further one those run whose
last repetition says that they will end in time (measure.py says on which systems).
"""

import math
import time
from collections.abc import Callable, Iterable

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

    @property
    def bounded(self) -> bool:
        return self._end < math.inf

    def allows(self, seconds: Iterable[float]) -> bool:
        """Whether what takes so many seconds each ends in time."""
        return sum(seconds) <= self.left()
