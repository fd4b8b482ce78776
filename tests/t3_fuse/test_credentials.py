"""New objects are never on a branch, even for a moment, with an owner or a mode wider than asked for.

A process looks at the branch directory all the time, while unprivileged users create through the mount, and
notes every (owner, group, mode) that any name ever had.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.helpers.profile import scaled
from tests.t3_fuse.live import modes

pytestmark = pytest.mark.fuse

ALICE, TEAM = 1001, 2000
OBJECTS = scaled(100, 300)
"""Of each kind. The first ones count most: the more names there are, the longer looking at all of them takes."""

Seen = set[tuple[bytes, int, int, int]]
"""(kind of name, uid, gid, mode with its type)"""


@contextmanager
def watching(directory: Path) -> Iterator[Callable[[], Seen]]:
    """Look at all names of `directory` again and again in another process; the callable ends that and gives the result.

    Names are reported without their digits.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            stop: list[int] = []
            signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
            seen: Seen = set()
            fd = os.open(directory, os.O_RDONLY)
            while not stop:
                for name in os.listdir(fd):
                    with suppress(FileNotFoundError):
                        info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                        kind = os.fsencode(name.rstrip("0123456789"))
                        if name.startswith(".wh..wh."):
                            kind = b"temporary"
                        seen.add((kind, info.st_uid, info.st_gid, info.st_mode))
            with os.fdopen(theirs, "wb") as stream:
                pickle.dump(seen, stream)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(theirs)
    ended = False

    def result() -> Seen:
        nonlocal ended
        os.kill(child, signal.SIGTERM)
        with os.fdopen(os.dup(ours), "rb") as stream:
            seen: Seen = pickle.load(stream)
        os.waitpid(child, 0)
        ended = True
        return seen

    try:
        yield result
    finally:
        os.close(ours)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def as_alice(work: Callable[[], None], umask: int) -> None:
    """Run `work` in a child that is alice, a member of no other group."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(ALICE, ALICE, ALICE)
            os.setresuid(ALICE, ALICE, ALICE)
            os.umask(umask)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def bind(path: Path) -> None:
    # A socket's path has at most 107 bytes, unix(7): relative to the current directory.
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


def make(directory: Path, number: int) -> None:
    """One object of every kind, with the modes of private things."""
    os.close(os.open(directory / f"secret{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    os.close(os.open(directory / f"masked{number}", os.O_CREAT | os.O_WRONLY, 0o666))
    os.mkdir(directory / f"dir{number}", 0o700)
    os.mkfifo(directory / f"fifo{number}", 0o600)
    os.symlink("x", directory / f"link{number}")
    bind(directory / f"socket{number}")


def make_all(directory: Path) -> None:
    for number in range(OBJECTS):
        make(directory, number)


EXPECTED = {
    (b"secret", stat.S_IFREG | 0o600),
    (b"masked", stat.S_IFREG | 0o640),
    (b"dir", stat.S_IFDIR | 0o700),
    (b"fifo", stat.S_IFIFO | 0o600),
    (b"link", stat.S_IFLNK | 0o777),
    (b"socket", stat.S_IFSOCK | 0o750),
}


@modes
@pytest.mark.parametrize("group", ["own", "directory"])
def test_created_objects(union: UnionFactory, tmp_path: Path, udba: str, group: str) -> None:
    """The owner is alice from the first moment, the group alice's or that of the setgid directory."""
    mount = union(None, udba)
    (mount.path / "d").mkdir()
    os.chown(mount.path / "d", 0, TEAM)
    (mount.path / "d").chmod(0o2777 if group == "directory" else 0o777)
    expected_gid = TEAM if group == "directory" else ALICE
    with watching(mount["top"] / "d") as result:
        as_alice(lambda: make_all(mount.path / "d"), 0o027)
        seen = result()
    modes_seen = {
        (kind, mode & ~stat.S_ISGID if group == "directory" and stat.S_ISDIR(mode) else mode)
        for kind, _, _, mode in seen
    }
    assert modes_seen == EXPECTED
    assert {(uid, gid) for _, uid, gid, _ in seen} == {(ALICE, expected_gid)}


@modes
def test_objects_under_a_default_acl(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """The umask counts only without a default ACL; with one, its mask limits from the first moment."""
    mount = union(None, udba)
    (mount.path / "d").mkdir()
    (mount.path / "d").chmod(0o777)
    acl = bytes.fromhex("02000000") + b"".join(
        tag.to_bytes(2, "little") + perm.to_bytes(2, "little") + who.to_bytes(4, "little")
        for tag, perm, who in (
            (1, 7, 0xFFFFFFFF),
            (2, 4, 1002),
            (4, 4, 0xFFFFFFFF),
            (16, 4, 0xFFFFFFFF),
            (32, 0, 0xFFFFFFFF),
        )
    )  # user::rwx user:1002:r-- group::r-- mask::r-- other::---
    os.setxattr(mount.path / "d", "system.posix_acl_default", acl)
    with watching(mount["top"] / "d") as result:
        as_alice(lambda: make_all(mount.path / "d"), 0)
        seen = result()
    assert {uid for _, uid, _, _ in seen} == {ALICE}
    for kind, _, _, mode in seen:
        if kind != b"link":
            assert not mode & 0o037, (kind, oct(mode))


@modes
@pytest.mark.parametrize("size", [10, 1 << 20])
def test_copies_of_private_files(union: UnionFactory, tmp_path: Path, udba: str, size: int) -> None:
    """A copy-up, its temporary name included, never shows more than the file allowed, nor directories on the way."""
    count = 60
    (tmp_path / "base/d").mkdir(parents=True)
    (tmp_path / "top/d").mkdir(parents=True)
    for layer in ("top", "base"):
        (tmp_path / layer / "d").chmod(0o777)
    for i in range(count):
        path = tmp_path / "base/d" / f"f{i}"
        path.write_bytes(bytes(size))
        os.chown(path, ALICE, ALICE)
        path.chmod(0o600)
        directory = tmp_path / "base/d" / f"dir{i}"
        directory.mkdir()
        os.chown(directory, ALICE, ALICE)
        directory.chmod(0o700)
    mount = union(None, udba)

    def work() -> None:
        for i in range(count):
            with (mount.path / f"d/f{i}").open("r+b") as stream:
                stream.write(b"x")
            (mount.path / f"d/dir{i}/new").touch()

    with watching(tmp_path / "top/d") as result:
        as_alice(work, 0)
        seen = result()
    wide = [entry for entry in seen if entry[3] & 0o077]
    assert wide == []
    assert {(uid, gid) for _, uid, gid, _ in seen} <= {(ALICE, ALICE), (0, 0), (ALICE, 0), (0, ALICE)}
    assert {(kind, uid, gid) for kind, uid, gid, _ in seen if kind != b"temporary"} == {
        (b"f", ALICE, ALICE),
        (b"dir", ALICE, ALICE),
    }
    assert all(stat.S_IMODE(entry[3]) & 0o6000 == 0 for entry in seen)


@modes
def test_copies_of_privileged_files(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """A set-user-ID copy never belongs to somebody else with that bit set."""
    count = 60
    (tmp_path / "base").mkdir()
    for i in range(count):
        path = tmp_path / "base" / f"f{i}"
        path.write_bytes(bytes(1 << 17))
        os.chown(path, ALICE, TEAM)
        path.chmod(0o6755)
    mount = union(None, udba)
    with watching(tmp_path / "top") as result:
        for i in range(count):
            os.utime(mount.path / f"f{i}")
        seen = result()
    privileged = {(uid, gid) for _, uid, gid, mode in seen if mode & 0o6000}
    assert privileged == {(ALICE, TEAM)}
    assert {mode for kind, _, _, mode in seen if kind == b"f"} == {stat.S_IFREG | 0o6755}
