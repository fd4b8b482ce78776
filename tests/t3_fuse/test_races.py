"""Symbolic links, FIFOs and other objects swapped into branch directories while the mount is used.

Another process exchanges (renameat2 EXCHANGE) a branch directory and a symlink to a directory outside, some
hundred times or more, while every operation runs through the mount. Nothing outside is ever read or written.
The caller keeps away from following the symlink itself: it works relative to descriptors, without following.
"""

from __future__ import annotations

import inspect
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.helpers.posix import EXCHANGE, Identity, Probe, renameat2, run_as
from tests.helpers.profile import scaled
from tests.t3_fuse.live import errno_of, modes

pytestmark = pytest.mark.fuse

ROUNDS = scaled(60, 1500)
SECRET = b"SECRET of the canary"
OVERFLOW = "lost branch events"
"""The swapper may be faster than the watcher; what happens then is said once each time, and is no mistake here."""

Facts = dict[str, tuple[object, ...]]


@contextmanager
def swapping(*pairs: tuple[Path, Path]) -> Iterator[Callable[[], int]]:
    """Exchange each pair again and again in another process; the callable tells how often that was done."""
    counter, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(counter)
            raw = [(os.fsencode(a), os.fsencode(b)) for a, b in pairs]
            while True:
                for a, b in raw:
                    with suppress(FileNotFoundError):  # an operation through the mount has removed or renamed it
                        renameat2(a, b, EXCHANGE)
                os.write(writer, b".")
        finally:
            os._exit(1)
    os.close(writer)
    os.set_blocking(counter, False)
    done = 0

    def count() -> int:
        nonlocal done
        with suppress(BlockingIOError):
            while chunk := os.read(counter, 1 << 16):
                done += len(chunk)
        return done

    try:
        yield count
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the swapper has died"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(counter)


def make_canary(path: Path) -> Facts:
    """A directory with the names that the operations use; access times are such that relatime would renew them."""
    (path / "sub").mkdir(parents=True)
    for name in ("f", "g", "sub/f", "sub/g"):
        (path / name).write_bytes(SECRET)
        os.setxattr(path / name, "user.k", SECRET)
    (path / "l").symlink_to(os.fsdecode(SECRET))
    for entry in (*path.rglob("*"), path):
        os.utime(entry, ns=(10**18, 10**18 + 10**9), follow_symlinks=False)
    return facts(path)


def facts(path: Path) -> Facts:
    """All that a read or a write would change. Taken without changing it: O_NOATIME, O_PATH."""
    found: Facts = {}
    for entry in ("", "f", "g", "l", "sub", "sub/f", "sub/g"):
        info = os.lstat(path / entry)
        # Times of access of directories change when this test lists them, so names are compared by count of links.
        found[entry] = (
            info.st_ino, info.st_mode, info.st_uid, info.st_gid, info.st_nlink, info.st_size,
            info.st_atime_ns, info.st_mtime_ns, info.st_ctime_ns,
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Op:
    """A call on names in a directory of the mount, and what it may fail with: anything but a wrong result."""

    call: Callable[[], object]
    allowed: frozenset[str]


OPENED = {"ELOOP"}
"""open(2) with O_NOFOLLOW: it is a symlink."""
WRITTEN = OPENED | {"EISDIR", "ENXIO", "EINVAL"}
"""It is a directory, a FIFO that nobody reads; ftruncate(2): a FIFO, a device."""
EXCHANGED = {"ESTALE"}
"""What is exchanged as fast as here gets past a repeated walk (t2_core/test_held.py) once in some 100,000 operations;
nothing holds the object of an O_PATH descriptor, as which /proc/self/fd leads to FIFOs and devices."""


def operations(fd: int) -> list[Op]:
    """Every kind of operation on the names in a directory of the mount, given by descriptor; none follows a symlink.

    Others exchange `f` and `g`, and `h` is there when `g` could be renamed so; nobody else touches the other names.
    """

    def read(name: str) -> None:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
        try:
            assert SECRET not in os.read(file, 100), "read from outside"
        finally:
            os.close(file)

    def write(name: str, flags: int) -> None:
        file = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o644, dir_fd=fd)
        try:
            os.write(file, b"written")
            os.ftruncate(file, 3)
            os.fchmod(file, 0o640)
        finally:
            os.close(file)

    def on_path(call: Callable[[str], object], name: str) -> None:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
        try:
            call(f"/proc/self/fd/{file}")
        finally:
            os.close(file)

    def getxattr(path: str) -> None:
        assert os.getxattr(path, "user.k") != SECRET, "read from outside"

    def readlink() -> None:
        assert os.readlink("l", dir_fd=fd) != os.fsdecode(SECRET), "read from outside"

    def op(call: Callable[[], object], *allowed: set[str]) -> Op:
        return Op(call, frozenset().union(*allowed))

    # One of the two is a directory, and the other not; of a directory that lower branches have a part of: EXDEV.
    kinds = {"ENOTDIR", "EISDIR"}
    return [
        op(lambda: read("f"), OPENED, {"EISDIR"}, EXCHANGED),
        op(lambda: write("f", 0), WRITTEN, EXCHANGED),
        op(lambda: write("g", os.O_TRUNC), WRITTEN, EXCHANGED),
        op(lambda: write("new", os.O_CREAT | os.O_EXCL)),
        op(lambda: os.stat("f", dir_fd=fd, follow_symlinks=False), EXCHANGED),
        op(readlink, {"ENOENT"}),  # only the canary has it
        op(lambda: os.listdir(fd)),
        op(lambda: os.mkdir("made", dir_fd=fd)),
        op(lambda: os.rmdir("made", dir_fd=fd)),
        op(lambda: os.symlink("x", "s", dir_fd=fd)),
        op(lambda: os.unlink("s", dir_fd=fd)),
        op(lambda: os.mkfifo("p", dir_fd=fd)),
        op(lambda: os.unlink("p", dir_fd=fd)),
        op(lambda: os.link("f", "hard", src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False), {"EPERM"}, EXCHANGED),
        op(lambda: os.unlink("hard", dir_fd=fd), {"ENOENT"}),  # when it could not be linked
        op(lambda: os.rename("new", "renamed", src_dir_fd=fd, dst_dir_fd=fd)),
        op(lambda: os.rename("g", "h", src_dir_fd=fd, dst_dir_fd=fd), kinds, EXCHANGED),
        op(lambda: os.rename("h", "g", src_dir_fd=fd, dst_dir_fd=fd), kinds, EXCHANGED, {"ENOENT"}),
        op(lambda: os.unlink("renamed", dir_fd=fd)),
        op(lambda: os.chown("f", 5, 6, dir_fd=fd, follow_symlinks=False), EXCHANGED),
        op(lambda: os.utime("f", ns=(5, 6), dir_fd=fd, follow_symlinks=False), EXCHANGED),
        # xattr(7): user.* on regular files and directories only.
        op(lambda: on_path(getxattr, "f"), OPENED, {"ENODATA"}, EXCHANGED),
        op(lambda: on_path(lambda path: os.setxattr(path, "user.n", b"v"), "f"), OPENED, {"EPERM"}, EXCHANGED),
        op(lambda: on_path(lambda path: os.removexattr(path, "user.n"), "f"), OPENED, {"EPERM", "ENODATA"}, EXCHANGED),
        op(lambda: on_path(lambda path: os.chmod(path, 0o600), "f"), OPENED, EXCHANGED),
    ]


def attempt(op: Op) -> None:
    name = errno_of(op.call)
    assert name in ("", *op.allowed), f"{name}, allowed: {sorted(op.allowed)}, {inspect.getsource(op.call).strip()}"


@modes
@pytest.mark.parametrize("branch", ["top", "base"])
def test_directory_and_symlink(union: UnionFactory, tmp_path: Path, udba: str, branch: str) -> None:
    """`d` and `d/sub` of one branch are symlinks to the canary half of the time."""
    for layer in ("top", "base"):
        (tmp_path / layer / "d/sub").mkdir(parents=True)
        for directory in ("d", "d/sub"):
            for name in ("f", "g"):
                (tmp_path / layer / directory / name).write_text(layer)
                os.setxattr(tmp_path / layer / directory / name, "user.k", b"v")
    before = make_canary(tmp_path / "canary")
    root = tmp_path / branch
    (root / "swap").symlink_to(tmp_path / "canary")
    (root / "d/swap").symlink_to(tmp_path / "canary/sub")
    mount = union(None, udba, allow_log=OVERFLOW)
    calls = 0
    with swapping((root / "d", root / "swap"), (root / "d/sub", root / "d/swap")) as swaps:
        while calls < ROUNDS * 10 or swaps() < ROUNDS:
            opened: list[int] = []
            try:
                for path in ("d", "sub"):
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                    opened.append(
                        os.open(path, flags, dir_fd=opened[0]) if opened else os.open(mount.path / path, flags)
                    )
            except NotADirectoryError:
                pass  # at this moment: the symlink
            for fd in opened:
                for op in operations(fd):
                    attempt(op)
                    calls += 1
                os.close(fd)
            assert {"d"} <= set(os.listdir(mount.path))
            calls += 1
        assert facts(tmp_path / "canary") == before
    assert sorted(os.listdir(tmp_path / "canary")) == ["f", "g", "l", "sub"]
    assert sorted(os.listdir(tmp_path / "canary/sub")) == ["f", "g"]
    for name in ("f", "g", "sub/f", "sub/g"):
        assert (tmp_path / "canary" / name).read_bytes() == SECRET


@modes
@pytest.mark.parametrize("branch", ["top", "base"])
@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "device"])
def test_file_and_something_else(union: UnionFactory, tmp_path: Path, udba: str, branch: str, kind: str) -> None:
    """Files of one branch turn into other things: no hang, and never the canary's content."""
    for layer in ("top", "base"):
        (tmp_path / layer / "d").mkdir(parents=True)
    before = make_canary(tmp_path / "canary")
    root = tmp_path / branch / "d"
    for name in ("f", "g"):
        (root / name).write_text(branch)
        os.setxattr(root / name, "user.k", b"v")
        other = root / f".wh..wh.{name}"  # a name that the mount does not show
        if kind == "symlink":
            other.symlink_to(tmp_path / "canary" / name)
        elif kind == "fifo":
            os.mkfifo(other)
        elif kind == "directory":
            other.mkdir()
        else:
            os.mknod(other, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    mount = union(None, udba, allow_log=OVERFLOW)
    calls = 0
    fd = os.open(mount.path / "d", os.O_RDONLY)
    try:
        with swapping((root / "f", root / ".wh..wh.f"), (root / "g", root / ".wh..wh.g")) as swaps:
            while calls < ROUNDS * 5 or swaps() < ROUNDS:
                for op in operations(fd):
                    attempt(op)
                    calls += 1
                for name in ("f", "g", "h"):
                    if not os.path.lexists(root / name):
                        with suppress(OSError):  # the swapper or the mount was faster
                            (root / name).write_text(branch)
            assert facts(tmp_path / "canary") == before
    finally:
        os.close(fd)
    for name in ("f", "g"):
        assert (tmp_path / "canary" / name).read_bytes() == SECRET
    assert mount.control({"op": "stats"})["bugs"] == 0


# -- names that appear between the kernel's look and its CREATE ------------------------------------


def appear(path: Path) -> None:
    """In front of each name a program has just been told that it does not exist."""
    for name in ("file", "cut", "excl", "dir", "link", "dangling", "secret", "lower"):
        assert not (path / "mnt" / name).exists()
    for name in ("file", "cut", "excl", "secret", "target"):
        (path / "top" / name).write_text("direct")
        (path / "top" / name).chmod(0o666)
    (path / "top/secret").chmod(0o600)
    (path / "base/lower").write_text("direct")
    (path / "top/dir").mkdir()
    (path / "top/link").symlink_to("target")
    (path / "top/dangling").symlink_to("made")


@modes
def test_open_with_creat_opens_what_has_appeared(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """As open(2) says: EEXIST only with O_EXCL, otherwise what would be opened without O_CREAT, if the caller may."""
    (tmp_path / "top").mkdir()
    (tmp_path / "top").chmod(0o777)
    mount = union({"top": "rw", "base": "ro"}, udba)
    appear(tmp_path)

    def opens(name: str, flags: int = 0) -> str:
        return errno_of(lambda: os.close(os.open(mount.path / name, os.O_WRONLY | os.O_CREAT | flags)))

    assert (opens("excl", os.O_EXCL), opens("excl")) == ("EEXIST", "")
    assert (opens("file"), (mount["top"] / "file").read_text()) == ("", "direct")
    assert (opens("cut", os.O_TRUNC), (mount["top"] / "cut").read_text()) == ("", "")
    assert (opens("lower", os.O_TRUNC), (mount["top"] / "lower").read_text()) == ("", "")
    assert opens("dir") == "EISDIR"
    assert (opens("link", os.O_NOFOLLOW), opens("link"), (mount["top"] / "target").read_text()) == (
        "ELOOP",
        "",
        "direct",
    )
    assert (opens("dangling"), (mount["top"] / "made").read_text()) == ("", "")

    def as_alice(probe: Probe) -> None:
        probe.do(os.open, "secret", os.O_WRONLY | os.O_CREAT)

    assert run_as(Identity("alice", 1001, 1001), mount.path, as_alice)[0][1] == "EACCES"
