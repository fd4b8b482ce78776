"""Layers that overlayfs and fuse-overlayfs have written, as read-only branches: the mount shows the tree they show."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.merge import Tree, diff, snapshot
from tests.helpers.mount import UnionFactory
from tests.t5_daemon.daemon import until
from udbad.branch.branches import BranchSpec
from udbad.commands.tools import change_rows
from udbad.tools import branchdiff
from udbad.types import Perm

pytestmark = pytest.mark.fuse

PLAIN = "redirect_dir=off,metacopy=off,index=off"
"""What overlayfs is not to make: layers that only overlayfs can read."""


def build(low: Path, mid: Path) -> None:
    for layer, word in ((low, "low"), (mid, "mid")):
        for name in ("both", "dir/both", f"dir/only_{word}", "gone/file", "again/inside", "deep/er/file"):
            path = layer / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(word)
    for name in ("removed", "replaced", "renamed", "to_dir", "dir/removed", "emptied/a", "emptied/b"):
        path = low / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)


def change(union: Path) -> None:
    """What makes whiteouts and opaque directories of every kind."""
    (union / "removed").unlink()
    (union / "dir/removed").unlink()
    (union / "dir/both").unlink()
    shutil.rmtree(union / "gone")
    shutil.rmtree(union / "again")
    (union / "again").mkdir()
    (union / "again/new").write_text("new")
    (union / "replaced").unlink()
    (union / "replaced").write_text("another")
    os.rename(union / "renamed", union / "dir/renamed")
    (union / "to_dir").unlink()
    (union / "to_dir").mkdir()
    for name in ("a", "b"):
        (union / "emptied" / name).unlink()
    with (union / "both").open("a") as stream:
        stream.write(" changed")
    (union / "made").mkdir()
    (union / "made/file").write_text("made")


@contextmanager
def overlayfs(layers: list[Path], upper: Path, work: Path, point: Path) -> Iterator[None]:
    words = f"lowerdir={':'.join(map(str, layers))},upperdir={upper},workdir={work},{PLAIN}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", words, point], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", point], check=True)


@contextmanager
def fuse_overlayfs(
    layers: list[Path], upper: Path, work: Path, point: Path, environment: dict[str, str] | None = None
) -> Iterator[None]:
    words = f"lowerdir={':'.join(map(str, layers))},upperdir={upper},workdir={work}"
    subprocess.run(["fuse-overlayfs", "-o", words, point], check=True, env={**os.environ, **(environment or {})})
    try:
        yield
    finally:
        subprocess.run(["umount", point], check=True)


with_files = partial(fuse_overlayfs, environment={"FUSE_OVERLAYFS_DISABLE_OVL_WHITEOUT": "1"})
"""As where it may make no devices: its whiteouts are `.wh.NAME`."""


def marks(layer: Path) -> tuple[int, int, int]:
    """How many devices 0/0, opaque attributes and names with `.wh.` a layer has."""
    devices = attributes = names = 0
    for directory, subdirectories, files in os.walk(layer):
        for name in (*subdirectories, *files):
            path = os.path.join(directory, name)
            info = os.lstat(path)
            devices += stat.S_ISCHR(info.st_mode) and info.st_rdev == 0
            attributes += any(key.endswith(".opaque") for key in os.listxattr(path, follow_symlinks=False))
            names += name.startswith(".wh.")
    return devices, attributes, names


def without_records(tree: Tree) -> Tree:
    """Without what overlayfs notes of an object for itself, and does not show."""
    return {
        path: replace(entry, xattrs=tuple(one for one in entry.xattrs if "overlay" not in one[0]))
        for path, entry in tree.items()
    }


WRITERS = [
    pytest.param(
        overlayfs,
        id="overlayfs",
        marks=pytest.mark.skipif("overlay" not in Path("/proc/filesystems").read_text().split(), reason="no overlayfs"),
    ),
    *(
        pytest.param(
            writer, id=name, marks=pytest.mark.skipif(shutil.which("fuse-overlayfs") is None, reason="not installed")
        )
        for name, writer in (("fuse-overlayfs", fuse_overlayfs), ("with-files", with_files))
    ),
]

READERS = WRITERS[:2]
"""The third one reads what the second one does."""


@pytest.fixture(params=WRITERS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Tree:
    """Layers up, mid and low as one of them leaves them, in the test's directory; and what it has shown."""
    low, mid, up, work, point = (tmp_path / name for name in ("low", "mid", "up", "work", "point"))
    for path in (low, mid, up, work, point):
        path.mkdir()
    build(low, mid)
    writer: Callable[[list[Path], Path, Path, Path], AbstractContextManager[None]] = request.param
    with writer([mid, low], up, work, point):
        change(point)
    with writer([mid, low], up, work, point):  # anew: fuse-overlayfs shows times that it has cached
        shown = snapshot(point)
    return without_records(shown)


@pytest.mark.parametrize("udba", ["none", "reval", "notify"])
def test_what_they_have_written_is_shown_as_they_show_it(
    written: Tree, union: UnionFactory, tmp_path: Path, udba: str
) -> None:
    """Read-only, and below a branch to which the same changes are made as to any."""
    mount = union({"top": "rw", "up": "ro+wh", "mid": "ro+wh", "low": "ro"}, udba)
    assert diff(written, without_records(snapshot(mount.path))) == []
    assert any(marks(tmp_path / "up"))
    for name in ("removed", "gone", "replaced", "again"):
        path = mount.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.mkdir()
        assert os.listdir(path) == []
        (path / "inside").write_text("again")
        os.rename(path, mount.path / "moved")
        assert not path.exists()
        assert os.listdir(mount.path / "moved") == ["inside"]
        shutil.rmtree(mount.path / "moved")
    (mount.path / "emptied").rmdir()
    assert not (mount.path / "emptied").exists()
    assert marks(tmp_path / "top")[:2] == (0, 0)


def test_tools_read_them(written: Tree, union: UnionFactory, tmp_path: Path) -> None:
    """why, diff, and what is merged down from such a layer."""
    mid = BranchSpec(os.fsencode(tmp_path / "mid"), Perm.RO, frozenset({"wh"}))
    low = BranchSpec(os.fsencode(tmp_path / "low"), Perm.RO, frozenset({"wh"}))
    up = BranchSpec(os.fsencode(tmp_path / "up"), Perm.RO, frozenset({"wh"}))
    with branchdiff.opened(up, [mid, low]) as (top, lowers):
        rows = {row["path"]: row["change"] for row in change_rows(branchdiff.changes(top, lowers), False)}
    gone = {path for path, kind in rows.items() if kind == "deleted"}
    assert gone >= {"removed", "dir/removed", "dir/both", "gone", "again/inside", "renamed", "emptied/a"}
    assert {path for path, kind in rows.items() if kind == "added"} >= {"again/new", "made", "made/file", "dir/renamed"}
    assert rows["to_dir"] == "type"

    mount = union({"top": "rw", "up": "ro+wh", "mid": "rw", "low": "ro"}, "reval")
    answer = mount.control({"op": "why", "path": "removed"})
    assert [one["whiteout"] for one in answer["steps"][-1]["branches"]] == [False, True, False, False]
    words = {"mode": "copy", "source": str(tmp_path / "up"), "target": str(tmp_path / "mid")}
    assert mount.control({"op": "sync", **words})["ok"]
    until(lambda: not mount.control({"op": "sync-status"})["running"], "the end of sync")
    status = mount.control({"op": "sync-status"})
    assert (status["error_text"], status["left_count"]) == ("", 0)
    mount.unmount()
    merged = union({"mid": "rw", "low": "ro"}, "none", mount_point="merged")
    assert diff(written, without_records(snapshot(merged.path)), ignore=("nlink",)) == []
