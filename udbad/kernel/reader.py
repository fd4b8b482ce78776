"""How requests are waited for: without a round through trio while they keep coming.

pyfuse3 takes what it needs of trio from its module attribute `trio`, which pyfuse3.asyncio replaces to
run on asyncio; `install` puts this module's objects there. What differs from trio's own:

- `wait_readable` waits on /dev/fuse itself and on what trio waits for, and goes through trio only when that has
  something to do, or when nothing came for a while. A round through trio costs more than a whole lookup. Branch events
  are taken here too, without one. While requests keep coming, both are looked at every TURN_SECONDS at most, so that
  what gathers is done in one go.
- While requests follow one another at once, the next one is looked for without sleeping, for SPIN_SECONDS: to be
  put to sleep and woken takes a third of what a client waits for a lookup. The first one that does not come in that
  time ends it. Not on a machine with one processor.
- It serves what fast.py can serve, and returns only when libfuse has something to read: a request that was handed
  over on its socket, or the end.
- The lock around it lets the task that just read a request take it again without a turn of the loop.
- A request may be taken back between "readable" and read(2): its client was killed (request_wait_answer in
  fs/fuse/dev.c). A blocking read would then hold the interpreter's lock until the next request, and with it
  events, control socket and signals, on an idle mount for hours. So no descriptor here blocks, and a
  reading task that ends with EAGAIN, which pyfuse3 takes for fatal, is started again.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sized
from contextlib import asynccontextmanager
from time import perf_counter
from types import SimpleNamespace, TracebackType

import pyfuse3
import trio

from udbad.kernel import boundary
from udbad.kernel.fast import Ended, FastPath

log = logging.getLogger(__name__)

BLOCK_SECONDS = 0.0001
"""Without a request for so long, trio's turn may come earlier."""
LINGER_SECONDS = 0.001
"""Without a request for so long, trio waits for the next one."""
TURN_SECONDS = 0.0005
SPIN_SECONDS = 0.00003
TIMER_SECONDS = 0.02
"""How late trio's timers may be while requests keep coming."""


class _PollFd(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


# ppoll(2): select.poll knows milliseconds only, select.select no descriptor above 1023.
_ppoll = ctypes.CDLL(None).ppoll
_BLOCK = ctypes.byref(_Timespec(0, int(BLOCK_SECONDS * 1e9)))
_LINGER = ctypes.byref(_Timespec(0, int(LINGER_SECONDS * 1e9)))


def trios() -> tuple[Sized, int]:
    """Trio's queue of tasks that can go on, and the descriptor that is readable when something else can.

    Neither is public. Without them (an empty queue, -1) trio has its turn when it is due, needed or not.
    """
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        runner = GLOBAL_RUN_CONTEXT.runner
        return runner.runq, runner.io_manager._epoll.fileno()
    except (ImportError, AttributeError):
        return (), -1


class Reader:
    """Waits for the requests of the one mount a process serves, and serves what needs no pyfuse3."""

    def __init__(self, fd: int, pyfuse3s: int, fast: FastPath, on_end: Callable[[bool], None]) -> None:
        """fd: /dev/fuse. pyfuse3s: of our end of its socket pair. on_end: called when the connection has ended, with
        whether it was aborted; it is to make pyfuse3 end."""
        self._fd = fd
        self._fast = fast
        self._on_end = on_end
        self._begun = False
        self._turn = self._looked = 0.0
        """When trio last had its turn; when somebody last looked for what is no request."""
        self._may_spin = len(os.sched_getaffinity(0)) > 1
        self._at_once = False
        """Whether the last request came within SPIN_SECONDS."""
        self._tasks, others = trios()
        self._most, self._linger = (TIMER_SECONDS, _LINGER) if others >= 0 else (TURN_SECONDS, _BLOCK)
        look = select.poll()  # half the time of _ppoll, for what need not wait
        look.register(fd, select.POLLIN)
        look.register(pyfuse3s, select.POLLIN)
        self._look = look.poll
        # poll(2) leaves a negative descriptor out.
        self._polls = (_PollFd * 4)(*(_PollFd(each, select.POLLIN, 0) for each in (fd, pyfuse3s, others, -1)))

    async def wait_readable(self, fd: int) -> None:
        """In the place of trio.lowlevel.wait_readable: returns when there is something for pyfuse3 to read.

        Serves requests meanwhile, without a turn of the event loop while they keep coming.
        """
        if not self._begun:  # INIT is waiting
            self._begun = True
            return
        requests, answers, others, events = self._polls
        coherence = self._fast.coherence
        events.fd = coherence.events
        look = self._look
        take = self._fast.take
        while True:
            now = perf_counter()
            asked = answered = False
            ready = 0
            if not self._tasks and now - self._turn < self._most:
                while self._at_once and not ready:
                    for number, _ in look(0):
                        ready = 1
                        if number == self._fd:
                            asked = True
                        else:
                            answered = True
                    self._at_once = perf_counter() - now < SPIN_SECONDS
                if not ready:
                    others.revents = events.revents = 0
                    if now - self._looked < TURN_SECONDS:
                        ready = _ppoll(self._polls, 2, _BLOCK, None)
                    if not ready:
                        ready = _ppoll(self._polls, 4, self._linger, None)
                    self._at_once = self._may_spin and perf_counter() - now < SPIN_SECONDS
                    if events.revents:
                        coherence.take_events()
                        self._looked = perf_counter()
                        continue
                    if others.revents:
                        ready = 0
                    asked, answered = requests.revents != 0, answers.revents != 0
            if ready <= 0:  # -1: EINTR
                await trio.lowlevel.wait_readable(self._fd)
                boundary.settle()
                coherence = self._fast.coherence  # another one since the mode was changed
                events.fd = coherence.events
                self._turn = self._looked = perf_counter()
                continue
            if answered:
                self._fast.relay()
            if asked:
                try:
                    if not take():
                        return
                except Ended as end:
                    self._on_end(end.aborted)
                    raise trio.ClosedResourceError from None

    async def relay(self, scope: trio.CancelScope) -> None:
        """Pass on answers that come while nobody waits for a request, until the scope is cancelled."""
        with scope:
            while True:
                await trio.lowlevel.wait_readable(self._polls[1].fd)
                self._fast.relay()

    def notify_closing(self, fd: int) -> None:
        """Wake whoever waits for a request: trio.ClosedResourceError."""
        trio.lowlevel.notify_closing(self._fd)


class _Lock:
    """Mutual exclusion of tasks, not fair: whoever runs takes it. Only as an async context manager."""

    def __init__(self) -> None:
        self._held = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiting.park()
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held = False
        if self._waiting:
            self._waiting.unpark()


class _Nursery:
    """The nursery that pyfuse3 starts its reading tasks in; `on_last`: called when all of them have ended."""

    def __init__(self, nursery: trio.Nursery, on_last: Callable[[], None]) -> None:
        self._nursery = nursery
        self._on_last = on_last
        self._readers = 0

    def start_soon(self, loop: Callable[..., Awaitable[None]], *args: object, name: object = None) -> None:
        self._readers += 1
        self._nursery.start_soon(self._read, loop, args, name=name)

    async def _read(self, loop: Callable[..., Awaitable[None]], args: tuple[object, ...]) -> None:
        try:
            while True:
                try:
                    await loop(*args)
                except BlockingIOError:
                    # Raised before a request was taken, so none is lost.
                    log.debug("nothing to read after all")
                else:
                    return
        finally:
            self._readers -= 1
            if not self._readers:
                self._on_last()


def install(fd: int, pyfuse3s: socket.socket, fast: FastPath, on_end: Callable[[bool], None]) -> None:
    """Have pyfuse3 wait our way. Call before pyfuse3.main(); arguments as for `Reader`."""
    reader = Reader(fd, pyfuse3s.fileno(), fast, on_end)

    @asynccontextmanager
    async def open_nursery() -> AsyncIterator[_Nursery]:
        async with trio.open_nursery() as nursery:
            relaying = trio.CancelScope()
            nursery.start_soon(reader.relay, relaying)
            yield _Nursery(nursery, relaying.cancel)

    lowlevel = SimpleNamespace(
        wait_readable=reader.wait_readable,
        notify_closing=reader.notify_closing,
        current_task=trio.lowlevel.current_task,
        current_trio_token=trio.lowlevel.current_trio_token,
    )
    pyfuse3.trio = SimpleNamespace(  # type: ignore[attr-defined]  # the attribute pyfuse3.asyncio replaces too
        Lock=_Lock,
        open_nursery=open_nursery,
        lowlevel=lowlevel,
        from_thread=trio.from_thread,
        ClosedResourceError=trio.ClosedResourceError,
    )
