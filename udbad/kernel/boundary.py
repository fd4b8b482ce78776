"""The one place where exceptions become answers, and where requests are counted and timed.

OSError keeps its errno; ENOSYS is never sent by accident, because the kernel then stops sending that operation for
good; a request that makes no sense is EINVAL, and said; what is left is a bug: logged, counted, answered EIO.
"""

from __future__ import annotations

import errno
import logging
from collections import deque

from udbad.metrics import REQUEST_BUCKETS as BUCKETS

log = logging.getLogger(__name__)


Seconds = float
Errno = int


class Malformed(Exception):
    """A request whose parts do not fit together."""


class OpStats:
    """Counters of one operation, bound once; read at scrape time."""

    __slots__ = ("buckets", "bugs", "errors", "seconds")

    def __init__(self) -> None:
        self.errors = 0
        self.bugs = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(BUCKETS) + 1)

    @property
    def requests(self) -> int:
        """How many were answered."""
        return sum(self.buckets)

    def count(self, taken: Seconds, number: Errno) -> None:
        """One request was answered after `taken` seconds, with errno `number` (0: success)."""
        if number:
            self.errors += 1
        self.seconds += taken
        at = 0
        for limit in BUCKETS:  # most requests end in one of the first
            if taken <= limit:
                break
            at += 1
        self.buckets[at] += 1


_operations: dict[str, OpStats] = {}
_uncounted: deque[tuple[OpStats, float, int]] = deque()


def operation(name: str) -> OpStats:
    """The counters of an operation, made when they are first asked for."""
    return _operations.setdefault(name, OpStats())


def operations() -> dict[str, OpStats]:
    """The counters of every operation by name. Event loop only."""
    settle()
    return _operations


def requests() -> int:
    """How many were answered, of all operations, by and by those that threads have answered. Any thread."""
    return sum(stats.requests for stats in list(_operations.values()))


def count_in_thread(stats: OpStats, taken: float, number: int) -> None:
    """As `OpStats.count`, from any thread: two that count at the same time would lose one."""
    _uncounted.append((stats, taken, number))


def settle() -> None:
    """Count what threads have answered. Event loop only; called when it is idle, and so that not much gathers."""
    while _uncounted:
        stats, taken, number = _uncounted.popleft()
        stats.count(taken, number)


def number_of(error: Exception, stats: OpStats, name: str, node: int) -> int:
    """The errno to answer with, when the operation `name` on a node has raised this. Called where it is handled."""
    if isinstance(error, OSError):
        number = error.errno
        return errno.EIO if not number or number == errno.ENOSYS else number
    if isinstance(error, Malformed):
        log.error("malformed request, %s of node %d: %s", name, node, error)
        return errno.EINVAL
    stats.bugs += 1
    log.error("%s of node %d failed", name, node, exc_info=error)
    return errno.EIO
