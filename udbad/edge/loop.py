"""The event loop of a mount that is served natively: requests first, everything else when it has something to do.

It waits for three descriptors: /dev/fuse, the branch events of the coherence strategy, and an eventfd by which any
thread has something called here (`post`). Trio, which all else runs on (control socket, signals, what a command sets
off), is a guest of this loop (trio.lowlevel.start_guest_run): it waits for its own descriptors in a thread and posts
its turns. So a request costs nothing of trio, and trio nothing of a request. It comes when requests are served already:
to import it takes longer than to mount.

- While requests follow one another at once, the next one is looked for without sleeping, for SPIN_SECONDS: to be put to
  sleep and woken takes a third of what a client waits for a lookup. The first one that does not come in that time ends
  it. Not on a machine with one processor.
- A read that the disk has been asked for is looked for again while there is nothing else to do, every LOOK_SECONDS: a
  quick disk takes less time than it does to have a thread wait for it (waiting.py says for how long).
- Branch events are looked at every TURN_SECONDS at most, so that what gathers is done in one go: our own changes send
  events, too, and so does each write of a file that the kernel writes by itself (kernel/passthrough.py). One that
  nobody waits for is merged with the one before (inotify_merge() in the kernel); else the writer would wake us.
- The thread asks for short turns on its processor (kernel/scheduling.py), and so do those that it makes: it serves many
  who wait, and one of them that shares a processor with it, or what copies a large file, would else keep all of them
  waiting until the next tick.
- A request may be taken back between "readable" and read(2): its client was killed (request_wait_answer() in
  fs/fuse/dev.c). A blocking read would then hold everything else until the next request, so no descriptor blocks.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable
from threading import Lock, Timer
from time import perf_counter
from typing import Any, Protocol

from udbad.kernel import boundary, device, scheduling

log = logging.getLogger(__name__)

TURN_SECONDS = 0.001
SPIN_SECONDS = 0.00003
LOOK_SECONDS = 0.000003
AGAIN_SECONDS = 1.0


class Server(Protocol):
    """What the loop serves."""

    def take(self, seconds: float) -> bool:
        """Serve one request, if one comes within so many seconds, in which nobody sleeps; False when none did."""

    def look(self) -> bool:
        """Answer requests whose disk has answered; whether there may soon be another one."""

    def events(self) -> int:
        """The descriptor of branch events now, -1 for none."""

    def take_events(self) -> None:
        """Take notice of some of them."""


class Loop:
    """Runs in one thread from `run` to its return; `post` and `close` may be called before and after."""

    def __init__(self) -> None:
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._open = Lock()
        """Held while `_wake` is used or closed: its number may be another descriptor's afterwards."""
        self._calls: deque[Callable[[], object]] = deque()
        self._fd = -1
        self._spin = SPIN_SECONDS if len(os.sched_getaffinity(0)) > 1 else 0.0
        self._server: Server | None = None

    def post(self, call: Callable[[], object]) -> None:
        """Have something called on the loop, soon; nothing after `close`. Any thread, trio's among them, of which one
        may be left that waited for trio's descriptors."""
        with self._open:
            if self._wake >= 0:
                self._calls.append(call)
                os.eventfd_write(self._wake, 1)

    def serve(self, fd: int, server: Server) -> None:
        """From now on requests come from `fd`, /dev/fuse, non-blocking."""
        self._fd = fd
        self._server = server

    @property
    def serves(self) -> bool:
        """Whether there may be requests."""
        return self._server is not None

    @property
    def spins(self) -> bool:
        """Whether the next request is looked for without sleeping."""
        return self._spin > 0

    def leave(self) -> None:
        """There are no requests any more, nor events."""
        self._fd = -1
        self._server = None

    def run(self, main: Callable[[], Awaitable[None]], soon: Callable[[Callable[[], object]], object]) -> None:
        """Serve, and run `main` on trio once what `soon` is given has been called, by any thread. Returns when `main`
        has, or when there is nothing to serve any more before it has begun. Raises what it raises.

        While trio gets no descriptors or no memory, requests are served without it, and it is begun again and again.
        """
        scheduling.take_turns(scheduling.SHORTEST)
        outcomes: list[Any] = []
        failures: list[Exception] = []
        begun: list[bool] = []
        refused: list[OSError] = []

        def begin() -> None:
            import trio  # not for serving

            try:
                trio.lowlevel.start_guest_run(
                    main,
                    run_sync_soon_threadsafe=self.post,
                    run_sync_soon_not_threadsafe=self._calls.append,
                    done_callback=outcomes.append,
                )
                begun.append(True)
            except OSError as error:
                if not refused:
                    log.warning("no commands, signals or umount are attended to yet: %s; tried again", error.strerror)
                refused.append(error)
                again = Timer(AGAIN_SECONDS, self.post, (begin,))
                again.daemon = True
                again.start()
            except Exception as error:
                failures.append(error)
                self.leave()

        soon(lambda: self.post(begin))
        while not outcomes:
            if self._server is not None:
                self._serve(self._server, outcomes)
            elif begun:
                self._wait(-1, device.FOREVER)
                self.call_posted()
            elif failures:
                raise failures[0]
            else:
                return
        outcomes[0].unwrap()

    def call_posted(self) -> None:
        """Call what was posted up to now; what that posts has to wait, as requests come first."""
        for _ in range(len(self._calls)):
            call = self._calls.popleft()
            try:
                call()
            except Exception:
                log.exception("posted work failed")

    def _wait(self, events: int, seconds: float) -> int:
        """What there is to do within so many seconds, as device.wait says it; what was posted is to be called then."""
        seen = device.wait(self._fd, self._wake, events, 0.0 if self._calls else seconds)
        if seen & device.WOKEN:
            try:
                os.eventfd_read(self._wake)
            except BlockingIOError:
                pass
        return seen

    def _serve(self, server: Server, outcomes: list[Any]) -> None:
        """The loop proper, until there is another server or trio has ended."""
        calls, spin = self._calls, self._spin
        at_once = False
        """Whether the last request came within SPIN_SECONDS."""
        looked = 0.0
        while self._server is server and not outcomes:
            if calls:
                self.call_posted()
                if self._server is not server or outcomes:
                    return
            now = perf_counter()
            if at_once:
                if now - looked >= TURN_SECONDS:
                    looked = now
                    boundary.settle()
                    if self._wait(server.events(), 0.0) & device.EVENTS:
                        server.take_events()
                if server.look():
                    server.take(LOOK_SECONDS)
                else:
                    at_once = server.take(spin)
                continue
            rest = TURN_SECONDS - (now - looked)
            seen = self._wait(-1, rest) if rest > 0 else 0
            if not (seen or calls):
                boundary.settle()
                seen = self._wait(server.events(), device.FOREVER)
                looked = perf_counter()
                if seen & device.EVENTS:
                    server.take_events()
            at_once = perf_counter() - now < spin
            if seen & device.REQUESTS:
                server.take(0.0)
                at_once |= server.look()

    def close(self) -> None:
        """After `run` has returned. What is posted from now on is not called."""
        with self._open:
            os.close(self._wake)
            self._wake = -1
