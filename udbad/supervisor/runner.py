"""One mount seen from the supervisor: start it, watch it, start it again, stop it.

A mount whose process died stays on its mount point, dead (ENOTCONN), until the next process replaces it;
nothing here unmounts a mount that is to come back. What ended in order (umount) stays ended until
somebody asks for it. Never touches a mount point, and waits for nothing without a way out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from udbad.control import registry
from udbad.control.asyncclient import ask_async
from udbad.control.protocol import Message
from udbad.errors import ExitCode
from udbad.inodes.record import READ
from udbad.mount import kernelside
from udbad.mount.keeper import Legacy, retry_delay
from udbad.ourselves import COMMAND, environment
from udbad.settings.file import DaemonSettings, MountSettings
from udbad.settings.options import format_options, parse_mount_options
from udbad.supervisor.looking import in_a_thread, missing
from udbad.supervisor.workers import Pool, Worker

log = logging.getLogger(__name__)

CONTROL_SECONDS = 30.0
"""For one answer of a mount process to a request that changes something."""
_LEAST_DELAY = 0.1
"""Between two attempts to start a mount, in seconds."""
_PLACE_SECONDS = 2.0
"""For a mount point to be looked up."""
_LOOK_SECONDS = 2.0
"""For the branches of a mount that could not start to be looked at."""


class State(Enum):
    """What a mount is doing; the value is what users read."""

    STARTING = "starting"
    SERVING = "serving"
    WAITING = "waiting"
    RESTARTING = "restarting"
    FAILED = "failed"
    UNMOUNTED = "unmounted"


@dataclass(slots=True)
class Shared:
    """What all runners have in common. parent_of: the runner whose mount a path is in, if any. changed: called when
    the state of one has."""

    daemon: DaemonSettings
    pool: Pool
    parent_of: Callable[[str], Runner | None]
    changed: Callable[[], None]


def restart_delay(daemon: DaemonSettings, failures: int) -> float:
    """Seconds to wait before another attempt, after so many in a row have failed."""
    return min(daemon.restart_delay * 2.0 ** min(failures - 1, 30), daemon.restart_delay_max)


@dataclass(frozen=True, slots=True)
class _Failure:
    text: str
    code: int


class Runner:
    """Keeps one mount up. A process that was killed is followed by one that goes on where it was, as long as there is
    a legacy; else by one that mounts anew.

    settings: as configured; active: what runs, changes by hand included, and what comes back after a crash.
    pending: keys of the settings that did not get through to what runs. connection, place: of the mount, its
    number and the mount point as the kernel has it, without symbolic links.
    """

    def __init__(self, settings: MountSettings, shared: Shared, transient: bool = False) -> None:
        """transient: asked for by mount(8) and not in the configuration; forgotten once it is unmounted."""
        self.settings = settings
        self.active = settings
        self.pending: set[str] = set()
        self.transient = transient
        self.shared = shared
        self.state = State.STARTING
        self.reason = ""
        self.restarts = 0
        self.since = time.time()
        self.connection = 0
        self.place = ""
        self.control: str | None = None
        self.worker: Worker | None = None
        self.legacy = Legacy()
        """What another process can go on with."""
        self._died = 0.0
        self._awaited = False
        """Whether who uses the mount waits for another process."""
        self._tried = 0
        """How many could not take it over since then."""
        self.up = asyncio.Event()
        self.outcome = asyncio.Event()
        """Set once the first attempt has ended, however it did."""
        self._wake = asyncio.Event()
        self._stopping = False
        self._again = False
        self._resume = False
        self._renewing = False
        """Whether the process was told to make room for another."""
        self._task: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[list[str]] | None = None
        """Of which branches are there."""
        self.log = logging.LoggerAdapter(log, {"mount": self.label})

    @property
    def label(self) -> str:
        return self.settings.name or self.settings.mount_point

    @property
    def finished(self) -> bool:
        """Whether a transient mount has ended for good."""
        return self._task is not None and self._task.done()

    def begin(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"mount {self.label}")

    def adopt(self, worker: Worker, entry: registry.Entry, active: MountSettings) -> None:
        """Take over a process that serves already; before `begin`."""
        self.worker, self.active = worker, active
        self.connection, self.place, self.control = entry.connection, entry.mount_point, entry.control
        self._set(State.SERVING, "")
        self.since = entry.started
        self.up.set()
        self.outcome.set()

    def inherit(self, entry: registry.Entry, active: MountSettings) -> None:
        """Go on with a mount whose process has ended while nobody was there to see it; before `begin`."""
        self.active = active
        self.connection, self.place, self.control = entry.connection, entry.mount_point, entry.control
        self._resume = self._awaited = True
        self._died = time.monotonic()
        self._set(State.RESTARTING, f"process {entry.pid} ended")
        self.restarts += 1

    def _set(self, state: State, reason: str) -> None:
        if (state, reason) != (self.state, self.reason):
            self.since = time.time()
        self.state, self.reason = state, reason
        self.shared.changed()

    # -- the life of a mount ----------------------------------------------------------------------

    async def _run(self) -> None:
        failures = 0
        while not self._stopping:
            if self.state in (State.FAILED, State.UNMOUNTED):
                if self.transient:
                    return
                await self._pause(None)
                if not self._is_stopping():
                    self._set(State.STARTING, "")
                continue
            if self.worker is None:
                failure = await self._start()
                self.outcome.set()
                if failure is not None:
                    failures += 1
                    await self._after_failure(failure, failures)
                    continue
            begun = time.monotonic()
            worker = self.worker
            assert worker is not None
            await self._attend(worker)
            self._died = time.monotonic()
            self.refresh(worker.pid)
            self.worker = None
            self.up.clear()
            if self._is_stopping():
                return
            if self._again:
                self._again = self._resume = False
                self.legacy.end()
                failures = 0
                self._set(State.STARTING, "")
            elif not self._is_mounted():
                self.log.info("%s: unmounted", self.label)
                self._resume = False
                self.legacy.end()
                self._set(State.UNMOUNTED, "somebody unmounted it")
            else:
                self.restarts += 1
                self._resume = True
                self._awaited, self._tried = bool(self.legacy), 0
                failures = 0 if time.monotonic() - begun >= self.shared.daemon.healthy_after else failures + 1
                text = f"process {worker.pid} ended"
                if not self._renewing:
                    self.log.warning("%s: %s; starting another", self.label, text)
                self._renewing = False
                self._set(State.RESTARTING, text)
                if failures > 1 and not self.legacy:
                    await self._pause(restart_delay(self.shared.daemon, failures - 1))

    def _is_mounted(self) -> bool:
        """Whether our mount is there, served or dead."""
        return kernelside.is_mounted(self.place, self.connection)

    def _is_stopping(self) -> bool:
        """`_stopping`, which changes while one waits."""
        return self._stopping

    async def _pause(self, seconds: float | None) -> None:
        """Wait, but not longer than until somebody wants something."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return
        finally:
            self._wake.clear()

    async def _start(self) -> _Failure | None:
        """One attempt; None when the mount serves."""
        parent = self.shared.parent_of(self.settings.mount_point)
        while parent is not None and not parent.up.is_set() and not self._stopping:
            self._set(State.WAITING, f"for {parent.label}, which it lies in")
            waiting = asyncio.create_task(parent.up.wait())
            wake = asyncio.create_task(self._wake.wait())
            await asyncio.wait({waiting, wake}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            wake.cancel()
            self._wake.clear()
        if self._stopping:
            return _Failure("stopped", 0)
        if self.state is not State.RESTARTING:
            self._set(State.STARTING, "")
        settings = self.active if self._resume else self.settings
        before = kernelside.unions()
        try:
            worker = await self.shared.pool.take()
        except OSError as error:
            return _Failure(f"cannot start a process: {error.strerror}", 1)
        self.worker = worker
        gave_up = False
        seconds = self._start_seconds()
        try:
            async with asyncio.timeout(seconds):
                answer = await worker.give(self._job(settings), self.legacy.add)
                gave_up = answer is not None  # and has taken back what it had done
        except TimeoutError:
            answer = {"error": f"not ready after {seconds:.3g} s", "code": 1}
        if answer is not None and answer.get("ready"):
            self.connection, self.place = answer["connection"], answer["mount_point"]
            self.control, self.active = answer["control"], settings
            self._awaited = False
            if not self._resume:
                self.pending.clear()
            self._set(State.SERVING, "")
            self.up.set()
            self.log.info("%s: serving on %s, process %d", self.label, settings.mount_point, worker.pid)
            return None
        await self._end(worker)
        self.worker = None
        if not gave_up:
            await self._know_what_is_left(before)
        if answer is None:
            return _Failure(f"process {worker.pid} ended before it was ready", 1)
        return _Failure(str(answer.get("error")), int(answer.get("code", 1)))

    def _start_seconds(self) -> float:
        """How long a process may take until it serves; less for one that others wait for."""
        patience = self.active.options.restart_timeout
        longest = self.shared.daemon.start_timeout
        if not patience or not self.legacy:
            return longest
        return min(longest, max(patience - (time.monotonic() - self._died), _LEAST_DELAY))

    async def _know_what_is_left(self, before: set[tuple[str, int]]) -> None:
        """A process that ended between its mount and its word has left a dead mount. The next one replaces it; without
        a next one, `stop` has to know of it. before: the unions of before that process."""
        served = {(entry.mount_point, entry.connection) for entry in self._others()}
        appeared = kernelside.unions() - before - served
        if not appeared:
            return
        mount_point = os.fsencode(self.settings.mount_point)
        try:
            async with asyncio.timeout(_PLACE_SECONDS):
                place = os.fsdecode(await in_a_thread(lambda: registry.real_mount_point(mount_point)))
        except TimeoutError:
            return
        for there, connection in appeared:
            if there == place:
                self.place, self.connection = there, connection

    def _others(self) -> list[registry.Entry]:
        """Mounts that somebody serves. Nobody has to take those away."""
        return [entry for entry in registry.entries(self.shared.daemon.run_dir) if registry.is_alive(entry)]

    async def _end(self, worker: Worker) -> None:
        """The end of a process whose start has failed, which it comes to by itself; one that hangs is killed.

        One that cannot be killed waits for a branch, and has no part in the mount when it wakes up.
        """
        if await worker.ends() or await self.shared.pool.kill(worker):
            return
        self.log.error("%s: process %d cannot be killed", self.label, worker.pid)
        worker.forget()

    def _job(self, settings: MountSettings) -> dict[str, Any]:
        daemon = self.shared.daemon
        return {
            "name": settings.name,
            "label": self.label,
            "mount_point": settings.mount_point,
            "options": format_options(settings.options),
            "configured": format_options(self.settings.options),
            "run_dir": daemon.run_dir,
            "log_level": daemon.log_level,
            "log_format": daemon.log_format,
            "left": self.legacy.newest_first() if self._resume else [],
            "died": self._died,
        }

    async def _after_failure(self, failure: _Failure, failures: int) -> None:
        if self._stopping:
            return
        said = self.reason
        if self._awaited:
            await self._after_failed_takeover(failure)
            return
        if failure.code == ExitCode.BRANCH and self.settings.missing_branch == "fail":
            self._set(State.FAILED, failure.text)
            self.log.error("%s: %s", self.label, failure.text)
            return
        paths = [os.fsdecode(spec.path) for spec in self.settings.options.branches]
        missing = await self._missing(paths) if failure.code == ExitCode.BRANCH else []
        if missing:
            self._set(State.WAITING, failure.text)
            self.log.warning("%s: %s; waiting for it", self.label, failure.text)
            wanted = self.settings
            while missing and not self._stopping and self.settings is wanted:
                await self._pause(self.shared.daemon.retry_missing)
                missing = await self._missing(paths)
            return
        self._set(State.RESTARTING, failure.text)
        delay = restart_delay(self.shared.daemon, failures)
        if failure.text != said:
            self.log.error("%s: %s; trying again", self.label, failure.text)
        await self._pause(max(delay, _LEAST_DELAY))

    async def _missing(self, paths: list[str]) -> list[str]:
        """Which of these directories are not there, or do not answer. One that hangs is asked once, however often."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(missing(paths), name=f"branches of {self.label}")
        done, _ = await asyncio.wait({self._looking}, timeout=_LOOK_SECONDS)
        return self._looking.result() if done else paths

    async def _after_failed_takeover(self, failure: _Failure) -> None:
        """Try again for as long as its users may wait; then they get errors, and it is mounted anew."""
        patience = self.active.options.restart_timeout
        left = patience - (time.monotonic() - self._died) if patience else float("inf")
        self._tried += 1
        delay = retry_delay(self._tried)
        self._set(State.RESTARTING, failure.text)
        self.log.error("%s: nobody could take it over: %s", self.label, failure.text)
        if self.legacy and delay < left:
            if delay:
                await self._pause(delay)
            return
        self.log.error("%s: given up; its users get errors", self.label)
        self._awaited = False
        self.legacy.end()
        problem = kernelside.abort(self.place, self.connection)
        if problem is not None:
            self.log.debug("%s: %s", self.label, problem)

    # -- watching ---------------------------------------------------------------------------------

    async def _attend(self, worker: Worker) -> None:
        """Return when the process has ended; end it when it shows no sign of life."""
        ended = asyncio.create_task(worker.ended())
        complained = False
        try:
            while True:
                await asyncio.wait({ended}, timeout=self.shared.daemon.heartbeat)
                if ended.done():
                    return
                if self.control is None:
                    continue
                beat = asyncio.create_task(
                    ask_async(self.control, {"op": "ping"}, timeout=self.shared.daemon.wedged_after)
                )
                await asyncio.wait({ended, beat}, return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    beat.cancel()
                    return
                try:
                    beat.result()
                    complained = False
                except TimeoutError:
                    await self._end_wedged(worker)
                    return
                except OSError as error:
                    if not complained and not self._stopping:
                        self.log.warning("%s: control socket: %s", self.label, error)
                    complained = True
        finally:
            ended.cancel()

    async def _end_wedged(self, worker: Worker) -> None:
        """End a process that shows no sign of life: alone, if another can go on and it lets itself be killed."""
        what = f"no sign of life for {self.shared.daemon.wedged_after:g} s"
        if self.legacy:
            self.log.error("%s: %s; killed", self.label, what)
            if await self.shared.pool.kill(worker):
                return
            what = f"process {worker.pid} cannot be killed"
        self.log.error("%s: %s; aborted", self.label, what)
        await self._abort(worker)

    async def _abort(self, worker: Worker) -> None:
        """End a process that may be stuck in its own mount: the connection first, which frees it."""
        self.legacy.end()
        problem = kernelside.abort(self.place, self.connection)
        if problem is not None:
            self.log.error("%s: %s", self.label, problem)
        await self.shared.pool.kill(worker)
        await worker.ended()

    # -- what others want -------------------------------------------------------------------------

    async def request(self, request: Message, timeout: float = CONTROL_SECONDS) -> Message:
        """Ask the mount process; a refusal is an answer. Raises OSError."""
        if self.control is None or self.worker is None:
            raise ConnectionError(f"{self.label} is {self.state.value}")
        return await ask_async(self.control, request, timeout)

    def refresh(self, pid: int) -> None:
        """Learn what the process `pid` has been changed to by hand."""
        entry = registry.read(os.path.dirname(self.control)) if self.control is not None else None
        if entry is not None and entry.pid == pid:
            self.active = replace(self.active, options=parse_mount_options(entry.options))

    def follow(self, settings: MountSettings) -> None:
        """New settings for the next start; what is being waited for is tried at once."""
        self.settings = settings
        if self.state is not State.SERVING:
            self._resume = self._resume and bool(self.legacy)  # who uses it waits for what it was
            self._wake.set()

    def retry(self) -> None:
        """Do now what is being waited for; brings up what has failed or was unmounted."""
        self._wake.set()

    async def restart(self, force: bool) -> str | None:
        """Have another process go on with the mount, which nobody notices; why not, if so.

        Where that cannot be, or settings wait for the next mount: unmount and mount again, with the settings wanted.
        force: so in any case; users get errors, and a process that gives no answer is ended.
        """
        worker = self.worker
        if worker is None or self.state is not State.SERVING:
            self.retry()
            return None
        if self.legacy and not force and not self.pending:
            return await self.renew(worker)
        self._again = True
        answer = await self._ask_to_stop(force)
        if answer is not None and force and worker.alive:
            self.log.error("%s: did not stop: %s; aborted", self.label, answer)
            await self._abort(worker)
            return None
        if answer is not None:
            self._again = False
        return answer

    async def renew(self, worker: Worker) -> str | None:
        """Have a process of this version go on with the mount; why not, if so, and then the one that serves goes on."""
        problem = await self._ask_for_state() or await self._look()
        if problem is not None:
            return f"{problem}; with --force it is unmounted and mounted again"
        self.log.info("%s: process %d makes room for another", self.label, worker.pid)
        self.up.clear()
        self._renewing = True
        try:
            # It ends between two operations, and gives no answer.
            await self.request({"op": "retire"}, self.shared.daemon.stop_timeout)
        except OSError:
            pass
        try:
            async with asyncio.timeout(self.shared.daemon.start_timeout):
                await self.up.wait()
        except TimeoutError:
            return self.reason or "it does not serve yet"
        return None

    async def _ask_for_state(self) -> str | None:
        """Have the process that serves write what it knows in a version that is read here; why it cannot."""
        try:
            answer = await self.request({"op": "write-state", "reads": sorted(READ)}, self.shared.daemon.stop_timeout)
        except OSError as error:
            return str(error) or "no answer"
        return None if answer["ok"] else str(answer["error"])

    async def _look(self) -> str | None:
        """Why a process of this version could not go on with the mount."""
        try:
            process = await self.shared.pool.take()
        except OSError as error:
            return f"cannot start a process: {error.strerror}"
        try:
            async with asyncio.timeout(self.shared.daemon.stop_timeout):
                answer = await process.give(
                    {**self._job(self.active), "left": self.legacy.newest_first(), "look": True}
                )
        except TimeoutError:
            answer = None
        await self._end(process)
        if answer is None:
            return "the new process gave no answer"
        return None if answer.get("ready") else str(answer.get("error"))

    async def _ask_to_stop(self, force: bool) -> str | None:
        try:
            patience = min(CONTROL_SECONDS, self.shared.daemon.stop_timeout) if force else CONTROL_SECONDS
            answer = await self.request({"op": "stop", "force": force}, patience)
        except OSError as error:
            worker = self.worker
            if worker is not None and isinstance(error, ConnectionError):
                # It hung up: most likely it ends, and is only not gone yet.
                try:
                    async with asyncio.timeout(self.shared.daemon.stop_timeout):
                        await worker.ended()
                except TimeoutError:
                    return str(error)
            if worker is None or not worker.alive:
                return None  # it ended before it could answer
            return str(error) or "no answer"
        return None if answer["ok"] else str(answer["error"])

    async def remove(self) -> str | None:
        """Unmount for good if nobody uses it; why not, if so."""
        if self.worker is not None and self.state is State.SERVING:
            problem = await self._ask_to_stop(False)
            if problem is not None:
                return problem
        await self.stop()
        return None

    async def stop(self) -> None:
        """Unmount, users or not, and end."""
        self._stopping = True
        self._wake.set()
        worker = self.worker
        if worker is not None:
            worker.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(self.shared.daemon.stop_timeout):
                    await worker.ended()
            except TimeoutError:
                self.log.error("%s: did not stop in %g s; aborted", self.label, self.shared.daemon.stop_timeout)
                await self._abort(worker)
        if self._task is not None:
            await self._task
        self.legacy.end()
        if self.connection and self._is_mounted():
            await self._detach_dead()
        self._set(State.UNMOUNTED, "stopped")
        self.up.clear()

    async def _detach_dead(self) -> None:
        """Take away what a killed process left; by a process of its own, since this one touches no mount point."""
        command = [*COMMAND, "umount", "--lazy", self.place]
        process = await asyncio.create_subprocess_exec(*command, cwd="/", env=environment(), start_new_session=True)
        try:
            async with asyncio.timeout(self.shared.daemon.stop_timeout):
                await process.wait()
        except TimeoutError:
            process.kill()

    def leave(self) -> None:
        """Stop watching; the mount goes on."""
        if self._task is not None:
            self._task.cancel()
        self.legacy.forget()
        if self.worker is not None:
            self.worker.forget()
