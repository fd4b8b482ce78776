"""Bugs and deaths of the daemon: what callers get, and that the mount goes on or stays honestly dead."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.leaks import abort_connection
from tests.helpers.merge import diff, snapshot
from tests.helpers.mount import DEADLINE, REPOSITORY, Mount, UnionFactory
from tests.t3_fuse.live import debris, errno_of, modes, names
from tests.t5_daemon.daemon import until
from udbad.errors import ExitCode

pytestmark = pytest.mark.fuse

_libc = ctypes.CDLL(None, use_errno=True)

FAULTY_DAEMON = """
import errno, os
from udbad.edge import table
from udbad.mount import mountproc
from udbad.union.fs import UnionFs

KINDS = {
    "RuntimeError": lambda: RuntimeError("injected"),
    "KeyError": lambda: KeyError(b"name"),
    "AssertionError": AssertionError,
    "RecursionError": RecursionError,
    "MemoryError": MemoryError,
    "ENOSYS": lambda: OSError(errno.ENOSYS, "injected"),
    "no errno": OSError,
    "ExceptionGroup": lambda: ExceptionGroup("injected", [ValueError("inner")]),
}

def faulty(name, method):
    def call(self, *args):
        try:
            with open(os.path.join(os.environ["FAULTS"], name)) as stream:
                raise KINDS[stream.read()]()
        except FileNotFoundError:
            return method(self, *args)
    return call

methods = {
    name: faulty(name, method)
    for name, method in vars(UnionFs).items()
    if callable(method) and not name.startswith("_") and name not in ("run", "forget", "recover")
}
mountproc.UnionFs = type("FaultyFs", (UnionFs,), methods)  # a compiled class cannot be changed itself
for opcode, row in table.TABLE.items():
    if row.name == "read":  # UnionFs has no part in it
        table.TABLE[opcode] = row._replace(operation=faulty("read", row.operation))
"""
"""A fault in each method of UnionFs for which a file of that name says what to raise."""

KINDS = ("RuntimeError", "KeyError", "AssertionError", "RecursionError", "MemoryError", "ExceptionGroup")

LISTS = 50
_unlisted = itertools.cycle(range(LISTS))
"""The kernel keeps listings: each one is read from the daemon once."""

ACTS: dict[str, Callable[[Path], object]] = {
    "lookup": lambda root: os.stat(root / "new name"),
    "getattr": lambda root: _statx(root),
    "readlink": lambda root: os.readlink(root / "link"),
    "create": lambda root: os.close(os.open(root / "created", os.O_CREAT | os.O_EXCL | os.O_RDWR)),
    "mknod": lambda root: os.mkfifo(root / "made"),
    "mkdir": lambda root: (root / "directory").mkdir(),
    "symlink": lambda root: (root / "symlink").symlink_to("x"),
    "link": lambda root: os.link(root / "file", root / "hard"),
    "rename": lambda root: (root / "old").rename(root / "renamed"),
    "unlink": lambda root: (root / "gone").unlink(),
    "rmdir": lambda root: (root / "gonedir").rmdir(),
    "setattr": lambda root: (root / "file").chmod(0o600),
    "find_xattr": lambda root: os.getxattr(root / "file", "user.k"),
    "listxattr": lambda root: os.listxattr(root / "file"),
    "setxattr": lambda root: os.setxattr(root / "file", "user.n", b"v"),
    "removexattr": lambda root: os.removexattr(root / "file", "user.k"),
    "open": lambda root: os.close(os.open(root / "file", os.O_RDONLY)),
    "write": lambda root: _write(root / "file"),
    "read": lambda root: (root / "file").read_bytes(),
    "opendir": lambda root: os.listdir(root / "sub"),
    "readdir": lambda root: os.listdir(root / f"list{next(_unlisted)}"),
    "statfs": lambda root: os.statvfs(root),
    "directory_fds": lambda root: _fsync_directory(root),
}
"""A system call that needs the method of UnionFs, and works when there is no fault."""


def _statx(path: Path) -> None:
    """statx(2) with AT_STATX_FORCE_SYNC: the attributes the kernel has cached will not do."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(-100, os.fsencode(path), 0x2000, 0x7FF, buffer) != 0:
        raise OSError(ctypes.get_errno(), "statx")


def _write(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, b"x")
    finally:
        os.close(fd)


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@pytest.fixture
def faults(tmp_path: Path, patch_daemon: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory: a file METHOD in it, holding a name of KINDS, makes that method of the daemon's UnionFs fail."""
    patch_daemon(FAULTY_DAEMON)
    directory = tmp_path / "faults"
    directory.mkdir()
    monkeypatch.setenv("FAULTS", str(directory))
    return directory


@pytest.fixture
def faulty(union: UnionFactory, faults: Path, tmp_path: Path, udba: str) -> Mount:
    (tmp_path / "base/sub").mkdir(parents=True)
    (tmp_path / "base/gonedir").mkdir()
    for number in range(LISTS):
        (tmp_path / f"base/list{number}").mkdir()
    for name in ("file", "gone", "old", "sub/in"):
        (tmp_path / "base" / name).write_text("text")
    os.setxattr(tmp_path / "base/file", "user.k", b"v")
    (tmp_path / "base/link").symlink_to("file")
    return union(None, udba, allow_log=".")


def bugs(mount: Mount) -> int:
    return int(mount.control({"op": "stats"})["bugs"])


@modes
def test_a_bug_is_one_eio_and_one_log_entry(faulty: Mount, faults: Path) -> None:
    """Whatever the exception and the operation; nothing has changed, and without the fault it works."""
    for method, act in ACTS.items():
        before = snapshot(faulty["top"])
        for kind in KINDS:
            (faults / method).write_text(kind)
            known, told = bugs(faulty), faulty.log().count(" failed\n")
            seen = errno_of(lambda: act(faulty.path))  # noqa: B023  # called at once
            (faults / method).unlink()
            assert seen == "EIO", (method, kind)
            failures = bugs(faulty) - known
            # One request; the kernel reads again what could not be read ahead.
            assert failures == 1 or (method == "read" and failures > 1), (method, kind)
            assert faulty.log().count(" failed\n") == told + failures, (method, kind)
        assert diff(before, snapshot(faulty["top"])) == [], method
        assert errno_of(lambda: act(faulty.path)) == ("ENOENT" if method == "lookup" else ""), method  # noqa: B023  # called at once
    assert faulty.log().count("Traceback") >= len(ACTS) * len(KINDS)
    assert (faulty.path / "sub/in").read_text() == "text"
    assert debris(faulty["top"]) == []


@modes
def test_enosys_never_reaches_the_kernel(faulty: Mount, faults: Path) -> None:
    """It would stop sending that operation for good (an open would succeed without us, and so on)."""
    for method, act in ACTS.items():
        for kind in ("ENOSYS", "no errno"):
            for _ in range(2):  # asked for again after the first refusal
                (faults / method).write_text(kind)
                seen = errno_of(lambda: act(faulty.path))  # noqa: B023  # called at once
                (faults / method).unlink()
                assert seen == "EIO", (method, kind)
    assert bugs(faulty) == 0, "an OSError is no bug"


# -- death ------------------------------------------------------------------------------------


@pytest.fixture
def living(union: UnionFactory, tmp_path: Path, udba: str) -> Mount:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/lower").write_text("lower")
    return union(None, udba)


def dead_everywhere(root: Path) -> None:
    """Every access says that the mount is dead; above all it does not look like an empty directory.

    Names and attributes that the kernel has cached may still be answered.
    """
    for call in (
        lambda: os.listdir(root),
        lambda: _statx(root),
        lambda: os.stat(root / "never asked for"),
        lambda: os.open(root / "lower", os.O_RDONLY),
        lambda: os.open(root / "new", os.O_CREAT | os.O_WRONLY),
        lambda: os.mkdir(root / "new"),
        lambda: os.unlink(root / "lower"),
        lambda: os.statvfs(root),
    ):
        assert errno_of(call) in ("ENOTCONN", "ECONNABORTED")


@modes
def test_killed_daemon_leaves_a_dead_mount_point(living: Mount) -> None:
    (living.path / "new").write_text("written")
    fd = os.open(living.path / "lower", os.O_RDWR)
    os.write(fd, b"LOWER")
    os.fsync(fd)
    directory = os.open(living.path, os.O_RDONLY)
    try:
        living.process.send_signal(signal.SIGKILL)
        living.process.wait(DEADLINE)
        assert living.is_mounted
        dead_everywhere(living.path)
        assert errno_of(lambda: os.write(fd, b"x")) == "ENOTCONN"
        assert errno_of(lambda: os.listdir(directory)) == "ENOTCONN"
        # Mounting over a dead mount is refused with one line; it has to be taken away first.
        words = [sys.executable, "-m", "udbad", "mount", "-f", "-o", f"br={living['top']}:{living['base']}", "none"]
        again = subprocess.run(
            [*words, str(living.path)], cwd="/", env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert again.returncode == 5
        assert [line for line in again.stderr.splitlines() if "INFO" not in line] == [
            f"udbad: mount point {living.path}: Transport endpoint is not connected"
        ]
    finally:
        os.close(directory)
        assert errno_of(lambda: os.close(fd)) in ("", "ENOTCONN")
    living.kill()
    living.remount()
    assert sorted(os.listdir(living.path)) == ["lower", "new"]
    assert (living.path / "lower").read_text() == "LOWER"
    until(lambda: "was not unmounted cleanly" in living.log(), "the sweep, which begins beside the mount")
    living.remount()
    assert living.log().count("was not unmounted cleanly") == 1


@modes
def test_sweep_after_a_kill(living: Mount) -> None:
    """What a crash in the middle of a copy-up leaves is gone after the next mount, and only that."""
    living.kill()
    left = living["top"] / ".wh..wh.lower.1a2b"
    left.write_text("half")
    (living["top"] / ".wh.other").touch()
    living.remount()
    until(lambda: not left.exists(), "the sweep, which goes on beside the mount")
    assert names(living["top"]) == [".wh.other"]
    assert (living.path / "lower").read_text() == "lower"


@modes
def test_aborted_connection(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """What a supervisor does to a wedged mount: the daemon ends by itself, and says why in its own way."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/lower").write_text("lower")
    with (tmp_path / "base/big").open("wb") as big:
        for _ in range(256):
            big.write(bytes(1 << 20))
    living = union(None, udba)
    # Many requests are under way when it happens: all wait for one copy-up.
    command = ["sh", "-c", "for i in $(seq 20); do echo x >>big & done; wait"]
    with subprocess.Popen(command, cwd=living.path, stderr=subprocess.DEVNULL) as writers:
        until(lambda: living.control({"op": "stats"})["copyups"], "a copy-up")
        abort_connection(living.connection)
        writers.wait(DEADLINE)
    assert living.process.wait(DEADLINE) == ExitCode.FAILURE
    said = [line for line in living.log().splitlines() if "INFO" not in line]
    assert len(said) == 1, said
    assert said[0].startswith(f"udbad: {living.path}: the connection was aborted")
    assert living.is_mounted
    dead_everywhere(living.path)
    living.kill()
    living.remount()
    assert names(living.path) == ["big", "lower"]


@modes
def test_stopped_daemon_loses_nothing(living: Mount) -> None:
    """SIGSTOP: callers wait; SIGCONT: they get their answer."""
    living.process.send_signal(signal.SIGSTOP)
    child = os.fork()
    if child == 0:
        try:
            (living.path / "made").write_text("x")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    living.process.send_signal(signal.SIGCONT)
    assert os.waitpid(child, 0)[1] == 0
    assert (living["top"] / "made").read_text() == "x"
