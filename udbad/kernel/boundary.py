"""The one place where exceptions become FUSE replies, and where requests are counted and timed.

Anything but FUSEError that leaves a pyfuse3 handler ends the whole mount, so every handler is wrapped
here. OSError keeps its errno; ENOSYS is never sent by accident, because the kernel then stops sending
that operation for good; what is left is a bug: logged, counted, answered EIO. Cancellation passes.
"""

from __future__ import annotations

import errno
import functools
import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, TypeVar, cast

import pyfuse3

from udbad.metrics import REQUEST_BUCKETS as BUCKETS

log = logging.getLogger(__name__)

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])


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

    def count(self, taken: float, number: int) -> None:
        """One request was answered after `taken` seconds, with errno `number` (0: success)."""
        if number:
            self.errors += 1
        self.seconds += taken
        self.buckets[bisect_left(BUCKETS, taken)] += 1


_operations: dict[str, OpStats] = {}
_uncounted: deque[tuple[OpStats, float, int]] = deque()


def operation(name: str) -> OpStats:
    """The counters of an operation, made when they are first asked for."""
    return _operations.setdefault(name, OpStats())


def operations() -> dict[str, OpStats]:
    """The counters of every operation by name. Event loop only."""
    settle()
    return _operations


def count_in_thread(stats: OpStats, taken: float, number: int) -> None:
    """As `OpStats.count`, from any thread: two that count at the same time would lose one."""
    _uncounted.append((stats, taken, number))


def settle() -> None:
    """Count what threads have answered. Event loop only; called at its turns, so that not much gathers."""
    while _uncounted:
        stats, taken, number = _uncounted.popleft()
        stats.count(taken, number)


def error_number(error: OSError) -> int:
    """What the kernel is told. Never ENOSYS by accident: it then stops sending that operation for good."""
    number = error.errno
    return errno.EIO if not number or number == errno.ENOSYS else number


def _note_stale(operations: Any, args: tuple[Any, ...]) -> None:
    """`operations` (kernel/ops.py) remembers which process is told ESTALE."""
    operations.stale(next((arg.pid for arg in args if isinstance(arg, pyfuse3.RequestContext)), 0))


def handler(function: Handler) -> Handler:
    """Wrap a handler of kernel/ops.py."""
    name = function.__name__
    stats = operation(name)

    @functools.wraps(function)
    async def wrapper(self: object, *args: Any) -> Any:
        start = perf_counter()
        number = 0
        try:
            return await function(self, *args)
        except pyfuse3.FUSEError as error:
            number = error.errno
            raise
        except OSError as error:
            number = error_number(error)
            if number == errno.ESTALE:
                _note_stale(self, args)
            raise pyfuse3.FUSEError(number) from None
        except Exception:
            number = errno.EIO
            stats.bugs += 1
            log.exception("%s%r failed", name, tuple(a for a in args if isinstance(a, int | bytes))[:4])
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            stats.count(perf_counter() - start, number)

    return cast("Handler", wrapper)
