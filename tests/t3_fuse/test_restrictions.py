"""A union is mounted as strictly as the strictest of its branches: a stick makes nobody root in a live system."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.leaks import mount_on
from tests.helpers.mount import DEADLINE, Mount, UnionFactory
from tests.t3_fuse.live import errno_of, file_system

pytestmark = pytest.mark.fuse

ALL = {"nosuid", "nodev", "noexec"}


@pytest.fixture
def stick(tmp_path: Path) -> Iterator[Path]:
    """A file system mounted nosuid, nodev and noexec, with a program that is setuid root and a device in it."""
    with file_system(tmp_path / "stick", "tmpfs", "nosuid,nodev,noexec,mode=755") as place:
        shutil.copy("/usr/bin/id", place / "id")
        (place / "id").chmod(0o4755)
        os.mknod(place / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        yield place


def flags(mount: Mount) -> frozenset[str]:
    return mount_on(mount.path).options & ALL


def allowed(mount: Mount) -> set[str]:
    """What a user gets from the stick's objects, seen through the union."""
    found = set()
    command = ["setpriv", "--reuid", "65534", "--clear-groups", str(mount.path / "id"), "-u"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE)
    if done.returncode == 0:
        found |= {"exec", "suid"} if done.stdout == "0\n" else {"exec"}
    if errno_of(lambda: (mount.path / "null").write_bytes(b"")) == "":
        found.add("dev")
    return found


@pytest.mark.parametrize("udba", ["reval", "notify"])
def test_from_the_start(stick: Path, union: UnionFactory, udba: str) -> None:
    mount = union({"top": "rw", "stick": "ro"}, udba)
    assert flags(mount) == ALL
    assert allowed(mount) == set()
    notice = f"branch {stick}=ro is mounted nodev,noexec,nosuid, so the union is, too; dev,exec,suid in its options"
    assert notice in mount.log()


def test_unless_the_options_say_otherwise(stick: Path, union: UnionFactory) -> None:
    mount = union({"top": "rw", "stick": "ro"}, options="suid,exec")
    assert flags(mount) == {"nodev"}
    assert allowed(mount) == {"suid", "exec"}
    assert f"branch {stick}=ro is mounted nodev, so the union is, too; dev in its options" in mount.log()
    assert mount.control({"op": "remount", "options": "dev,nosuid"})["ok"]
    assert flags(mount) == {"nosuid"}
    assert allowed(mount) == {"exec", "dev"}


def test_a_branch_that_comes_and_goes(stick: Path, union: UnionFactory) -> None:
    """The union has become as strict before anything of the branch shows; without it, it stays so, and says that."""
    mount = union()
    assert flags(mount) == set()
    with (mount["base"] / "open").open("w"):
        opened = os.open(mount.path / "open", os.O_RDONLY)
        try:
            edits = [["append", f"{stick}=ro"], ["del", str(mount["base"])]]
            assert not mount.control({"op": "branches", "edits": edits})["ok"], "a branch in use cannot go"
        finally:
            os.close(opened)
    assert flags(mount) == set(), "nothing has changed"
    assert mount.control({"op": "branches", "edits": [["append", f"{stick}=ro"]]})["ok"]
    assert flags(mount) == ALL
    assert allowed(mount) == set()
    assert mount.control({"op": "branches", "edits": [["del", str(stick)]]})["ok"]
    assert flags(mount) == ALL
    assert "the union stays nodev,noexec,nosuid as a branch was that it no longer has" in mount.log()
    assert mount.control({"op": "remount", "options": "suid,dev,exec"})["ok"]
    assert flags(mount) == set()
    assert mount.control({"op": "branches", "edits": [["append", f"{stick}=ro"]]})["ok"]
    assert allowed(mount) == {"suid", "dev", "exec"}


@pytest.mark.parametrize("edge", ["native", "pyfuse3"])
def test_without_extended_attributes(union: UnionFactory, tmp_path: Path, edge: str) -> None:
    """The kernel does not ask for them, but through pyfuse3; a copy-up keeps what there is."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/file").write_text("lower")
    os.setxattr(tmp_path / "base/file", "user.word", b"kept")
    mount = union(options=f"noxattrs,edge={edge}")
    file = mount.path / "file"
    for call in (
        lambda: os.getxattr(file, "user.word"),
        lambda: os.setxattr(file, "user.word", b"other"),
        lambda: os.removexattr(file, "user.word"),
    ):
        assert errno_of(call) == "EOPNOTSUPP"
    assert errno_of(lambda: os.listxattr(file)) == "EOPNOTSUPP"
    before = mount.requests().get("getxattr", 0)
    assert errno_of(lambda: os.getxattr(file, "user.word")) == "EOPNOTSUPP"
    assert mount.requests().get("getxattr", 0) - before == (edge == "pyfuse3")
    with file.open("a") as stream:
        stream.write(" and upper")
    assert file.read_text() == "lower and upper"
    assert os.getxattr(mount["top"] / "file", "user.word") == b"kept"
