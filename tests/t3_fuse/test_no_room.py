"""No room for a copy-up or a new name: space, inodes, quota, file descriptors, extended attributes.

The caller gets that errno, the lower file stays untouched and visible, no temporary name is left, and the same
operation works once the cause is gone.
"""

from __future__ import annotations

import functools
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.merge import diff, snapshot
from tests.helpers.mount import Mount, UnionFactory, mounted
from tests.t3_fuse.live import debris, errno_of, file_system, lower, modes, names, opened

pytestmark = pytest.mark.fuse


@dataclass(frozen=True)
class Small:
    """A union whose top is full but for a few kilobytes; `room` makes room, `lower` is what must not change."""

    mount: Mount
    top: Path
    base: Path

    def room(self) -> None:
        (self.top / "filler").unlink()


SMALL_OPERATIONS: dict[str, Callable[[Path], object]] = {
    "write": lambda root: _write(root / "d/f", os.O_WRONLY),
    "append": lambda root: _write(root / "d/f", os.O_WRONLY | os.O_APPEND),
    "chmod": lambda root: (root / "d/f").chmod(0o600),
    "setxattr": lambda root: os.setxattr(root / "d/f", "user.k", b"v"),
    "truncate": lambda root: os.truncate(root / "d/f", 3 << 20),
    "rename": lambda root: (root / "d/f").rename(root / "d/g"),
    "link": lambda root: os.link(root / "d/f", root / "d/g"),
}


def _write(path: Path, flags: int) -> None:
    with opened(path, flags) as fd:
        os.write(fd, b"x")


@contextmanager
def union_above(top: Path, tmp_path: Path, udba: str, options: str = "") -> Iterator[Small]:
    """A union of `top` and a base with one file of 4 MiB, owned by user 1001."""
    path = lower(tmp_path, os.urandom(4 << 20))
    os.chown(path, 1001, 1001)
    with mounted([f"{top}=rw", f"{tmp_path}/base=ro"], tmp_path / "mnt", udba, options) as mount:
        yield Small(mount, top, tmp_path / "base")


@contextmanager
def small_union(tmp_path: Path, udba: str, options: str, top_options: str = "size=2m") -> Iterator[Small]:
    with (
        file_system(tmp_path / "top", "tmpfs", top_options) as top,
        union_above(top, tmp_path, udba, options) as small,
    ):
        yield small


@contextmanager
def limited_subvolume(tmp_path: Path) -> Iterator[Path]:
    """A directory that may hold one mebibyte: quota groups of btrfs need nothing of the kernel's quota support."""
    with file_system(tmp_path / "pool", "btrfs") as pool:
        top = pool / "top"
        for words in (("quota", "enable", pool), ("subvolume", "create", top), ("qgroup", "limit", "1M", top)):
            subprocess.run(["btrfs", *words], check=True, capture_output=True, timeout=60)
        yield top


def check_failure(small: Small, operation: str, expected: str) -> None:
    """It fails with this errno, and nothing is changed or left."""
    before, visible = snapshot(small.base), snapshot(small.mount.path / "d")
    assert errno_of(lambda: SMALL_OPERATIONS[operation](small.mount.path)) == expected
    assert debris(small.top) == []
    assert diff(before, snapshot(small.base)) == []
    assert diff(visible, snapshot(small.mount.path / "d")) == []
    if (small.top / "d").exists():
        assert names(small.top / "d") == []


@modes
@pytest.mark.parametrize("operation", SMALL_OPERATIONS)
def test_no_space(tmp_path: Path, udba: str, operation: str) -> None:
    with small_union(tmp_path, udba, "") as small:
        check_failure(small, operation, "ENOSPC")
        subprocess.run(["mount", "-o", "remount,size=16m", str(small.top)], check=True, timeout=20)
        SMALL_OPERATIONS[operation](small.mount.path)
        assert debris(small.top) == []
        name = "g" if operation in ("rename", "link") else "f"
        assert (small.top / "d" / name).stat().st_size >= 3 << 20


@modes
@pytest.mark.parametrize("operation", ["write", "chmod", "rename"])
def test_no_inodes(tmp_path: Path, udba: str, operation: str) -> None:
    with small_union(tmp_path, udba, "", "size=64m,nr_inodes=20") as small:
        filler = []
        while errno_of(lambda: filler.append(os.open(small.top, os.O_TMPFILE | os.O_RDWR))) == "":
            pass
        try:
            check_failure(small, operation, "ENOSPC")
        finally:
            for fd in filler:
                os.close(fd)
        SMALL_OPERATIONS[operation](small.mount.path)
        assert debris(small.top) == []


@modes
@pytest.mark.parametrize("operation", ["write", "rename", "link"])
def test_quota(tmp_path: Path, udba: str, operation: str) -> None:
    with limited_subvolume(tmp_path) as top, union_above(top, tmp_path, udba) as small:
        check_failure(small, operation, "EDQUOT")
        os.truncate(small.mount.path / "d/f", 1000)
        SMALL_OPERATIONS[operation](small.mount.path)
        assert debris(small.top) == []


@modes
def test_write_beyond_the_quota(tmp_path: Path, udba: str) -> None:
    """By a process that is not root."""
    with limited_subvolume(tmp_path) as top, union_above(top, tmp_path, udba) as small:
        top.chmod(0o777)
        child = os.fork()
        if child == 0:
            try:
                os.setgid(1001)
                os.setuid(1001)
                fd = os.open(small.mount.path / "f", os.O_CREAT | os.O_WRONLY, 0o600)
                done = errno_of(lambda: [os.write(fd, bytes(100_000)) for _ in range(20)])
                os._exit(0 if done == "EDQUOT" else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert (top / "f").stat().st_size <= 1 << 20


@contextmanager
def few_descriptors(mount: Mount, more: int) -> Iterator[None]:
    """Let the daemon open only `more` further descriptors (RLIMIT_NOFILE counts numbers, so the gaps are counted)."""
    pid = mount.process.pid
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    limit = 0
    while more >= 0:
        more -= limit not in used
        limit += more >= 0
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


DESCRIPTOR_OPERATIONS: dict[str, Callable[[Path], object]] = {
    **SMALL_OPERATIONS,
    "create": lambda root: os.close(os.open(root / "d/new", os.O_CREAT | os.O_WRONLY)),
    "mkdir": lambda root: (root / "d/new").mkdir(),
    "symlink": lambda root: (root / "d/new").symlink_to("x"),
    "mknod": lambda root: os.mkfifo(root / "d/new"),
    "unlink": lambda root: (root / "d/f").unlink(),
    "rmdir": lambda root: (root / "e").rmdir(),
    "rename-dir": lambda root: (root / "e").rename(root / "n"),
    "read": lambda root: (root / "d/f").read_bytes(),
    "list": lambda root: os.listdir(root / "d"),
}


@modes
@pytest.mark.parametrize("operation", DESCRIPTOR_OPERATIONS)
def test_out_of_descriptors(union: UnionFactory, tmp_path: Path, udba: str, operation: str) -> None:
    """With one more descriptor at a time: EMFILE and nothing changed, until it works; then it works as ever."""
    lower(tmp_path, os.urandom(1 << 20))
    (tmp_path / "base/e").mkdir()
    before = snapshot(tmp_path / "base")
    mount = union(None, udba)
    mount.control({"op": "stats"})  # what begins beside requests has its descriptors
    act = DESCRIPTOR_OPERATIONS[operation]
    failures = 0
    for more in range(40):
        visible = snapshot(mount.path)
        with few_descriptors(mount, more):
            failed = errno_of(functools.partial(act, mount.path))
        assert failed in ("", "EMFILE"), (more, failed)
        assert debris(mount["top"]) == [], more
        if not failed:
            break
        failures += 1
        assert diff(visible, snapshot(mount.path)) == [], more
    else:
        raise AssertionError("40 descriptors are not enough")
    assert diff(before, snapshot(tmp_path / "base")) == []
    assert mount.control({"op": "stats"})["bugs"] == 0
    assert failures > 0 or operation not in SMALL_OPERATIONS, "a copy-up needs descriptors"


@modes
@pytest.mark.parametrize("key", ["user.note", "trusted.t"])
def test_target_without_room_for_an_xattr(tmp_path: Path, udba: str, key: str) -> None:
    """ext4 without ea_inode has one block for all of them; tmpfs below holds more of trusted.*, XFS of both."""
    with file_system(tmp_path / "base", "xfs") as base, file_system(tmp_path / "top", "ext4", megabytes=64) as top:
        (base / "f").write_bytes(b"content")
        os.setxattr(base / "f", key, bytes(60_000))
        before = snapshot(base)
        with mounted([f"{top}=rw", f"{base}=ro"], tmp_path / "mnt", udba) as mount:
            present = [name for name in names(top) if name != "lost+found"]
            assert errno_of(lambda: _write(mount.path / "f", os.O_WRONLY)) in ("ENOSPC", "E2BIG", "ERANGE")
            assert [name for name in names(top) if name != "lost+found"] == present
            assert debris(top) == []
            assert diff(before, snapshot(base)) == []
            assert (mount.path / "f").read_bytes() == b"content"
            os.removexattr(base / "f", key)
            mount.control({"op": "flush"})
            _write(mount.path / "f", os.O_WRONLY)
            assert (top / "f").read_bytes() == b"xontent"


@modes
def test_xattr_refused_by_the_target(tmp_path: Path, udba: str) -> None:
    """ramfs has no xattrs of users: EOPNOTSUPP, unless the branch forgives it with +icex."""
    path = lower(tmp_path)
    os.setxattr(path, "user.note", b"x")
    before = snapshot(tmp_path / "base")
    (tmp_path / "top").mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", f"{tmp_path}/top"], check=True, timeout=20)
    try:
        for permission, expected in (("rw", "EOPNOTSUPP"), ("rw+icexsec", "EOPNOTSUPP"), ("rw+icexusr", "")):
            with mounted([f"{tmp_path}/top={permission}", f"{tmp_path}/base=ro"], tmp_path / "mnt", udba) as mount:
                assert errno_of(lambda: _write(mount.path / "d/f", os.O_WRONLY)) == expected
                assert (mount.path / "d/f").read_bytes() == (b"x" if not expected else b"0") + b"123456789abcdef"
                assert debris(tmp_path / "top") == []
        assert diff(before, snapshot(tmp_path / "base")) == []
    finally:
        subprocess.run(["umount", "-l", f"{tmp_path}/top"], check=True, timeout=20)


# -- no room for names --------------------------------------------------------------------------

NAMES: dict[str, Callable[[Path], object]] = {
    "create": lambda root: os.close(os.open(root / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
    "mkdir": lambda root: (root / "new").mkdir(),
    "symlink": lambda root: (root / "new").symlink_to("x" * 100),
    "mknod": lambda root: os.mkfifo(root / "new"),
    "create-over-whiteout": lambda root: (root / "gone").write_bytes(b""),
    "mkdir-over-whiteout": lambda root: (root / "gonedir").mkdir(),
    "create-in-lower-directory": lambda root: os.mkfifo(root / "d/new"),
    "unlink-lower": lambda root: (root / "d/f").unlink(),
    "rmdir-lower": lambda root: (root / "e").rmdir(),
    "rename-lower": lambda root: (root / "h").rename(root / "i"),
    "rename-lower-dir": lambda root: (root / "e").rename(root / "n"),
}


@modes
@pytest.mark.parametrize("whiteouts", ["rw", "rw+nolwh"])
@pytest.mark.parametrize("operation", NAMES)
def test_no_inodes_for_names(tmp_path: Path, udba: str, operation: str, whiteouts: str) -> None:
    """From no free inode upwards, one more each time: ENOSPC and no change, until it works."""
    lower(tmp_path, b"")
    for name in ("e", "gonedir", "gonedir/sub"):
        (tmp_path / "base" / name).mkdir()
    for name in ("gone", "h"):
        (tmp_path / "base" / name).write_text(name)
    before = snapshot(tmp_path / "base")
    with file_system(tmp_path / "top", "tmpfs", "size=16m,nr_inodes=40") as top:
        for name in (".wh.gone", ".wh.gonedir"):
            (top / name).touch()
        with mounted([f"{top}={whiteouts}", f"{tmp_path}/base=ro"], tmp_path / "mnt", udba) as mount:
            visible = snapshot(mount.path)
            filler: list[int] = []
            try:
                while errno_of(lambda: filler.append(os.open(top, os.O_TMPFILE | os.O_RDWR))) == "":
                    pass
                while failed := errno_of(lambda: NAMES[operation](mount.path)):
                    assert failed == "ENOSPC"
                    assert debris(top) == []
                    assert diff(visible, snapshot(mount.path)) == []
                    os.close(filler.pop())
            finally:
                for fd in filler:
                    os.close(fd)
            assert debris(top) == []
            assert diff(visible, snapshot(mount.path)) != []
            if operation == "mkdir-over-whiteout":
                assert os.listdir(mount.path / "gonedir") == []
        assert diff(before, snapshot(tmp_path / "base")) == []
