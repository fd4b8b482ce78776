"""Descriptors of a mount process: how many it may have, and room for them."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

_OTHERS: Final = 1024
"""Those that are neither of directories nor of open files: branches, sockets, copy-ups, one operation's own."""
_MAX_DIRECTORIES: Final = 100_000
_ROOM: Final = 4096
"""Of a new mount; 33 KB of the kernel's memory."""


def limits() -> tuple[int, int]:
    """How many directories may have one, and how many directories and open files together; as many as the hard limit
    permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = hard - min(_OTHERS, hard // 4)
    return min(most, _MAX_DIRECTORIES), most


def reserve(keepers: Iterable[int]) -> None:
    """Make room for as many as processes `keepers` have, at least for those of a new mount. To be called before this
    process shares its table with a keeper of its own: to make a larger one, the kernel then waits until nobody looks
    at the old one (synchronize_rcu() in expand_fdtable(), fs/file.c), some ten milliseconds each time it is doubled,
    in the middle of a request or of a takeover."""
    _, most = limits()
    room = min(max([_ROOM, *map(_room_of, keepers)]), most)
    fd = os.eventfd(0)
    try:
        os.close(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, room - 1))
    finally:
        os.close(fd)


def _room_of(pid: int) -> int:
    """How large the table of a process is, proc(5)."""
    with suppress(OSError), open(f"/proc/{pid}/status", "rb") as lines:
        for line in lines:
            name, _, value = line.partition(b":")
            if name == b"FDSize":
                return int(value)
    return 0
