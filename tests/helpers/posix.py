"""Run the same system calls as an unprivileged user in two places and compare what came of them.

A scenario is a function that takes a `Probe` and calls `probe.do(...)`; it runs in a forked child with
the ids, supplementary groups and umask of an `Identity`, its working directory in the tree under test.
The result is a list of plain values that can be compared with that of another tree. The child never
outlives `TIMEOUT`, so that a wedged mount fails a test instead of stopping the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pickle
import select
import signal
import stat
import struct
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec

NOREPLACE: Final = 1  # linux/fs.h, renameat2(2)
EXCHANGE: Final = 2
KEEP_SIZE: Final = 1  # linux/falloc.h, fallocate(2)
PUNCH_HOLE: Final = 2
COLLAPSE_RANGE: Final = 8
ZERO_RANGE: Final = 0x10
AT_FDCWD: Final = -100
TIMEOUT: Final = 30.0
"""Seconds a child may take."""

_libc: Final = ctypes.CDLL(None, use_errno=True)

P = ParamSpec("P")
Scenario = Callable[["Probe"], None]
Outcome = tuple[str, object]
"""What was called, and its value or the name of the errno."""


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def renameat2(src: bytes, dst: bytes, flags: int = 0) -> None:
    """renameat2(2) on paths; with flags 0 plain rename(2)."""
    _check(_libc.renameat2(AT_FDCWD, src, AT_FDCWD, dst, flags))


_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); os.posix_fallocate() writes where a file system cannot."""
    _check(_libc.fallocate(fd, mode, offset, length))


def link_fd(fd: int, path: str, by_proc: bool = True) -> None:
    """Give an open file a name: linkat(2) by /proc/self/fd, or with AT_EMPTY_PATH."""
    source, flags = (b"/proc/self/fd/%d" % fd, 0x400) if by_proc else (b"", 0x1000)  # AT_SYMLINK_FOLLOW
    _check(_libc.linkat(AT_FDCWD if by_proc else fd, source, AT_FDCWD, os.fsencode(path), flags))


def birth_ns(path: str) -> int:
    """When something was made (statx(2), STATX_BTIME), ns since the epoch; 0 where nobody knows."""
    buffer = ctypes.create_string_buffer(256)
    _check(_libc.statx(AT_FDCWD, os.fsencode(path), 0x100, 0x800, buffer))  # AT_SYMLINK_NOFOLLOW
    mask, seconds, nanoseconds = struct.unpack_from("<I76xqI", buffer.raw)  # stx_mask, stx_btime
    return int(seconds * 10**9 + nanoseconds) if mask & 0x800 else 0


def cached_mode(path: str) -> str:
    """Mode bits as `stat -c %a` asks for them: statx(2) for the mode alone, which the kernel may have cached."""
    buffer = ctypes.create_string_buffer(256)
    _check(_libc.statx(AT_FDCWD, os.fsencode(path), 0, 2, buffer))  # STATX_MODE
    return oct(int.from_bytes(buffer.raw[28:30], "little"))  # stx_mode


@dataclass(frozen=True)
class Identity:
    """Who runs a scenario: ids, supplementary groups, umask."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    umask: int = 0o022

    def assume(self) -> None:
        """Become it for good; drops every capability unless uid is 0."""
        os.setgroups(self.groups)
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)
        os.umask(self.umask)


class Probe:
    """Records what each call returned."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def do(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call; record the value or errno under the text of the call; the value, or None after an error."""
        words = [*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())]
        label = f"{call.__name__}({', '.join(words)})"
        try:
            value = call(*args, **kwargs)
        except OSError as error:
            self.outcomes.append((label, errno.errorcode[error.errno or 0]))
            return None
        self.outcomes.append((label, value))
        return value

    def fd(self, path: str, flags: int, use: Callable[Concatenate[int, P], object], *a: P.args, **k: P.kwargs) -> None:
        """open(path, flags, 0666), use(fd, …), close; each recorded without the number of the descriptor."""
        label = f"open({path!r}, {flags:#o})"
        try:
            fd = os.open(path, flags, 0o666)
        except OSError as error:
            self.outcomes.append((label, errno.errorcode[error.errno or 0]))
            return
        try:
            self.outcomes.append((label, "opened"))
            try:
                value = use(fd, *a, **k)
            except OSError as error:
                value = errno.errorcode[error.errno or 0]
            self.outcomes.append((f"{label}: {use.__name__}{a!r}", value))
        finally:
            os.close(fd)

    def stat(self, path: str) -> None:
        self.do(status, path)


def status(path: str) -> tuple[object, ...]:
    """lstat without what may differ between file systems: type and mode, owner, links, size, device number.

    Link count and size of a directory, and the size a file system gives a symlink, are left out.
    """
    return _status_of(os.lstat(path))


def _status_of(info: os.stat_result) -> tuple[object, ...]:
    is_dir = stat.S_ISDIR(info.st_mode)
    rdev = info.st_rdev if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode) else 0
    links, size = (None, None) if is_dir else (info.st_nlink, info.st_size)
    return oct(info.st_mode), info.st_uid, info.st_gid, links, size, rdev


def tree_status(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below `root` (and `root` itself, as "."): status, symlink target, content, all xattrs."""
    found: dict[str, tuple[object, ...]] = {}
    with contextlib.chdir(root):
        found["."] = _whole(".")
        for directory, subdirectories, files, fd in os.fwalk("."):
            os.fchdir(fd)  # each name alone: a mode may have every component of a path asked for, each time
            for name in subdirectories + files:
                found[os.path.normpath(os.path.join(directory, name))] = _whole(name)
    return found


def _whole(path: str) -> tuple[object, ...]:
    info = os.lstat(path)
    names = sorted(os.listxattr(path, follow_symlinks=False))
    xattrs = [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names]
    content: object = None
    if stat.S_ISLNK(info.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(info.st_mode):
        content = Path(path).read_bytes()
    return (*_status_of(info), content, xattrs)


def run_as(identity: Identity, directory: Path, scenario: Scenario) -> list[Outcome]:
    """Run `scenario` in a child that has become `identity`, with `directory` as its working directory.

    The directory is entered before the privileges go. Raises AssertionError when the scenario raised
    anything but the OSErrors it recorded, or did not end in time.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            message = _child(identity, directory, scenario)
            with os.fdopen(writer, "wb") as stream:
                stream.write(message)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    try:
        message = _receive(reader, pid)
    finally:
        os.close(reader)
        os.waitpid(pid, 0)
    assert message, f"the child ended without a result in {directory}"
    done, value = pickle.loads(message)
    assert done, f"scenario failed in {directory}:\n{value}"
    outcomes: list[Outcome] = value
    return outcomes


def _child(identity: Identity, directory: Path, scenario: Scenario) -> bytes:
    try:
        os.chdir(directory)
        identity.assume()
        probe = Probe()
        scenario(probe)
        return pickle.dumps((True, probe.outcomes))
    except Exception:  # whatever it was, the parent reports it
        return pickle.dumps((False, traceback.format_exc()))


def _receive(reader: int, pid: int) -> bytes:
    chunks: list[bytes] = []
    while True:
        ready, _, _ = select.select([reader], [], [], TIMEOUT)
        if not ready:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"the child said nothing for {TIMEOUT:.0f} s")
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
