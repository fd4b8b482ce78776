"""The guardian of a mount made by hand: has another process go on with it when its process is killed.

The process that `udbad mount` leaves behind. It has imported everything, forks the mount process and waits; when that
has ended and its keeper lives, it forks the next one, which takes the mount over (life.py). Runs no thread: what is
forked must not be in the middle of anything. Mounts of the daemon have the supervisor for that.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any, Final

from udbad.errors import ExitCode
from udbad.mount import kernelside, later
from udbad.mount.keeper import END_SECONDS, Legacy, be_subreaper
from udbad.mount.life import Guard

log = logging.getLogger(__name__)

Place = tuple[str, int]
"""Of a mount that serves: its mount point, as the kernel has it, and its connection."""
_SERVES: Final = "serves"
_LEAVES: Final = "leaves"
"""First words of what a mount process says: then come its Place, or what it will leave (keeper.Left)."""
_FIRST_DELAY: Final = 0.1
_LONGEST_DELAY: Final = 5.0
"""Seconds between two attempts to take a mount over, doubled each time."""
_END_SECONDS: Final = 0.05
_FORWARDED: Final = signal.SIGINT, signal.SIGTERM

Serve = Callable[[Guard, Callable[[Place], None]], None]
"""What a mount process does: with its guard, and what is to be called when it serves. Raises as life.run()."""


class Guardian:
    """patience: seconds after which a mount that nobody could take over is given up, 0: never."""

    def __init__(self, serve: Serve, on_ready: Callable[[], None], patience: float, private: Iterable[int]) -> None:
        """on_ready: called here, once. private: descriptors that no mount process is to have, until then."""
        self._serve = serve
        self._on_ready = on_ready
        self._patience = patience
        self._private = tuple(private)
        self._pidfd = -1
        self._died = 0.0
        self._place: Place | None = None
        """Once a mount process has served."""
        self._legacy = Legacy()
        self._dying: set[int] = set()
        """Processes that have ended but for a thread."""

    def run(self) -> int:
        """The exit code of the mount process that has ended in order, or could not begin."""
        gc.collect()
        gc.freeze()  # the mount processes share what is there now
        for number in _FORWARDED:
            signal.signal(number, self._forward)
        be_subreaper()  # keepers are children of mount processes, and become ours
        status, served = self._attend()
        while self._legacy and served and status:  # 0: it has ended in order
            status = self._succeed()
        self._legacy.end()
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        return code

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _succeed(self) -> int:
        """Have processes try to take over until one has, and has ended in its turn; the status of the last one."""
        self._died = time.monotonic()
        delay = _FIRST_DELAY
        while True:
            status, served = self._attend()
            if served:
                return status
            if not self._legacy or delay > self._seconds_left():
                self._give_up()
                return int(ExitCode.FAILURE) << 8
            time.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY)

    def _seconds_left(self) -> float:
        """For somebody to take the mount over."""
        return self._patience - (time.monotonic() - self._died) if self._patience else math.inf

    def _give_up(self) -> None:
        """Let nobody wait any more, whoever still has a descriptor of the connection."""
        log.error("nobody could take the mount over; its users get errors")
        self._legacy.end()
        if self._place is not None:
            problem = kernelside.abort(*self._place)
            if problem is not None:
                log.debug("%s", problem)

    def _attend(self) -> tuple[int, bool]:
        """One mount process from its beginning to its end: its status as of waitpid(2), and whether it has served.

        One that is to take over and does not, as long as its users wait, is killed.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        died = os.eventfd(0)
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._be_mount_process(theirs, died)
        theirs.close()
        self._pidfd = os.pidfd_open(pid)
        served = False
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        for fd in (self._pidfd, died, *(before := self._legacy.pidfds())):
            poll.register(fd, select.POLLIN)
        ended = is_late = False
        with ours:
            while not ended:
                ready = dict(poll.poll(None if served else self._milliseconds(is_late)))
                if not ready:
                    if is_late:
                        log.error("process %d cannot be killed", pid)
                        break
                    is_late = True
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                for fd in ready.keys() & before:
                    poll.unregister(fd)
                    self._legacy.prune()
                # What it said before it ended is read before its end is believed.
                ended = (self._pidfd in ready or died in ready) and ours.fileno() not in ready
                if ours.fileno() in ready:
                    word = json.loads(ours.recv(256) or b"null")
                    if word is None:
                        poll.unregister(ours)
                    elif word[0] == _SERVES:
                        served = True
                        begins, self._place = self._place is None, (word[1], word[2])
                        if begins:
                            self._private = ()
                            self._on_ready()
                            _prepare()
                    elif word[0] == _LEAVES:
                        self._legacy.add((word[1], word[2]))
        pidfd, self._pidfd = self._pidfd, -1
        os.close(pidfd)
        os.close(died)
        status = self._reap(pid, is_late)
        if served and self._legacy:
            log.warning("process %d ended, status %d; another one takes over", pid, os.waitstatus_to_exitcode(status))
        return status, served

    def _milliseconds(self, is_late: bool) -> float | None:
        """For a process to begin to serve; of one that has been killed, to end. None: any number."""
        if is_late:
            return END_SECONDS * 1000
        if self._place is None or not self._patience:
            return None
        return max(self._seconds_left(), 0.0) * 1000

    def _reap(self, pid: int, may_live: bool) -> int:
        """Its status. One that somebody is to take over from may have a thread that ends after that (keeper.py)."""
        self._dying = {other for other in self._dying if not os.waitpid(other, os.WNOHANG)[0]}
        ended, status = _wait_briefly(pid) if self._legacy or may_live else os.waitpid(pid, 0)
        if not ended:
            self._dying.add(pid)
            return signal.SIGKILL
        return status

    def _be_mount_process(self, guardian: socket.socket, died: int) -> None:
        for number in _FORWARDED:
            signal.signal(number, signal.default_int_handler)
        for fd in self._private:
            os.close(fd)
        os.setpgid(0, 0)  # what Ctrl-C sends comes from the guardian, once

        def tell(word: list[Any]) -> None:
            with suppress(OSError):  # nobody guards it any more, which is no reason not to serve
                guardian.send(json.dumps(word).encode())

        def ready(place: Place) -> None:
            tell([_SERVES, *place])

        with guardian:
            self._serve(
                Guard(lambda left: tell([_LEAVES, *left]), self._legacy.newest_first(), self._died, died), ready
            )
        raise SystemExit(0)


def _wait_briefly(pid: int) -> tuple[int, int]:
    """As waitpid(2); it may be about to end when its keeper says that it has."""
    end = time.monotonic() + _END_SECONDS
    while True:
        ended = os.waitpid(pid, os.WNOHANG)
        if ended[0] or time.monotonic() > end:
            return ended
        time.sleep(_END_SECONDS / 10)


def _prepare() -> None:
    """While the first process serves: import what the next ones would, and whoever waits for them."""
    later.load()
    gc.collect()
    gc.freeze()
