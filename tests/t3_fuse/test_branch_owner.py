"""A user who owns a directory of a branch, and what he gets through the mount for it: what SECURITY.md says, no more.

He may rename whatever lies in his directory, also what belongs to others, so the names in it can change between any
two requests of the kernel.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.helpers.posix import Identity, Probe, run_as
from tests.helpers.profile import scaled
from tests.t3_fuse.live import errno_of, modes
from tests.t3_fuse.test_races import OVERFLOW, swapping

pytestmark = pytest.mark.fuse

ALICE = Identity("alice", 1001, 1001)
BOB = Identity("bob", 1002, 1002)
SECRET = b"SECRET of root"
ROUNDS = scaled(100, 1000)
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 21, 0, 0, 0)
"""cap_sys_admin, effective (struct vfs_cap_data, linux/capability.h)"""


def own(path: Path, who: Identity, mode: int) -> Path:
    os.chown(path, who.uid, who.gid)
    path.chmod(mode)
    return path


def looked_at(path: Path) -> tuple[object, ...]:
    info = path.stat()
    return info.st_mode, info.st_uid, info.st_gid, path.read_bytes(), os.listxattr(path)


@modes
@pytest.mark.parametrize("branch", ["top", "base"])
def test_somebody_elses_file_in_its_place(union: UnionFactory, tmp_path: Path, udba: str, branch: str) -> None:
    """Alice's file and root's private one change places in her directory: hers is looked up, never root's is used."""
    directory = tmp_path / branch / "d"
    directory.mkdir(parents=True)
    own(directory, ALICE, 0o755)
    (directory / "f").write_bytes(b"alice")
    own(directory / "f", ALICE, 0o666)
    (directory / "s").write_bytes(SECRET)
    (directory / "s").chmod(0o600)
    before = looked_at(directory / "s")
    secret = os.open(directory / "s", os.O_RDONLY)
    mount = union(None, udba, allow_log=OVERFLOW)

    def attempts(probe: Probe) -> None:
        def read(name: str) -> None:
            fd = os.open(name, os.O_RDONLY)
            try:
                assert os.read(fd, 100) != SECRET, "read"
            finally:
                os.close(fd)

        def change(name: str, call: Callable[[int], object]) -> None:
            fd = os.open(name, os.O_RDWR)
            try:
                call(fd)
            finally:
                os.close(fd)

        calls: list[Callable[[str], object]] = [
            read,
            lambda name: change(name, lambda fd: os.write(fd, b"alice")),
            lambda name: change(name, lambda fd: os.fchmod(fd, 0o666)),
            lambda name: os.chmod(name, 0o666),
            lambda name: os.utime(name, (1, 1)),
            lambda name: os.setxattr(name, "user.k", b"v"),
            lambda name: os.truncate(name, 3),
            lambda name: os.chown(name, -1, ALICE.gid),
        ]
        for _ in range(ROUNDS):
            for name in ("f", "s"):
                for call in calls:
                    with suppress(OSError):  # whatever the answer is, root's file is not concerned
                        call(name)

    with swapping((directory / "f", directory / "s")) as swaps:
        run_as(ALICE, mount.path / "d", attempts)
        assert swaps() > 0
    path = Path(f"/proc/self/fd/{secret}")
    assert looked_at(path) == before
    os.close(secret)
    for copy in (tmp_path / "top/d").glob("*"):  # what was copied up has the owner and mode that it had below
        if copy.read_bytes() == SECRET:
            assert (copy.stat().st_uid, stat.S_IMODE(copy.stat().st_mode)) == (0, 0o600)


@modes
def test_a_private_directory_in_its_place(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Files that only the mode of their directory protects: not reached by way of another one that has had its name."""
    parent = tmp_path / "top/d"
    (parent / "open").mkdir(parents=True)
    own(parent, ALICE, 0o755)
    own(parent / "open", ALICE, 0o755)
    (parent / "open/f").write_bytes(b"alice")
    (parent / "private").mkdir(mode=0o700)
    (parent / "private/f").write_bytes(SECRET)
    mount = union(None, udba, allow_log=OVERFLOW)

    def attempts(probe: Probe) -> None:
        for _ in range(ROUNDS * 5):
            for name in ("open", "private"):
                with suppress(OSError):
                    fd = os.open(f"{name}/f", os.O_RDONLY)
                    try:
                        assert os.read(fd, 100) != SECRET
                    finally:
                        os.close(fd)

    with swapping((parent / "open", parent / "private")) as swaps:
        run_as(ALICE, mount.path / "d", attempts)
        assert swaps() > 0


@modes
def test_what_he_can_hide_and_show(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """In his part of an upper branch: hide what lower branches have, and show other content in its place."""
    for name in ("hidden", "replaced"):
        (tmp_path / "base/d").mkdir(parents=True, exist_ok=True)
        (tmp_path / "base/d" / name).write_text("root")
    (tmp_path / "base/untouched").write_text("root")
    (tmp_path / "top/d").mkdir(parents=True)
    own(tmp_path / "top/d", ALICE, 0o755)

    def plant(probe: Probe) -> None:
        Path(".wh.hidden").touch()
        Path("replaced").write_text("alice")

    run_as(ALICE, tmp_path / "top/d", plant)
    mount = union(None, udba)
    assert sorted(os.listdir(mount.path / "d")) == ["replaced"]
    assert (mount.path / "d/replaced").read_text() == "alice"
    assert (mount.path / "d/replaced").stat().st_uid == ALICE.uid
    assert (mount.path / "untouched").read_text() == "root"


@modes
def test_a_directory_above_decides_about_those_below(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """The top copy's mode counts; each file keeps its own."""
    (tmp_path / "base/d/private").mkdir(parents=True)
    (tmp_path / "base/d/private").chmod(0o700)
    (tmp_path / "base/d/private/readable").write_text("readable")
    (tmp_path / "base/d/private/secret").write_bytes(SECRET)
    (tmp_path / "base/d/private/secret").chmod(0o600)
    (tmp_path / "top/d").mkdir(parents=True)
    own(tmp_path / "top/d", ALICE, 0o755)
    run_as(ALICE, tmp_path / "top/d", lambda probe: os.mkdir("private", 0o755))
    mount = union(None, udba)

    def read(probe: Probe) -> None:
        assert Path("readable").read_text() == "readable"
        probe.do(os.open, "secret", os.O_RDONLY)

    assert run_as(ALICE, mount.path / "d/private", read) == [(f"open('secret', {os.O_RDONLY})", "EACCES")]


@modes
def test_setuid_is_his_own(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """What he makes setuid belongs to him in the union as well, and to whom it belonged after a copy-up."""
    (tmp_path / "base/d").mkdir(parents=True)
    own(tmp_path / "base/d", ALICE, 0o755)
    (tmp_path / "base/d/x").write_text("x")
    own(tmp_path / "base/d/x", ALICE, 0o4755)
    mount = union(None, udba)

    def change(probe: Probe) -> None:
        os.utime("x", (1, 1))
        probe.do(os.chown, "x", 0, 0)

    assert run_as(ALICE, mount.path / "d", change)[0][1] == "EPERM"
    for path in (mount.path / "d/x", tmp_path / "top/d/x"):
        assert (path.stat().st_uid, path.stat().st_mode & 0o7777) == (ALICE.uid, 0o4755)


@modes
def test_reserved_names_and_what_needs_privileges(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Through the mount, as somebody without privileges in a directory of his own."""
    (tmp_path / "top/d").mkdir(parents=True)
    own(tmp_path / "top/d", BOB, 0o755)
    mount = union(None, udba)

    def attempts(probe: Probe) -> None:
        Path("f").touch()
        for name in (".wh.f", ".wh..wh..opq", ".wh..wh.plnk", ".wh..wh.f.0123456789ab"):
            assert errno_of(partial(os.open, name, os.O_CREAT | os.O_WRONLY)) == "EPERM", name
            assert errno_of(partial(os.rename, "f", name)) == "EPERM", name
            assert errno_of(partial(os.mkdir, name)) == "EPERM", name
            assert errno_of(partial(os.stat, f"../{name}")) == "EPERM", name
        for key in ("trusted.k", "security.k", "security.capability"):
            assert errno_of(partial(os.setxattr, "f", key, CAPABILITY)) == "EPERM", key
        assert errno_of(lambda: os.setxattr("f", "system.nfs4_acl", b"v")) == "EOPNOTSUPP"
        assert errno_of(lambda: os.mknod("zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))) == "EPERM"
        assert errno_of(lambda: os.chown("f", 0, -1)) == "EPERM"

    run_as(BOB, mount.path / "d", attempts)
    assert mount.control({"op": "stats"})["bugs"] == 0


@modes
def test_a_name_writes_no_lines_into_the_log(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    name = "f\nudbad: ERROR: all is lost \x1b[2J"
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / name).touch()
    (tmp_path / "top" / f".wh.{name}").touch()
    mount = union(None, udba, allow_log="and its whiteout are both in branch")
    assert name in os.listdir(mount.path)
    (line,) = (line for line in mount.log().splitlines() if "all is lost" in line)
    assert "whiteout" in line
    assert "\x1b" not in line
