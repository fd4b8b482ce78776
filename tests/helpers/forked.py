"""Mount processes for tests, forked from one that has imported everything, as those of `udbad run` are.

Starting Python and importing udbad costs a second of processor time, forking some milliseconds, and the tests mount
more than a thousand times. The fork server (python -m tests.helpers.forked) gets its orders over a SOCK_SEQPACKET
socket on stdin and ends with it. What it forks becomes a child of the process that asked: it is forked twice, and
the asking process is the "subreaper" of its descendants meanwhile, prctl(2).
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Final

_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
_PR_SET_DUMPABLE: Final = 4
_DEADLINE: Final = 60.0
"""Seconds for an answer of the fork server: it may still be importing, on a machine that is busy."""


class Process:
    """A child of this process; the part of subprocess.Popen that tests use.

    returncode: as Popen has it, negative for a signal; None while nobody has seen the end.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self.poll() is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                ended, _, _ = select.select([pidfd], [], [], timeout)
            finally:
                os.close(pidfd)
            if not ended:
                raise subprocess.TimeoutExpired([f"process {self.pid}"], timeout)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class _ForkServer:
    """This process's end of its fork server."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_DEADLINE)
        repository = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        with other:
            self._process = subprocess.Popen(
                # Raw descriptors aside, what a mount process forgets to close shows up in its log.
                [sys.executable, "-W", "default::ResourceWarning", "-m", "tests.helpers.forked"],
                stdin=other.fileno(),
                cwd=repository,
                start_new_session=True,  # Ctrl-C is for the tests; this one ends with them
            )
        atexit.register(self.close)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(_DEADLINE)

    def start(self, words: Sequence[str], output: int, ready: int, user: int) -> Process:
        """`udbad WORDS`, which writes to the descriptors `output` and `ready`; READY among the words stands for it."""
        job = {"words": words, "environment": dict(os.environ), "user": user}
        order = os.memfd_create("order")
        libc = ctypes.CDLL(None)
        try:
            os.write(order, json.dumps(job).encode())
            libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            socket.send_fds(self._socket, [b"start"], [order, output, ready])
            return Process(int(self._socket.recv(64)))
        finally:
            libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
            os.close(order)


READY: Final = "{ready}"
_server: _ForkServer | None = None


def prepare() -> None:
    """Start the fork server of this process unless it runs: before a test counts its descriptors."""
    global _server
    if _server is None:
        _server = _ForkServer()


def start(words: Sequence[str], output: int, ready: int, user: int = 0) -> Process:
    """`udbad WORDS` as a child of this process, with its environment, in `/`.

    output: descriptor for stdout and stderr. ready: a descriptor that it inherits; READY in the words is its number.
    user: uid and gid of the process; what it may not read, as the interpreter perhaps, it has in memory.
    """
    prepare()
    assert _server is not None
    return _server.start(words, output, ready, user)


# -- the fork server --------------------------------------------------------------------------


def _forked(supervisor: socket.socket) -> list[int] | None:
    """Fork for each order; in the new process its descriptors are returned, and None at the end in the server."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(supervisor, 16, 3)
        if not request:
            return None
        reader, writer = os.pipe()
        middle = os.fork()
        if middle == 0:
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                os.close(writer)
                supervisor.close()
                return descriptors
            os.write(writer, str(pid).encode())
            os._exit(0)
        os.close(writer)
        # The one in the middle has ended: its child has the parent that it shall have.
        os.waitpid(middle, 0)
        for fd in descriptors:
            os.close(fd)
        supervisor.send(os.read(reader, 64))
        os.close(reader)


def _become(order: int, output: int, ready: int) -> None:
    """What exec would bring along, and the words of the command in sys.argv."""
    job: dict[str, Any] = json.loads(os.pread(order, os.fstat(order).st_size, 0))
    os.close(order)
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, number in ((null, 0), (output, 1), (output, 2)):
        os.dup2(fd, number)
    os.close(null)
    os.close(output)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir("/")
    become(job["user"])
    sys.argv = ["udbad", *(word.replace(READY, str(ready)) for word in job["words"])]


def become(user: int) -> None:
    """Be an ordinary user, as by exec: such a process may look at itself in /proc (proc(5), /proc/PID)."""
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def main() -> None:
    from udbad.cli import main as udbad
    from udbad.mount import later, worker  # noqa: F401 - what `udbad mount` imports later

    # What is imported later would not be found by a user whom the interpreter's directory is closed to.
    importlib.import_module("difflib")  # click, at short options
    later.load()
    gc.collect()
    gc.freeze()
    descriptors = _forked(socket.socket(fileno=os.dup(0)))
    if descriptors is not None:
        _become(*descriptors)
        udbad()


if __name__ == "__main__":
    main()
