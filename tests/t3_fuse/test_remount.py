"""`-o remount,ro`, `rw` and the other flags of mount(2): the kernel, the union and the branches change together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.leaks import mount_on, read_mountinfo
from tests.helpers.mount import Mount, UnionFactory, mounted
from tests.t3_fuse.live import errno_of, modes, opened

pytestmark = pytest.mark.fuse

MARK = ".wh..wh.udbad"


def remount(mount: Mount, options: str) -> dict[str, Any]:
    return mount.control({"op": "remount", "options": options})


def flags(mount: Mount) -> set[str]:
    """Those of the mount and of the superblock."""
    found = mount_on(mount.path)
    return {*found.options, *(f"sb:{word}" for word in found.super_options)}


def is_writable(mount: Mount, on: bool) -> None:
    """All at once: what the kernel lets through, what the mount does, and the mark on the branch."""
    assert {"rw" if on else "ro", "sb:rw" if on else "sb:ro"} <= flags(mount)
    assert errno_of(lambda: (mount.path / "new").touch()) == ("" if on else "EROFS")
    assert (mount.branches[0] / MARK).exists() == on


@contextmanager
def taken(mount: Mount, place: Path) -> Iterator[None]:
    """Another mount writes to the top branch."""
    with mounted([f"{mount['top']}=rw"], place) as other:
        (other.path / "theirs").write_text("theirs")
        yield


@modes
def test_ro_and_back(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    mount = union({"top": "rw", "base": "ro"}, udba)
    (mount["base"] / "lower").write_text("lower")
    reading = os.open(mount.path / "lower", os.O_RDONLY)
    is_writable(mount, True)
    assert remount(mount, "ro")["applied"] == ["ro"]
    is_writable(mount, False)
    assert os.read(reading, 10) == b"lower"
    with taken(mount, tmp_path / "other"):
        answer = remount(mount, "rw")
        assert not answer["ok"]
        assert "is written to by another mount" in answer["error"]
        assert {"ro", "sb:ro"} <= flags(mount)
        assert errno_of((mount.path / "new").touch) == "EROFS"
    assert remount(mount, "rw,noatime")["applied"] == ["kernel_flags", "ro"]
    is_writable(mount, True)
    (mount.path / "lower").write_text("changed")
    assert (mount["top"] / "lower").read_text() == "changed"
    assert (mount.path / "theirs").read_text() == "theirs"
    os.close(reading)


@modes
def test_ro_while_somebody_may_write(union: UnionFactory, udba: str) -> None:
    """EBUSY as natively (sb_prepare_remount_readonly), and nothing has changed."""
    mount = union({"top": "rw", "base": "ro"}, udba)
    (mount["base"] / "lower").write_text("lower")
    removed = os.open(mount.path / "removed", os.O_RDONLY | os.O_CREAT)
    os.unlink(mount.path / "removed")
    answer = remount(mount, "ro,udba=none,dirwh=7")
    assert (answer["ok"], answer["error"]) == (
        False, f"{mount.path} is busy: open file (removed) of process {os.getpid()}",
    )  # fmt: skip
    os.close(removed)
    with opened(mount.path / "lower", os.O_WRONLY) as fd:
        answer = remount(mount, "ro,udba=none,dirwh=7")
        assert (answer["ok"], answer["error"]) == (
            False, f"{mount.path} is busy: open file /lower of process {os.getpid()}",
        )  # fmt: skip
        assert mount.control({"op": "status"})["udba"] == udba
        is_writable(mount, True)
        os.write(fd, b"W")
    assert remount(mount, "ro")["ok"], "the close was enough"
    is_writable(mount, False)
    assert (mount["top"] / "lower").read_text() == "Wower"


@pytest.mark.parametrize("permission", ["", "=rw"])
def test_mounted_ro(tmp_path: Path, permission: str) -> None:
    """The superblock was made read-only then; a top branch without a permission was taken as ro."""
    top, base = tmp_path / "top", tmp_path / "base"
    top.mkdir()
    base.mkdir()
    (base / "lower").write_text("lower")
    with mounted([f"{top}{permission}", f"{base}=ro"], tmp_path / "mnt", "notify", "ro") as mount:
        is_writable(mount, False)
        assert os.listdir(top) == [], "nothing is ever written to it"
        # Not possible: all of it stays as it is.
        (top / ".wh..wh.orph").write_text("")
        answer = remount(mount, "rw")
        assert (answer["ok"], ".wh..wh.orph" in answer["error"]) == (False, True), answer
        assert {"ro", "sb:ro"} <= flags(mount)
        assert errno_of((mount.path / "new").touch) == "EROFS"
        (top / ".wh..wh.orph").unlink()
        assert remount(mount, "rw")["ok"]
        is_writable(mount, True)
        (mount.path / "lower").write_text("changed")
        assert (top / "lower").read_text() == "changed"
        (mount.path / "new").unlink()
        (mount.path / "lower").unlink()
        assert remount(mount, "ro")["ok"]
        is_writable(mount, False)
        assert os.listdir(mount.path) == []


def test_other_flags(union: UnionFactory) -> None:
    mount = union(None, "notify", "nosuid,noatime")
    assert {"nosuid", "noatime"} <= flags(mount)
    assert remount(mount, "suid,nodev,noexec,relatime,sync,nodiratime")["applied"] == ["kernel_flags"]
    assert flags(mount) & {"nosuid", "noatime", "nodev", "noexec", "relatime", "sb:sync", "nodiratime"} == {
        *("nodev", "noexec", "relatime", "sb:sync", "nodiratime"),
    }
    assert remount(mount, "dev,exec,async,diratime,ro")["applied"] == ["kernel_flags", "ro"]
    assert flags(mount) & {"nodev", "noexec", "nodiratime", "ro", "sb:sync", "relatime"} == {"ro", "relatime"}
    answer = remount(mount, "rw,dirsync")
    assert (answer["ok"], answer["error"]) == (
        False, "dirsync cannot change while mounted: umount, and mount again",
    )  # fmt: skip
    assert remount(mount, "rw")["ok"]
    assert any(one.path == mount.path for one in read_mountinfo())
    is_writable(mount, True)
