"""The guardian of a mount made by hand: has another process go on with it when its process is killed.

The process that `udbad mount` leaves behind. It forks the mount process and waits; when that has ended and its keeper
lives, it forks the next one, which takes the mount over (life.py). Runs no thread: what is forked must not be in the
middle of anything. Mounts of the daemon have the supervisor for that.

What it has imported, or holds the code of (held.py), is what the next mount processes are made of. So for a new version
it executes that, and is its guardian from then on, with the same number, children and record; the mount process makes
room for one of that version.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, Final, NamedTuple

from udbad.control.protocol import encode
from udbad.errors import ExitCode
from udbad.mount import kernelside, later
from udbad.mount.held import Held
from udbad.mount.keeper import END_SECONDS, Legacy, be_subreaper, retry_delay
from udbad.mount.life import Guard, Renewal

log = logging.getLogger(__name__)

Place = tuple[str, int]
"""Of a mount that serves: its mount point, as the kernel has it, and its connection."""
_SERVES: Final = "serves"
_LEAVES: Final = "leaves"
_RENEWS: Final = "renews"
_ENDS: Final = "ends"
"""First words of what a mount process says: then come its Place, what it will leave (keeper.Left), or how another
version is started (life.Renewal). The last one: it ends in order, though its keeper may live for what it has open on a
branch that does not answer."""
_MOST: Final = 1 << 16
"""Bytes of what it says."""
_FORWARDED: Final = signal.SIGINT, signal.SIGTERM
_STEP_SECONDS: Final = 0.05
"""Between two looks whether all is prepared, which takes a quarter of a second."""

Serve = Callable[[Guard, Callable[[Place], None]], None]
"""What a mount process does: with its guard, and what is to be called when it serves. Raises as life.run()."""


class State(NamedTuple):
    """What a guardian leaves to that of another version. pid: of the mount process; socket, died: descriptors, by which
    that speaks and its keeper says that it has ended; control: its control socket."""

    job: Mapping[str, Any]
    pid: int
    socket: int
    died: int
    left: Sequence[Sequence[int]]
    place: Sequence[Any]
    control: str

    @classmethod
    def read(cls, fd: int) -> State:
        """From the descriptor that `udbad guard` was given."""
        words = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
        os.close(fd)
        state = cls(**{name: words[name] for name in cls._fields})
        for each in (state.socket, state.died):
            os.set_inheritable(each, False)
        return state


class Guardian:
    """patience: seconds after which a mount that nobody could take over is given up, 0: never."""

    def __init__(
        self,
        serve: Serve,
        on_ready: Callable[[], None],
        patience: float,
        private: Iterable[int],
        job: Mapping[str, Any],
    ) -> None:
        """on_ready: called here, once. private: descriptors that no mount process is to have, until then. job: for
        JSON, what another version needs to make a guardian like this one (State)."""
        self._serve = serve
        self._job = job
        self._on_ready = on_ready
        self._patience = patience
        self._private = tuple(private)
        self._pidfd = -1
        self._serves = False
        self._held = Held()
        self._preparing: Iterator[None] | None = self._held.fill()
        """What is left of it."""
        self._prepare_at = math.inf
        """time.monotonic() when that goes on, once a process serves."""
        self._asked = 0
        """The last signal to be forwarded: also to who follows a process that dies before it has acted on it."""
        self._died = 0.0
        self._place: Place | None = None
        """Once a mount process has served."""
        self._legacy = Legacy()

    def run(self) -> int:
        """The exit code of the mount process that has ended in order, or could not begin."""
        gc.freeze()  # the mount processes share what is there now
        gc.enable()
        for number in _FORWARDED:
            signal.signal(number, self._forward)
        be_subreaper()  # keepers are children of mount processes, and become ours
        return self._guard(*self._attend())

    def go_on(self, state: State) -> int:
        """As `run`, with what the guardian of another version has left, whose process we are."""
        while self._preparing is not None:
            self._prepare()
            time.sleep(_STEP_SECONDS)
        for left in reversed(state.left):
            self._legacy.add((left[0], left[1]))
        self._place, self._private = (state.place[0], state.place[1]), ()
        self._pidfd = os.pidfd_open(state.pid)
        for number in _FORWARDED:
            signal.signal(number, self._forward)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        with socket.socket(socket.AF_UNIX) as asking:
            try:
                asking.connect(state.control)
                asking.sendall(encode({"op": "retire"}))  # it ends, and gives no answer
            except OSError as error:
                log.error("%s: %s", state.control, error.strerror)
            return self._guard(*self._watch(state.pid, socket.socket(fileno=state.socket), state.died, served=True))

    def _guard(self, status: int, served: bool) -> int:
        """While there is something to take over, have it taken over; the exit code for our own end."""
        while self._legacy and served:
            status = self._succeed()
        self._legacy.end()
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        return code

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        if self._serves or self._place is None:  # in between, a process would give up what it takes over
            self._pass_on()

    def _pass_on(self) -> None:
        """What somebody has asked us for, if anything."""
        if self._asked and self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, self._asked)

    def _succeed(self) -> int:
        """Have processes try to take over until one has, and has ended in its turn; the status of the last one."""
        self._died = time.monotonic()
        failed = 0
        while True:
            status, served = self._attend()
            if served:
                return status
            failed += 1
            delay = retry_delay(failed)
            if not self._legacy or delay > self._seconds_left():
                self._give_up()
                return int(ExitCode.FAILURE) << 8
            time.sleep(delay)

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
        return self._watch(pid, ours, died, served=False)

    def _watch(self, pid: int, ours: socket.socket, died: int, served: bool) -> tuple[int, bool]:
        self._serves = served
        if served:
            self._pass_on()
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        for fd in (self._pidfd, died, *(before := self._legacy.pidfds())):
            poll.register(fd, select.POLLIN)
        ended = is_late = in_order = False
        with ours:
            while not ended:
                ready = dict(poll.poll(self._milliseconds(served, is_late)))
                if not ready and served and not is_late:
                    self._prepare()
                elif not ready:
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
                    word = json.loads(ours.recv(_MOST) or b"null")
                    if word is None:
                        poll.unregister(ours)
                    elif word[0] == _SERVES:
                        served = self._serves = True
                        begins, self._place = self._place is None, (word[1], word[2])
                        self._prepare_at = time.monotonic()
                        if begins:
                            self._prepare_at += later.PATIENCE_SECONDS
                            self._private = ()
                            self._on_ready()
                        else:
                            self._pass_on()
                            self._reap_others(pid)
                    elif word[0] == _LEAVES:
                        self._legacy.add((word[1], word[2]))
                    elif word[0] == _RENEWS:
                        self._become(Renewal(*word[1:]), pid, ours.fileno(), died)
                    elif word[0] == _ENDS:
                        in_order = True
        self._serves = False
        pidfd, self._pidfd = self._pidfd, -1
        os.close(pidfd)
        os.close(died)
        status = self._reap(pid, is_late)
        if in_order:
            self._legacy.end()
            return 0 if os.WIFSIGNALED(status) else status, served
        if served and self._legacy:
            log.warning("process %d ended, status %d; another one takes over", pid, os.waitstatus_to_exitcode(status))
        return status, served

    def _become(self, new: Renewal, pid: int, ours: int, died: int) -> None:
        """Execute another version, which goes on from here; returns when that cannot be."""
        assert self._place is not None
        state = State(self._job, pid, ours, died, self._legacy.newest_first(), self._place, new.control)
        fd = os.memfd_create("udbad guardian", os.MFD_CLOEXEC)
        kept = fd, ours, died
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)  # until they can be forwarded again
        try:
            os.write(fd, json.dumps(state._asdict()).encode())
            for each in kept:
                os.set_inheritable(each, True)
            os.execve(new.command[0], [*new.command, "guard", str(fd)], {**os.environ, "PYTHONPATH": new.path})
        except OSError as error:
            log.error("%s: %s", new.command[0], error.strerror)
        for each in kept:
            os.set_inheritable(each, False)
        os.close(fd)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)

    def _milliseconds(self, served: bool, is_late: bool) -> float | None:
        """For a process to begin to serve; of one that has been killed, to end; before we prepare for its end, when it
        serves. None: any number."""
        if is_late:
            return END_SECONDS * 1000
        if served:
            return None if self._preparing is None else max(self._prepare_at - time.monotonic(), 0.0) * 1000
        if self._place is None or not self._patience:
            return None
        return max(self._seconds_left(), 0.0) * 1000

    def _reap(self, pid: int, may_live: bool) -> int:
        """Its status. One that somebody is to take over from may have a thread that ends after that (keeper.py)."""
        ended, status = os.waitpid(pid, os.WNOHANG if self._legacy or may_live else 0)
        return status if ended else signal.SIGKILL

    def _reap_others(self, pid: int) -> None:
        """Children that have ended and are not `pid`: keepers of processes that were killed before anybody knew of
        them, and processes whose last thread has ended at last."""
        options = os.WEXITED | os.WNOHANG
        with suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, options | os.WNOWAIT)) is not None and ended.si_pid != pid:
                os.waitid(os.P_PID, ended.si_pid, options)

    def _prepare(self) -> None:
        """While a process serves: keep what those after it will import. Not at once, as then whoever has wanted the
        mount is busy with it, and a mount that is gone by then needs no next process; but as soon as one has been
        followed by another. In steps: it may be needed meanwhile."""
        assert self._preparing is not None
        try:
            for _ in self._preparing:
                self._prepare_at = time.monotonic() + _STEP_SECONDS
                return
        except OSError as error:
            log.error("the next mount process will take its modules from the disk: %s", error.strerror)
        self._preparing = None
        gc.freeze()

    def _be_mount_process(self, guardian: socket.socket, died: int) -> None:
        for number in _FORWARDED:
            signal.signal(number, signal.default_int_handler)
        for fd in self._private:
            os.close(fd)
        self._held.install()
        os.setpgid(0, 0)  # what Ctrl-C sends comes from the guardian, once

        def say(word: list[Any]) -> None:
            guardian.send(json.dumps(word).encode())

        def tell(word: list[Any]) -> None:
            with suppress(OSError):  # nobody guards it any more, which is no reason not to serve
                say(word)

        def ready(place: Place) -> None:
            tell([_SERVES, *place])

        with guardian:
            guard = Guard(
                told=lambda left: tell([_LEAVES, *left]),
                left=self._legacy.newest_first(),
                died=self._died,
                ended=died,
                renewed=lambda new: say([_RENEWS, *new]),
                over=lambda: tell([_ENDS]),
            )
            self._serve(guard, ready)
        raise SystemExit(0)
