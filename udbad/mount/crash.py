"""What a mount process died of, for the next one: what Python says of a fault, in memory that outlives it.

A SIGSEGV, SIGBUS, SIGFPE, SIGILL or SIGABRT says in which thread it came; a SIGKILL says nothing.
"""

from __future__ import annotations

import faulthandler
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from udbad.inodes.record import Record, pack, unpack

_NOTE: Final = "crash"
_TIMES: Final = "crashes"
_MOST: Final = 1 << 16
"""Bytes that are looked at."""
_THREAD: Final = r"(?m)^Current thread (0x[0-9a-f]+)"
_STACK: Final = r"(?m)^Current thread .*\n((?:  .*\n)*)"
WINDOW: Final = 60.0
_FREE: Final = 5
"""So many crashes within WINDOW seconds cost no delay: a request may need them to be found out (edge/poison.py)."""
_FIRST_DELAY: Final = 0.1
_LONGEST_DELAY: Final = 5.0


class Crash:
    """Of the process before. text: what is known of it, empty when it was killed or ended by itself."""

    def __init__(self, record: Record, take: Callable[[int], int]) -> None:
        """record: of that process; take: duplicates its descriptors."""
        self.text = ""
        noted = record.noted(_NOTE)
        if noted is not None:
            with suppress(OSError):
                fd = take(int(noted))
                try:
                    self.text = os.pread(fd, _MOST, 0).decode(errors="replace")
                finally:
                    os.close(fd)
        times = record.noted(_TIMES)
        self._times: list[float] = [] if times is None else unpack(times)

    @property
    def thread(self) -> int | None:
        """In which it came, as threading.get_ident() names it; None: not known."""
        found = re.search(_THREAD, self.text)
        return None if found is None else int(found[1], 16)

    def __str__(self) -> str:
        """In one line."""
        first, _, _ = self.text.strip().partition("\n")
        stack = re.search(_STACK, self.text)
        calls = [line.strip() for line in stack[1].splitlines()] if stack is not None else []
        return "; ".join([first, *calls])

    def pace(self, record: Record, died: float) -> float:
        """Note in the record of this process that the one before has crashed, at `died` (time.monotonic()); how long
        (seconds) to wait now, so that a mount on which every process crashes does not take all of a processor."""
        if not self.text:
            return 0.0
        times = [*(when for when in self._times if 0 <= died - when < WINDOW), died]
        record.note(_TIMES, pack(times[-20:]))
        more = len(times) - _FREE
        return min(_FIRST_DELAY * 2.0**more, _LONGEST_DELAY) - (time.monotonic() - died) if more > 0 else 0.0


def watch(record: Record) -> int:
    """From now on have a fault of this process told to the next one; a descriptor, to be closed after `forget`.

    Raises OSError.
    """
    fd = os.memfd_create("udbad crash", os.MFD_CLOEXEC)
    record.note(_NOTE, b"%d" % fd)
    faulthandler.enable(fd)
    return fd


def tell(fd: int, error: BaseException) -> None:
    """The same of an error that ends this process. fd: as of `watch`."""
    with suppress(OSError):
        os.write(fd, f"{type(error).__name__}: {error}\n".encode(errors="replace"))


def forget(fd: int) -> None:
    """It ends in order."""
    faulthandler.disable()
    os.close(fd)
