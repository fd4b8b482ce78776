"""Real mounts for tests: a `udbad mount` process, its log, its control socket, and a certain end.

Whatever a test does, nothing is left: leaving the context unmounts and checks the end, and when that
fails the FUSE connection is aborted and the mount taken away. A small watchdog process does the same
when a mount outlives its time or the test process dies; it is a process, not a thread, because a
page fault on a wedged mount stops the interpreter with its lock held. The mount point is never
stat'ed: what is to be known about the mount is read from mountinfo.
"""

from __future__ import annotations

import functools
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from tests.helpers import forked
from tests.helpers.leaks import (
    FS_TYPE,
    FUSECTL,
    MountInfo,
    abort_connection,
    describe_process,
    holders,
    read_mountinfo,
    remove_mount,
)

REPOSITORY: Final = Path(__file__).resolve().parents[2]
EXECUTED = False
"""Whether mount processes are programs that start, as for users; else they are forked, see tests/helpers/forked.py."""
PATCH = ""
"""Python that mount processes run before they mount; see the fixture `patch_daemon`."""
DEADLINE: Final = 20.0
"""Seconds to begin or end serving, and for one answer on the control socket."""
WATCHDOG: Final = float(os.environ.get("UDBAD_TEST_WATCHDOG", "300"))
"""Seconds a mount may last unless the test says otherwise; more where all is slow, as in a machine that is emulated."""

IO: Final = os.environ.get("UDBAD_TEST_IO", "requests")
"""`io=` of every mount that does not ask for one itself, to run any test in another io mode. Not the default, which
depends on the branches."""

_BAD_LOG: Final = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|Traceback|Exception ignored|\w+Warning: ")
_CAP_SYS_ADMIN: Final = 21  # linux/capability.h

_WATCHDOG_SCRIPT: Final = """
read -r -t "$1" word && [ "$word" = done ] && exit 0
echo 1 >"$2"
umount -i -c -l -- "$3"
exit 1
"""


Process = subprocess.Popen[bytes] | forked.Process


class MountFailed(Exception):
    """The daemon ended or said nothing in time before it served; the text is its log. code: its exit code, if any."""

    def __init__(self, message: str, code: int | None) -> None:
        super().__init__(message)
        self.code = code


class UnionFactory(Protocol):
    """What the fixture `union` gives: mount `layers` (name → permission, top first), made under tmp_path.

    A layer directory that is there already is taken as it is, so a test can fill it first.
    The mount point is tmp_path/mount_point. allow_log: regular expression for lines of the daemon's
    log that may be warnings or errors. watchdog: seconds after which the connection is aborted.
    """

    def __call__(
        self,
        layers: Mapping[str, str] | None = None,
        udba: str = "reval",
        options: str = "",
        *,
        mount_point: str = "mnt",
        allow_log: str | None = None,
        watchdog: float = WATCHDOG,
    ) -> Mount: ...


@functools.cache
def why_no_fuse() -> str | None:
    """Why this process cannot mount, in words; None when it can."""
    if os.geteuid() != 0:
        return "not root"
    effective = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    if effective is None or not int(effective[1], 16) >> _CAP_SYS_ADMIN & 1:
        return "root without CAP_SYS_ADMIN"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return None


def ensure_fusectl() -> None:
    """Mount fusectl where init systems mount it; it stays, as part of the system."""
    if not any(mount.fs_type == "fusectl" for mount in read_mountinfo()):
        subprocess.run(["mount", "-t", "fusectl", "none", str(FUSECTL)], check=True, timeout=DEADLINE)


class _Watchdog:
    """Aborts a connection and unmounts when the time is over, or when this process is gone (end of file)."""

    def __init__(self, mount: MountInfo, seconds: float) -> None:
        abort = FUSECTL / str(mount.minor) / "abort"
        self._process = subprocess.Popen(
            ["bash", "-c", _WATCHDOG_SCRIPT, "watchdog", str(seconds), str(abort), str(mount.path)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the tests; what they leave is this process's work
        )

    def release(self) -> bool:
        """Stop watching; True when the watchdog had not acted."""
        try:
            self._process.communicate(b"done\n", timeout=DEADLINE)
        except BrokenPipeError:
            self._process.wait(DEADLINE)
        return self._process.returncode == 0


def _start(words: Sequence[str], log: int, ready: int, user: int) -> Process:
    """`udbad mount -f WORDS`."""
    if not EXECUTED:
        command = ["mount", "-f", "--ready-fd", forked.READY, *words]
        return forked.start(command, log, ready=ready, user=user, patch=PATCH)
    return subprocess.Popen(
        [sys.executable, "-m", "udbad", "mount", "-f", "--ready-fd", str(ready), *words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        pass_fds=[ready],
    )


class Mount:
    """One union and the process that serves it; use `mounted` or the fixture `union`.

    path: mount point. branches: their directories, top first; `mount["name"]` is the one whose last
    component is name. options: what was given besides br, udba and control.
    """

    def __init__(
        self,
        branches: Sequence[str],
        mount_point: Path,
        udba: str = "reval",
        options: str = "",
        *,
        allow_log: str | None = None,
        watchdog: float = WATCHDOG,
        user: int = 0,
    ) -> None:
        self.path = mount_point.parent.resolve() / mount_point.name
        self.branches = [Path(re.split(r"(?<!\\)=", branch)[0]) for branch in branches]
        self.udba = udba
        self.options = options
        self._branch_option = ":".join(branches)
        self._user = user
        self._allow_log = None if allow_log is None else re.compile(allow_log)
        self._watchdog_seconds = watchdog
        self._watchdog: _Watchdog | None = None
        self._process: Process | None = None
        self._connection: int | None = None
        # Not in tmp_path: the path of a unix socket has at most 107 bytes, unix(7).
        self._scratch = Path(tempfile.mkdtemp(prefix="udbad-"))
        self._log_path = self._scratch / "log"
        self._control_path = self._scratch / "ctl"
        os.chown(self._scratch, user, user)

    def __getitem__(self, name: str) -> Path:
        for branch in self.branches:
            if branch.name == name:
                return branch
        raise KeyError(name)

    @property
    def process(self) -> Process:
        """The daemon; also after it has ended, until the next `remount`."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def connection(self) -> int:
        """Number of the FUSE connection: the name of its directory in fusectl."""
        assert self._connection is not None, "not mounted"
        return self._connection

    def log(self) -> str:
        """What the daemon has written to stdout and stderr, over all remounts."""
        return self._log_path.read_text(errors="replace")

    def start(self) -> None:
        """Start the daemon and wait until it serves. Raises MountFailed with its log."""
        ensure_fusectl()
        self.path.mkdir(exist_ok=True)
        words = f"br={self._branch_option},udba={self.udba},control={self._control_path}"
        if "io=" not in self.options:
            words += f",io={IO}"
        if "survive=" not in self.options:
            words += ",survive=off"  # the process of the command is the one that serves
        if self.options:
            words += f",{self.options}"
        ready, ready_end = os.pipe()
        try:
            try:
                with self._log_path.open("ab") as log:
                    self._process = _start(["-o", words, "none", str(self.path)], log.fileno(), ready_end, self._user)
            finally:
                os.close(ready_end)
            self._wait_ready(ready)
        finally:
            os.close(ready)
        mount = self._mount_info()
        if mount is None:
            raise MountFailed(f"READY, but {self.path} is not mounted\n{self.log()}", self.process.poll())
        self._connection = mount.minor
        self._watchdog = _Watchdog(mount, self._watchdog_seconds)

    def _wait_ready(self, ready: int) -> None:
        end = time.monotonic() + DEADLINE
        said = b""
        while not said.endswith(b"READY\n"):
            readable, _, _ = select.select([ready], [], [], max(0.0, end - time.monotonic()))
            if not readable:
                raise MountFailed(f"not ready after {DEADLINE:.0f} s\n{self.log()}", self.process.poll())
            chunk = os.read(ready, 64)
            if not chunk:
                code = self.process.wait(DEADLINE)
                raise MountFailed(f"ended with code {code} before it was ready\n{self.log()}", code)
            said += chunk

    def _mount_info(self) -> MountInfo | None:
        """The topmost union at the mount point."""
        for mount in reversed(read_mountinfo()):
            if mount.path == self.path and mount.fs_type == FS_TYPE:
                return mount
        return None

    @property
    def is_mounted(self) -> bool:
        """Whether a union is at the mount point, served or dead."""
        return self._mount_info() is not None

    def unmount(self) -> None:
        """Unmount and wait for the daemon; it must end with code 0."""
        command = ["umount", "-i", "-c", "--", str(self.path)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=self._watchdog_seconds)
        if done.returncode != 0:
            self._release_watchdog()  # says so when it was the watchdog that has unmounted
            users = "".join(f"\n  held by {describe_process(pid)}" for pid in holders(self.path))
            raise AssertionError(f"{done.stderr.strip()}{users}")
        self._expect_end()

    def _expect_end(self) -> None:
        """The mount is gone: the daemon must end by itself, with code 0."""
        self._release_watchdog()
        try:
            code = self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon still runs {DEADLINE:.0f} s after umount\n{self.log()}") from None
        assert code == 0, f"the daemon ended with code {code}\n{self.log()}"

    def remount(self, options: str | None = None) -> None:
        """Unmount, unless that or `kill` was done before, and mount the same branches in a new process.

        options: replaces the ones given before.
        """
        if self.is_mounted:
            self.unmount()
        if options is not None:
            self.options = options
        self.start()

    def kill(self) -> None:
        """SIGKILL the daemon, then unmount lazily: what a crash leaves on the branches stays as it is."""
        self.process.kill()
        try:
            self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            abort_connection(self.connection)  # a thread of it is stuck in the kernel
            self.process.wait(DEADLINE)
        self._remove_mounts()
        self._release_watchdog()

    @property
    def control_path(self) -> Path:
        return self._control_path

    def control(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request to the control socket of the mount and return its answer."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
            client.settimeout(DEADLINE)
            client.connect(str(self._control_path))
            client.sendall(json.dumps(request).encode() + b"\n")
            with client.makefile("rb") as answers:
                line = answers.readline()
        assert line.endswith(b"\n"), f"no whole answer to {request}: {line!r}\n{self.log()}"
        answer = json.loads(line)
        assert isinstance(answer, dict), f"answer to {request}: {line!r}"
        return answer

    def flush(self) -> None:
        """Return when every change and invalidation that was known to the daemon has reached the kernel."""
        answer = self.control({"op": "flush"})
        assert "error" not in answer, answer

    def requests(self) -> dict[str, int]:
        """Number of FUSE requests served so far by operation name."""
        requests = self.control({"op": "stats"})["requests"]
        return {str(name): int(count) for name, count in requests.items()}

    def check_log(self) -> None:
        """Fail on a warning, an error or a traceback in the log that `allow_log` does not match."""
        bad = [
            line
            for line in self.log().splitlines()
            if _BAD_LOG.search(line) and not (self._allow_log and self._allow_log.search(line))
        ]
        assert not bad, "in the daemon's log:\n" + "\n".join(bad) + f"\n-- the whole log:\n{self.log()}"

    def _remove_mounts(self) -> None:
        while (mount := self._mount_info()) is not None:
            assert remove_mount(mount), f"cannot unmount {mount}"

    def _release_watchdog(self) -> None:
        if self._watchdog is not None:
            watchdog, self._watchdog = self._watchdog, None
            assert watchdog.release(), f"the watchdog aborted the mount after {self._watchdog_seconds:.0f} s"

    def finish(self) -> None:
        """The orderly end: unmount unless the test has, and look at the log."""
        if self.is_mounted:
            self.unmount()
        elif self._watchdog is not None:  # unmounted by other means than `unmount` and `kill`
            self._expect_end()
        self.check_log()

    def destroy(self) -> None:
        """Leave nothing, whatever the state; harmless after `finish`. Never fails for what the test did."""
        self._remove_mounts()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(DEADLINE)
        if self._watchdog is not None:
            watchdog, self._watchdog = self._watchdog, None
            watchdog.release()
        shutil.rmtree(self._scratch)


@contextmanager
def mounted(
    branches: Sequence[str],
    mount_point: Path,
    udba: str = "reval",
    options: str = "",
    *,
    allow_log: str | None = None,
    watchdog: float = WATCHDOG,
    user: int = 0,
) -> Iterator[Mount]:
    """A union of `branches` (aufs syntax, 'PATH=rw') at `mount_point`, which is made if it is missing.

    user: who mounts.

    options: more words for -o. allow_log, watchdog: see UnionFactory. At the end of the block it is
    unmounted, and the daemon must have ended with code 0 and without a warning in its log; an
    exception from the block goes on with the log as a note.
    """
    mount = Mount(branches, mount_point, udba, options, allow_log=allow_log, watchdog=watchdog, user=user)
    try:
        mount.start()
        try:
            yield mount
        except BaseException as error:
            error.add_note(f"-- log of the daemon:\n{mount.log()}")
            raise
        mount.finish()
    finally:
        mount.destroy()
