"""Owners that are shown as others: uidmapping=, squash_to_uid=, idmapped mounts; and volatile."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.helpers.mount import Mount, UnionFactory
from tests.t3_fuse.live import errno_of, modes
from udbad.branch import syscalls

pytestmark = pytest.mark.fuse

MAPPED: Final = "uidmapping=0:100000:1000:5000:5000:1,gidmapping=0:200000:1000"
_MOUNT_ATTR_IDMAP: Final = 0x100000


def owner(path: Path) -> tuple[int, int]:
    st = path.lstat()
    return st.st_uid, st.st_gid


def as_user(uid: int, gid: int, *command: str) -> str:
    done = subprocess.run(
        ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", *command],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stderr


def filled(low: Path) -> None:
    (low / "dir").mkdir(parents=True)
    for name, uid in (("root", 0), ("one", 1), ("other", 2000), ("same", 5000)):
        (low / name).write_text(name)
        os.chown(low / name, uid, uid)
    os.chmod(low / "dir", 0o777)
    subprocess.run(["setfacl", "-m", "u:7:rwx,g:8:r", low / "one"], check=True)


@modes
def test_mapping(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    filled(tmp_path / "low")
    mount = union({"top": "rw", "low": "ro"}, udba, MAPPED)
    assert {entry.name: (entry.stat().st_uid, entry.stat().st_gid) for entry in os.scandir(mount.path)} == {
        "dir": (100000, 200000),
        "root": (100000, 200000),
        "one": (100001, 200001),
        "other": (65534, 65534),
        "same": (5000, 65534),
    }
    acl = subprocess.run(["getfacl", "-cn", mount.path / "one"], check=True, capture_output=True, text=True).stdout
    assert "user:100007:rwx" in acl
    assert "group:200008:r--" in acl

    for words in (["touch", "file"], ["mkdir", "sub"], ["ln", "-s", "x", "link"], ["mkfifo", "fifo"]):
        path = mount.path / "dir" / words[-1]
        assert as_user(100003, 200004, *words[:-1], str(path)) == ""
        assert owner(path) == (100003, 200004)
        assert owner(mount["top"] / "dir" / words[-1]) == (3, 4)
        assert "too large" in as_user(0, 0, *words[:-1], f"{path}2")  # who has no id here
        assert not (mount.path / "dir" / f"{words[-1]}2").exists()

    os.chown(mount.path / "one", 100009, 200010)
    assert (owner(mount["top"] / "one"), owner(mount.path / "one")) == ((9, 10), (100009, 200010))
    assert errno_of(lambda: os.chown(mount.path / "one", 9, -1)) == "EINVAL"
    subprocess.run(["setfacl", "-m", "u:100011:r", mount.path / "one"], check=True)
    acl = subprocess.run(["getfacl", "-cn", mount["top"] / "one"], check=True, capture_output=True, text=True).stdout
    assert "user:11:r--" in acl
    assert as_user(100007, 200000, "test", "-w", str(mount.path / "one")) == ""


def test_squashing(union: UnionFactory, tmp_path: Path) -> None:
    filled(tmp_path / "low")
    mount = union({"top": "rw", "low": "ro"}, "none", "squash_to_uid=7,squash_to_gid=8")
    assert {owner(path) for path in mount.path.iterdir()} == {(7, 8)}
    os.chown(mount.path / "one", 5, 6)
    assert (owner(mount["top"] / "one"), owner(mount.path / "one")) == ((5, 6), (7, 8))
    assert as_user(7, 8, "touch", str(mount.path / "dir" / "mine")) == ""
    assert owner(mount["top"] / "dir" / "mine") == (7, 8)


class _Attributes(ctypes.Structure):
    """struct mount_attr, linux/mount.h."""

    _fields_ = (("on", ctypes.c_uint64), ("off", ctypes.c_uint64), ("propagation", ctypes.c_uint64),
                ("userns", ctypes.c_uint64))  # fmt: skip


@contextmanager
def idmapped(path: Path) -> Iterator[Path]:
    """A mount of the same file system whose users 0 to 999 are shown as 100000 and so on."""
    holder = subprocess.Popen(["unshare", "-U", "sleep", "infinity"])
    mount_fd = -1
    try:
        own = os.readlink("/proc/self/ns/user")
        while os.readlink(f"/proc/{holder.pid}/ns/user") == own:
            assert holder.poll() is None
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{holder.pid}/{name}").write_text("0 100000 1000")
        mount_fd = syscalls.clone_mount(os.fsencode(path))
        with open(f"/proc/{holder.pid}/ns/user") as userns:
            attributes = _Attributes(_MOUNT_ATTR_IDMAP, 0, 0, userns.fileno())
            libc = ctypes.CDLL(None, use_errno=True)
            done = libc.syscall(442, mount_fd, b"", 0x1000, ctypes.byref(attributes), ctypes.c_size_t(32))
            assert done == 0, os.strerror(ctypes.get_errno())
        yield Path(f"/proc/self/fd/{mount_fd}")
    finally:
        if mount_fd >= 0:
            os.close(mount_fd)
        holder.kill()
        holder.wait()


def idmapped_union(union: UnionFactory, tmp_path: Path) -> Mount:
    filled(tmp_path / "low")
    return union({"top": "rw", "low": "ro"}, "none", "allow_idmap")


def test_idmapped_mount(union: UnionFactory, tmp_path: Path) -> None:
    mount = idmapped_union(union, tmp_path)
    with idmapped(mount.path) as other:
        assert owner(other / "one") == (100001, 100001)
        assert owner(mount.path / "one") == (1, 1)
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(100004)
                os.setuid(100003)
                os.close(os.open(other / "dir" / "file", os.O_CREAT | os.O_WRONLY))
                os.mkdir(other / "dir" / "sub")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        for name in ("file", "sub"):
            assert owner(other / "dir" / name) == (100003, 100004)
            assert owner(mount["top"] / "dir" / name) == (3, 4)
        os.chown(other / "root", 100005, 100006)
        assert owner(mount["top"] / "root") == (5, 6)
        assert errno_of(lambda: os.mkdir(other / "dir" / "new")) == "EOVERFLOW"
        with open(other / "one", "a") as file:
            file.write(" and more")
        assert (mount["top"] / "one").read_text() == "one and more"


def test_without_the_option_there_are_no_idmapped_mounts(union: UnionFactory, tmp_path: Path) -> None:
    filled(tmp_path / "low")
    mount = union({"top": "rw", "low": "ro"}, "none")
    with pytest.raises(AssertionError, match="Invalid argument"), idmapped(mount.path):
        pass


def test_volatile(union: UnionFactory, tmp_path: Path) -> None:
    """The kernel asks for it once, and never again."""
    filled(tmp_path / "low")
    mount = union({"top": "rw", "low": "ro"}, "none", "volatile")
    for name in ("root", "one"):
        with open(mount.path / name, "a") as file:
            os.fsync(file.fileno())
    assert mount.requests().get("fsync", 0) == 0
