"""/dev/fuse of a mount: requests are read from it and answers written to it, and with it waits what else there is.

System calls, and what the header of a request says; what a request means is for edge/table.py. Errors of a system call
are OSError.
"""

from __future__ import annotations

import os
import select
from time import perf_counter

from udbad import compiled
from udbad.kernel.received import Received, take_header
from udbad.kernel.wire import REPLY, WORD
from udbad.types import Caller

REQUESTS, WOKEN, EVENTS = 1, 2, 4
"""What `wait` has seen."""
FOREVER = -1.0

now = perf_counter
"""Seconds since some moment, for how long something takes."""


def receive(fd: int, request: Received, seconds: float) -> bool:
    """Read the next request, from a descriptor that does not block; False when there is none.

    seconds: how long to look for one without sleeping. What the header says is not to be believed when `size` is less
    than that of one.
    """
    end = perf_counter() + seconds if seconds else 0.0
    while True:
        try:
            size = os.readv(fd, [request.buffer])
        except BlockingIOError:
            if not seconds or perf_counter() > end:
                return False
        else:
            take_header(request, size)
            return True


def name_at(request: Received, start: int) -> bytes | None:
    """The name that a request ends with, which begins at `start`; None where that has no end, or goes on behind it."""
    end = request.size - 1
    if end < start or request.buffer.find(0, start, request.size) != end:
        return None
    return bytes(request.buffer[start:end])


def names_at(request: Received, start: int) -> tuple[bytes, bytes] | None:
    """The two names that a request ends with, of which the first begins at `start`; None as `name_at`."""
    middle = request.buffer.find(0, start, request.size)
    second = None if middle < 0 else name_at(request, middle + 1)
    return None if second is None else (bytes(request.buffer[start:middle]), second)


def word_at(request: Received, start: int) -> int:
    """The number of 32 bits that begins at `start`, which the request is long enough for."""
    number: int = WORD.unpack_from(request.buffer, start)[0]
    return number


def caller_of(request: Received, umask: int) -> Caller:
    """Who has sent a request."""
    return Caller(request.uid, request.gid, request.pid, umask)


def answer(fd: int, unique: int, number: int, body: bytes | bytearray) -> None:
    """Answer a request with an errno, or where that is 0 with `body`. Any thread."""
    if number:
        os.write(fd, REPLY.pack(16, -number, unique))
    else:
        os.writev(fd, [REPLY.pack(16 + len(body), 0, unique), body])


def tell(fd: int, messages: bytes) -> tuple[int, int]:
    """Write notifications, each of which begins with its length, one after the other. Any thread but that of the event
    loop: it may block.

    Returned is how many the kernel had nothing of (ENOENT, ENOTDIR), and the errno that another one got last, 0.
    """
    missed = failure = at = 0
    while at < len(messages):
        end = at + REPLY.unpack_from(messages, at)[0]
        try:
            os.write(fd, messages[at:end])
        except (FileNotFoundError, NotADirectoryError):
            missed += 1
        except OSError as error:
            failure = error.errno or 0
        at = end
    return missed, failure


def wait(requests: int, wake: int, events: int, seconds: float) -> int:
    """Wait until one of three descriptors can be read, of which negative ones are left out: a set of REQUESTS, WOKEN
    and EVENTS, 0 after so many seconds."""
    poll = select.poll()
    bits = {requests: REQUESTS, wake: WOKEN, events: EVENTS}
    for fd in bits:
        if fd >= 0:
            poll.register(fd, select.POLLIN)
    return sum(bits[fd] for fd, _ in poll.poll(None if seconds < 0 else seconds * 1e3))


if not compiled.why_not():
    # The same, as calls of C.
    from udbad.kernel.cdevice import answer, caller_of, name_at, names_at, now, receive, tell, wait, word_at  # noqa: F401
