"""The processes that have mounts hear what other hosts change (`udbad.hosts`): one for each mount that says so.

They are told which and kept running, no more: what becomes of them, the mount is right (coherence/leases.py). Each
has the job as its first line of standard input, and ends when that is closed, so with us, too. asyncio.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping
from typing import Any, Final

from udbad.ourselves import COMMAND, environment
from udbad.settings.file import DaemonSettings
from udbad.supervisor.runner import restart_delay

log = logging.getLogger(__name__)

_END_SECONDS: Final = 5.0
"""For a process to give its leases back; the mount or the branch may hang."""

Job = Mapping[str, Any]
"""What the command `subscriber` reads, as JSON."""


class Subscriptions:
    """By mount. Which there are, `follow` says; it is the caller's to call it whenever that may have changed."""

    def __init__(self) -> None:
        self._running: dict[str, _Subscription] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def follow(self, jobs: Mapping[str, Job], daemon: DaemonSettings) -> None:
        """Have one process for each job, by mount, and no other. One whose job has changed is followed by another."""
        for mount, running in list(self._running.items()):
            if running.job != jobs.get(mount):
                del self._running[mount]
                ending = asyncio.create_task(running.end())
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)
        for mount, job in jobs.items():
            if mount not in self._running:
                self._running[mount] = _Subscription(mount, job, daemon)

    async def close(self) -> None:
        """End all."""
        await asyncio.gather(*(one.end() for one in self._running.values()), *self._ending)
        self._running.clear()


class _Subscription:
    """One process, and the next one when it has ended."""

    def __init__(self, mount: str, job: Job, daemon: DaemonSettings) -> None:
        self.job = job
        self._daemon = daemon
        self._log = logging.LoggerAdapter(log, {"mount": mount})
        self._mount = mount
        self._task = asyncio.create_task(self._run(), name=f"subscriber of {mount}")

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        failures = 0
        while True:
            begun = time.monotonic()
            try:
                reason = await self._serve()
            except OSError as error:
                reason = f"cannot be started: {error.strerror}"
            failures = 1 if time.monotonic() - begun >= self._daemon.healthy_after else failures + 1
            self._log.warning("%s: the process that hears of other hosts %s", self._mount, reason)
            await asyncio.sleep(restart_delay(self._daemon, failures))

    async def _serve(self) -> str:
        """What became of one process. Raises OSError."""
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "subscriber", stdin=PIPE, stdout=DEVNULL, cwd="/", env=environment(), start_new_session=True
        )
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(self.job).encode() + b"\n")
            return f"has ended with {await process.wait()}"
        finally:
            await self._stop(process)

    async def _stop(self, process: Process) -> None:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()  # its leases end by themselves
