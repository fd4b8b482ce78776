"""On a real mount, the mount process is killed before and after each system call that changes something.

Each operation is one of a program's, with the kernel's own sending again; its outcome, what the mount then shows and
what is on the branches must be that of a process that was not killed. tests/t2_core/test_once.py does the same with
each request alone, in all its cases.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import select
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.helpers.mount import DEADLINE, Mount, UnionFactory
from tests.helpers.posix import EXCHANGE, NOREPLACE, renameat2
from tests.helpers.profile import SOAK
from tests.helpers.tracing import Traced
from tests.stress.test_storm import SEED
from tests.t2_core.killed import branch_tree
from udbad.mount import keeper

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.stress,
    pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not())),
]

STEPS: Final = 1
"""Of an operation, chosen by UDBAD_STORM_SEED; when soaking all of them, in each combination."""
COMBINATIONS: Final = (("notify", "requests"), ("reval", "passthrough"), ("none", "cached"))

Operation = Callable[[Path], object]


def opened(path: Path, flags: int, work: Callable[[int], object] = lambda fd: None) -> object:
    fd = os.open(path, flags, 0o640)
    try:
        return work(fd)
    finally:
        os.close(fd)


def nameless(here: Path) -> object:
    def work(fd: int) -> None:
        os.write(fd, b"nameless")
        os.link(f"/proc/self/fd/{fd}", here / "new", src_dir_fd=fd, follow_symlinks=True)

    return opened(here, os.O_TMPFILE | os.O_RDWR, work)


def after(first: Operation, then: Operation) -> Operation:
    def work(here: Path) -> object:
        first(here)
        return then(here)

    return work


def links(name: str) -> Operation:
    return lambda here: os.stat(here / name).st_nlink


def held(name: str, change: Operation) -> Operation:
    """An open file, and what is done to its name."""

    def work(here: Path) -> object:
        def inner(fd: int) -> object:
            change(here)
            os.pwrite(fd, b"W", 1)
            return os.pread(fd, 100, 0), os.fstat(fd).st_nlink

        return opened(here / name, os.O_RDWR, inner)

    return work


def mapped(here: Path) -> object:
    def work(fd: int) -> bytes:
        with mmap.mmap(fd, 4) as memory:
            memory[1:3] = b"MM"
            memory.flush()
            return memory[:]

    return opened(here / "low", os.O_RDWR, work)


def copy(here: Path) -> object:
    with (here / "low").open("rb") as source, (here / "up").open("r+b") as target:
        return os.copy_file_range(source.fileno(), target.fileno(), 3, 0, 2)


def fallocate(here: Path) -> object:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return opened(here / "up", os.O_RDWR, lambda fd: (libc.fallocate(fd, 0, 0, 10), libc.fallocate(fd, 3, 1, 2)))


OPERATIONS: Final[dict[str, Operation]] = {
    "mkdir": lambda here: os.mkdir(here / "new", 0o700),
    "mkdir-there": lambda here: os.mkdir(here / "updir"),
    "mkdir-whited": lambda here: os.mkdir(here / "gone"),
    "mkfifo": lambda here: os.mkfifo(here / "new", 0o600),
    "symlink": lambda here: os.symlink("target", here / "new"),
    "create": lambda here: opened(here / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, lambda fd: os.write(fd, b"new")),
    "create-unwritable": lambda here: os.close(os.open(here / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o444)),
    "create-whited": lambda here: opened(here / "gone", os.O_CREAT | os.O_WRONLY),
    "create-in-lower": lambda here: opened(here / "lowdir" / "new", os.O_CREAT | os.O_WRONLY),
    "nameless": nameless,
    "link": after(lambda here: os.link(here / "up", here / "new"), links("up")),
    "link-lower": after(lambda here: os.link(here / "low", here / "new"), links("low")),
    "unlink": lambda here: os.unlink(here / "up"),
    "unlink-lower": lambda here: os.unlink(here / "low"),
    "unlink-both": lambda here: os.unlink(here / "both"),
    "unlink-hard-link": after(lambda here: os.unlink(here / "up"), links("uplink")),
    "unlink-none": lambda here: os.unlink(here / "nothing"),
    "unlink-open": held("up", lambda here: os.unlink(here / "up")),
    "unlink-open-lower": held("low", lambda here: os.unlink(here / "low")),
    "rmdir": lambda here: os.rmdir(here / "updir"),
    "rmdir-lower": lambda here: os.rmdir(here / "lowempty"),
    "rmdir-marks": after(lambda here: os.unlink(here / "lowdir" / "x"), lambda here: os.rmdir(here / "lowdir")),
    "rmdir-full": lambda here: os.rmdir(here / "lowdir"),
    "rename": lambda here: os.rename(here / "up", here / "new"),
    "rename-lower": lambda here: os.rename(here / "low", here / "new"),
    "rename-over": lambda here: os.rename(here / "up", here / "both"),
    "rename-lower-over-lower": lambda here: os.rename(here / "low", here / "low2"),
    "rename-into-lower": lambda here: os.rename(here / "up", here / "lowdir" / "new"),
    "rename-hard-link": after(lambda here: os.rename(here / "up", here / "low"), links("uplink")),
    "rename-directory": lambda here: os.rename(here / "updir", here / "new"),
    "rename-open-lower": held("low", lambda here: os.rename(here / "low", here / "up")),
    "rename-over-open": held("both", lambda here: os.rename(here / "up", here / "both")),
    "rename-exchange": lambda here: renameat2(os.fsencode(here / "up"), os.fsencode(here / "low"), EXCHANGE),
    "rename-noreplace": lambda here: renameat2(os.fsencode(here / "low"), os.fsencode(here / "new"), NOREPLACE),
    "rename-noreplace-there": lambda here: renameat2(os.fsencode(here / "up"), os.fsencode(here / "both"), NOREPLACE),
    "chmod": lambda here: os.chmod(here / "up", 0o4711),
    "chmod-lower": lambda here: os.chmod(here / "low", 0o600),
    "chmod-lower-directory": lambda here: os.chmod(here / "lowdir", 0o711),
    "chown": lambda here: os.chown(here / "up", 5, 6),
    "utime": lambda here: os.utime(here / "low", ns=(5, 7)),
    "truncate": lambda here: os.truncate(here / "up", 2),
    "truncate-lower": lambda here: os.truncate(here / "low", 9),
    "open-truncate": lambda here: opened(here / "low", os.O_WRONLY | os.O_TRUNC, lambda fd: os.write(fd, b"t")),
    "setxattr": lambda here: os.setxattr(here / "up", "user.key", b"value"),
    "setxattr-create": lambda here: os.setxattr(here / "low", "user.key", b"value", os.XATTR_CREATE),
    "setxattr-create-there": lambda here: os.setxattr(here / "both", "user.key", b"value", os.XATTR_CREATE),
    "removexattr": lambda here: os.removexattr(here / "both", "user.key"),
    "removexattr-none": lambda here: os.removexattr(here / "up", "user.key"),
    "write": lambda here: opened(here / "up", os.O_RDWR, lambda fd: (os.pwrite(fd, b"XY", 1), os.fstat(fd).st_size)),
    "write-lower": lambda here: opened(here / "low", os.O_RDWR, lambda fd: os.pwrite(fd, b"XY", 1)),
    "append": lambda here: opened(here / "up", os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"upup")),
    "append-lower": lambda here: opened(here / "low", os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"more")),
    "append-twice": lambda here: opened(
        here / "up", os.O_WRONLY | os.O_APPEND, lambda fd: [os.write(fd, b"same"), os.write(fd, b"same")]
    ),
    "mapped": mapped,
    "copy": copy,
    "fallocate": fallocate,
    "lock": lambda here: opened(here / "up", os.O_RDWR, lambda fd: fcntl.flock(fd, fcntl.LOCK_EX)),
    "list": lambda here: sorted(os.listdir(here / "lowdir")),
    "read": lambda here: (here / "low").read_bytes(),
}
OFTEN: Final = ("create", "append", "unlink-open-lower")
"""Also without soaking at each step, in one combination."""


def make(top: Path, base: Path) -> None:
    """What an operation finds on the branches."""
    for directory in (base / "lowdir", base / "lowempty", top / "updir"):
        directory.mkdir(parents=True)
    (base / "lowdir" / "x").write_bytes(b"x of base")
    for path, content in (
        (top / "up", b"upper"), (base / "low", b"lower"), (base / "low2", b"second"), (top / "both", b"of top"),
        (base / "both", b"of base"), (base / "gone", b"gone"), (top / ".wh.gone", b""),
    ):  # fmt: skip
        path.write_bytes(content)
    os.link(top / "up", top / "uplink")
    os.setxattr(top / "both", "user.key", b"before")


def shown(here: Path) -> dict[str, Any]:
    """What the mount shows, without times and numbers."""
    found: dict[str, Any] = {}
    for above, directories, files in os.walk(here):
        for name in sorted(directories + files):
            path = Path(above, name)
            st = path.lstat()
            content: object = None
            if stat.S_ISREG(st.st_mode):
                content = path.read_bytes()
            elif stat.S_ISLNK(st.st_mode):
                content = os.readlink(path)
            links_and_size = None if stat.S_ISDIR(st.st_mode) else (st.st_nlink, st.st_size)
            names = os.listxattr(path, follow_symlinks=False)
            keys = {key: os.getxattr(path, key, follow_symlinks=False) for key in names}
            found[str(path.relative_to(here))] = st.st_mode, st.st_uid, st.st_gid, links_and_size, content, keys
    return found


class Steps:
    """One mount, in which each attempt has a directory of its own."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._attempts = 0
        self.kills = 0

    def attempt(self, operation: Operation, step: int) -> tuple[list[str], Any]:
        """Kill at a step, from 1 on, 0: nowhere. The stops before that, and the outcome."""
        self._attempts += 1
        name = f"attempt {self._attempts}"
        top, base, here = self._mount["top"] / name, self._mount["base"] / name, self._mount.path / name
        make(top, base)
        self._mount.flush()
        os.stat(here)
        stops, result = self._traced(operation, here, step)
        outcome = result, shown(here), branch_tree(top), branch_tree(base)
        return stops, outcome

    def _traced(self, operation: Operation, here: Path, step: int) -> tuple[list[str], object]:
        traced = Traced(self._mount.control({"op": "status"})["pid"])
        client = Client(operation, here)
        stops: list[str] = []
        try:
            while (stop := traced.next(client.ended)) is not None:
                stops.append(stop)
                if len(stops) == step:
                    traced.kill()
                    self.kills += 1
                    break
            else:
                traced.release()
            return stops, client.result(stops)
        finally:
            client.end()


class Client:
    """A process that does one thing: a page fault stops all threads of one."""

    def __init__(self, operation: Operation, here: Path) -> None:
        self._end, theirs = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                result: object = operation(here)
            except OSError as error:
                result = errno.errorcode[error.errno or 0]
            os.write(theirs, repr(result).encode())
            os._exit(0)
        os.close(theirs)
        self._poll = select.poll()
        self._poll.register(self._end, select.POLLIN)

    def ended(self) -> bool:
        return bool(self._poll.poll(1))

    def result(self, stops: list[str]) -> str:
        assert self._poll.poll(DEADLINE * 1000), f"hangs, killed {stops[-1:]}"
        return os.read(self._end, 1 << 16).decode()

    def end(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._end)


@pytest.fixture
def steps(union: UnionFactory, udba: str, io: str) -> Steps:
    mount = union(
        udba=udba, options=f"survive=on,io={io}", allow_log="another one takes over|lost branch events", watchdog=3600
    )
    return Steps(mount)


def differences(steps: Steps, operation: Operation, most: int | None) -> list[str]:
    """most: how many steps are tried, None: all."""
    stops, right = steps.attempt(operation, 0)
    found = []
    chosen = list(range(1, len(stops) + 1))
    if most is not None:
        chosen = random.Random(SEED).sample(chosen, min(most, len(chosen)))
    for step in chosen:
        seen, outcome = steps.attempt(operation, step)
        if outcome != right:
            found.append(f"killed {seen[-1]}, {step} of {len(stops)}: {outcome}, not {right}")
    return found


@pytest.mark.parametrize(("udba", "io"), COMBINATIONS if SOAK else COMBINATIONS[:1])
def test_each_operation_is_done_once(steps: Steps) -> None:
    print(f"UDBAD_STORM_SEED={SEED}")
    found = {
        name: wrong
        for name, operation in OPERATIONS.items()
        if (wrong := differences(steps, operation, None if SOAK or name in OFTEN else STEPS))
    }
    print(f"{steps.kills} kills")
    assert not found
