"""udbad for tests, forked from a process that has imported everything, as the mount processes of `udbad run` are.

Starting Python and importing udbad costs up to a second of processor time, forking some milliseconds, and the tests
mount and give commands some thousand times. The fork server (python -m tests.helpers.forked) gets its orders over a
SOCK_SEQPACKET socket on stdin and ends with it. What it forks becomes a child of the process that asked: it is forked
twice, and the asking process is the "subreaper" of its descendants meanwhile, prctl(2).
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
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

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self.poll() is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                ended, _, _ = select.select([pidfd], [], [], timeout)
            finally:
                os.close(pidfd)
            if not ended:
                raise subprocess.TimeoutExpired([f"process {self.pid}"], timeout or 0.0)
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

    def start(self, job: Mapping[str, Any], descriptors: Sequence[int]) -> Process:
        """A new process; see `_become` for its job and its descriptors."""
        order = os.memfd_create("order")
        libc = ctypes.CDLL(None)
        try:
            os.write(order, json.dumps(job).encode())
            libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            socket.send_fds(self._socket, [b"start"], [order, *descriptors])
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


def start(
    words: Sequence[str],
    output: int,
    *,
    stdin: int = -1,
    errors: int = -1,
    ready: int = -1,
    user: int = 0,
    environment: Mapping[str, str] | None = None,
    patch: str = "",
) -> Process:
    """`udbad WORDS` as a child of this process, in `/`.

    output: descriptor for stdout. stdin: -1 for /dev/null. errors: descriptor for stderr, -1 for that of stdout.
    ready: a descriptor that it inherits; READY in the words is its number. user: uid and gid of the process; what it
    may not read, as the interpreter perhaps, it has in memory. environment: None for the one of this process.
    patch: Python that the process runs before.
    """
    prepare()
    assert _server is not None
    job = {
        "words": words,
        "environment": dict(os.environ if environment is None else environment),
        "user": user,
        "patch": patch,
    }
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        descriptors = [null if stdin < 0 else stdin, output, output if errors < 0 else errors]
        return _server.start(job, descriptors if ready < 0 else [*descriptors, ready])
    finally:
        os.close(null)


def run(
    words: Sequence[str], environment: Mapping[str, str], timeout: float, patch: str = ""
) -> subprocess.CompletedProcess[str]:
    """`udbad WORDS` to its end, as subprocess.run with an empty stdin and its output captured; TimeoutExpired, too."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:  # a mount may keep a pipe open
        process = start(words, out.fileno(), errors=errors.fileno(), environment=environment, patch=patch)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout)
            raise
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(list(words), code, out.read(), errors.read())


# -- the fork server --------------------------------------------------------------------------


def _forked(supervisor: socket.socket) -> list[int] | None:
    """Fork for each order; in the new process its descriptors are returned, and None at the end in the server."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(supervisor, 16, 5)
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


def _become(order: int, stdin: int, output: int, errors: int, ready: int = -1) -> None:
    """What exec would bring along, and the words of the command in sys.argv."""
    job: dict[str, Any] = json.loads(os.pread(order, os.fstat(order).st_size, 0))
    os.close(order)
    for number, fd in enumerate((stdin, output, errors)):
        os.dup2(fd, number)
    for fd in (stdin, output, errors):
        os.close(fd)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir("/")
    become(job["user"])
    exec(job["patch"], {})
    sys.argv = ["udbad", *(word.replace(READY, str(ready)) for word in job["words"])]
    if job["words"][0] == "run":
        _keep_a_mount_server()


def _keep_a_mount_server() -> None:
    """Have a child that becomes what this supervisor forks mount processes from, the first one, in place of exec."""
    workers: Any = importlib.import_module("udbad.supervisor.workers")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        words = _until_wanted(theirs)
        if words is None:
            os._exit(0)
        sys.argv = ["udbad", *words]
        return
    theirs.close()
    fd = ours.detach()  # until the end of the process, if no mount is ever made

    def popen(command: Sequence[str], *, stdin: int, env: Mapping[str, str], **others: Any) -> Process:
        workers.subprocess = subprocess
        with socket.socket(fileno=fd) as ours:
            job = {"words": command[command.index("udbad") + 1 :], "environment": dict(env)}
            socket.send_fds(ours, [json.dumps(job).encode()], [stdin])
        return Process(pid)

    # Its module's name alone: asyncio uses subprocess, too.
    workers.subprocess = types.SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL)


def _until_wanted(supervisor: socket.socket) -> list[str] | None:
    """Wait, and become what `popen` is asked for but for the words of the command; None: it has not been."""
    with supervisor:
        request, descriptors, _, _ = socket.recv_fds(supervisor, 1 << 18, 1)
    if not request:
        return None
    job = json.loads(request)
    warnings.simplefilter("ignore", ResourceWarning)  # as by exec: it leaves its socket to its end
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    for fd, number in ((descriptors[0], 0), (null, 1)):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(job["environment"])
    words: list[str] = job["words"]
    return words


def become(user: int) -> None:
    """Be an ordinary user, as by exec: such a process may look at itself in /proc (proc(5), /proc/PID)."""
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


class _End:
    """The end of what was forked, after its threads and every other function of atexit.

    To free the modules one by one would copy every page that the fork shares, half of what a process costs.
    What is unreachable is found all the same, and so reported. Programs that start (`EXECUTED` of mount.py) end
    as programs of users do.
    """

    def __init__(self) -> None:
        self.code: int | None = None  # until the command has ended orderly
        atexit.register(self._leave)  # the first one that is registered is the last one that is called

    def run(self, command: Callable[[], object]) -> None:
        try:
            command()
            self.code = 0
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                self.code = end.code or 0
            raise

    def _leave(self) -> None:
        if self.code is None:
            return
        gc.collect()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.code)


def main() -> None:
    end = _End()
    import udbad
    from udbad import compiled
    from udbad.cli import main as command_line

    # What is imported later would not be found by a user whom the interpreter's directory is closed to.
    importlib.import_module("difflib")  # click, at short options
    # IN_C is there only when it is compiled, and imported by the modules that use it then.
    for module in pkgutil.walk_packages(udbad.__path__, "udbad."):
        if not module.name.endswith(".__main__") and module.name not in compiled.IN_C:
            importlib.import_module(module.name)
    for name in ("console", "live", "progress", "table"):  # which commands import when they have something to show
        importlib.import_module(f"rich.{name}")
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=os.dup(0)) as supervisor:
        descriptors = _forked(supervisor)
    if descriptors is not None:
        _become(*descriptors)
        end.run(command_line)


if __name__ == "__main__":
    main()
