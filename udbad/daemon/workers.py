"""Mount processes seen from the supervisor: started, kept ready, adopted, watched through pidfds.

A mount process is in a session of its own and outlives the supervisor; one found by its registration is
watched like one started here. Only signals and pipes, no mount point. asyncio.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-m", "udbad")


def environment() -> dict[str, str]:
    """For our own commands, which run in / and must be of this version, installed or not."""
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


class Worker:
    """One mount process. popen: None for an adopted one, whose exit code nobody can know."""

    def __init__(self, pid: int, popen: subprocess.Popen[bytes] | None = None) -> None:
        """Raises ProcessLookupError when there is no such process."""
        self.pid = pid
        self._popen = popen
        self._pidfd = os.pidfd_open(pid)
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)
        self.code: int | None = None

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        if self._popen is not None:
            self.code = self._popen.wait()  # has ended: returns at once
            self._close_pipes()
        if not self._ended.done():
            self._ended.set_result(None)

    def _close_pipes(self) -> None:
        assert self._popen is not None
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass

    @property
    def alive(self) -> bool:
        return self._pidfd >= 0

    async def ended(self) -> None:
        """Return when the process has ended."""
        await asyncio.shield(self._ended)

    def describe_end(self) -> str:
        if self.code is None:
            return "ended"
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"ended with code {self.code}"

    def send_signal(self, number: signal.Signals) -> None:
        """Harmless when it has ended: the pidfd cannot mean another process."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                return

    def give(self, job: dict[str, Any]) -> None:
        """Hand over the job. A process that has died shows in `answer`."""
        assert self._popen is not None
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(json.dumps(job).encode() + b"\n")
            self._popen.stdin.close()
        except BrokenPipeError:
            return

    async def answer(self) -> dict[str, Any] | None:
        """The one line a mount process says: that it serves, or why not; None when it died without a word."""
        assert self._popen is not None
        assert self._popen.stdout is not None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        # A descriptor of its own: the transport closes it.
        pipe = os.fdopen(os.dup(self._popen.stdout.fileno()), "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader, loop=loop), pipe)
        try:
            line = await reader.readline()
        finally:
            transport.close()
        try:
            answer = json.loads(line)
        except ValueError:
            return None
        return answer if isinstance(answer, dict) else None

    def forget(self) -> None:
        """Stop watching a process that goes on without us."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._popen is not None:
            self._close_pipes()
            if self._popen.returncode is None:
                self._popen.returncode = 0  # not our child to wait for any more: init's, when we end


class Pool:
    """Starts mount processes, one ahead of time."""

    def __init__(self, keep_spare: bool) -> None:
        self.keep_spare = keep_spare
        self._spare: Worker | None = None

    def _start(self) -> Worker:
        popen = subprocess.Popen(
            [*COMMAND, "mount-worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env=environment(),
            start_new_session=True,  # neither Ctrl-C nor the end of the supervisor's terminal is for a mount
        )
        return Worker(popen.pid, popen)

    def take(self) -> Worker:
        """A process that waits for its job. Raises OSError when none can be started."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.alive:
            return spare
        return self._start()

    def prepare(self) -> None:
        """Have a process ready; called when there is time for it. Raises OSError."""
        if self.keep_spare and (self._spare is None or not self._spare.alive):
            self._spare = self._start()

    async def close(self) -> None:
        """End the one that waits."""
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.send_signal(signal.SIGKILL)
            await spare.ended()
