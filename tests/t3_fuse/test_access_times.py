"""Access times: of branches that are not written to they stay, of others they follow the mount options."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory
from tests.t3_fuse.live import PAST, errno_of, modes

pytestmark = pytest.mark.fuse

NAMES = ("f", "d", "d/g", "link")


def fill(tmp_path: Path) -> None:
    """Everything was read last before it was changed, so that relatime, too, has a read change that."""
    for branch in ("top", "base"):
        root = tmp_path / branch / branch
        (root / "d").mkdir(parents=True)
        (root / "f").write_text("content")
        (root / "d/g").write_text("content")
        (root / "link").symlink_to("f")
        for name in NAMES:
            os.utime(root / name, ns=(PAST, PAST), follow_symlinks=False)


def read_all(mount: Mount) -> None:
    """As a backup does, from the daemon and not from the kernel's cache."""
    mount.control({"op": "udba", "mode": mount.udba})
    for branch in ("top", "base"):
        root = mount.path / branch
        assert os.listdir(root / "d") == ["g"]
        assert os.readlink(root / "link") == "f"
        for name in ("f", "d/g"):
            with (root / name).open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert stream.read() == b"content"
    mount.control({"op": "flush"})


def read_since(tmp_path: Path, branch: str) -> set[str]:
    """Names whose access time was changed; all of them are set back."""
    root = tmp_path / branch / branch
    changed = {name for name in NAMES if os.stat(root / name, follow_symlinks=False).st_atime_ns != PAST}
    for name in NAMES:
        os.utime(root / name, ns=(PAST, PAST), follow_symlinks=False)
    return changed


def modify(mount: Mount, *branches: str) -> None:
    assert mount.control({"op": "branches", "edits": [["mod", branch] for branch in branches]})["ok"]


@modes
def test_access_times(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    mount = union(None, udba)
    read_all(mount)
    assert (read_since(tmp_path, "top"), read_since(tmp_path, "base")) == (set(NAMES), set())
    for options, expected in (
        ("noatime", set()),
        ("strictatime", set(NAMES)),
        ("strictatime,nodiratime", set(NAMES) - {"d"}),
        ("relatime,diratime", set(NAMES)),
        ("ro", set()),
        ("rw", set(NAMES)),
    ):
        assert mount.control({"op": "remount", "options": options})["ok"]
        read_all(mount)
        assert (read_since(tmp_path, "top"), read_since(tmp_path, "base")) == (expected, set()), options


@modes
def test_a_branch_changes_its_permission(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Its mount goes with it, also when a file of it is open for writing."""
    fill(tmp_path)
    mount = union(None, udba)
    top, base = tmp_path / "top", tmp_path / "base"
    with (mount.path / "top/f").open("r+b", buffering=0) as stream:
        assert stream.read() == b"content"
        modify(mount, f"{top}=ro")
        read_since(tmp_path, "top")
        read_all(mount)
        assert read_since(tmp_path, "top") == set()
        assert errno_of(lambda: stream.write(b"x")) == "EROFS"
        modify(mount, f"{top}=rw", f"{base}=rw")
        assert stream.write(b", more") == 6
    assert (top / "top/f").read_text() == "content, more"
    (mount.path / "base/f").write_text("changed")
    assert (base / "base/f").read_text() == "changed"
    read_since(tmp_path, "base")
    os.truncate(base / "base/f", 0)
    (base / "base/f").write_text("content")
    (top / "top/f").write_text("content")
    read_since(tmp_path, "base")
    read_all(mount)
    assert read_since(tmp_path, "base") == set(NAMES)
