"""Layers in which overlayfs has renamed directories (redirect_dir=on), as read-only branches: the same tree, also
below a branch on which they are renamed further."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers.merge import Tree, diff, snapshot
from tests.helpers.mount import UnionFactory
from tests.t3_fuse.test_overlay_layers import without_records

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif("overlay" not in Path("/proc/filesystems").read_text().split(), reason="no overlayfs"),
]

KEY = "trusted.overlay.redirect"
GENERATIONS = 3
STEPS = 15


@contextmanager
def overlayfs(layers: Sequence[Path], point: Path, upper: Path | None = None) -> Iterator[Path]:
    """layers: top first. upper: what is written to; without it nothing is."""
    words = f"lowerdir={':'.join(map(str, layers))},redirect_dir=on,metacopy=off,index=off"
    if upper is not None:
        work = upper.with_name(upper.name + "-work")
        work.mkdir()
        words += f",upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", words, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


def anything(union: Path, pick: random.Random, count: int) -> None:
    """Random changes, most of them renames of directories."""
    for number in range(count):
        directories = [Path(above) for above, _, _ in os.walk(union)]
        files = [Path(above, name) for above, _, names in os.walk(union) for name in names]
        source, place = pick.choice(directories), pick.choice(directories)
        target = place / pick.choice("abcde")
        with suppress(OSError):
            kind = pick.random()
            if kind < 0.6 and source != union:
                os.rename(source, target)
            elif kind < 0.7:
                target.mkdir()
            elif kind < 0.8:
                (place / f"f{number}").write_text(str(number))
            elif kind < 0.85 and files:
                pick.choice(files).unlink()
            elif kind < 0.9 and source != union and len(directories) > 12:
                shutil.rmtree(source)
            elif files:
                with pick.choice(files).open("a") as stream:
                    stream.write("more")


def build(low: Path, pick: random.Random) -> None:
    for _ in range(30):
        path = low.joinpath(*(pick.choice("abcde") for _ in range(pick.randint(1, 4))), f"f{pick.randint(0, 9)}")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(path))


def redirects(layer: Path) -> int:
    return sum(KEY in os.listxattr(above) for above, _, _ in os.walk(layer))


def stays(tree: Tree) -> Tree:
    return without_records(tree)


@pytest.mark.parametrize("seed", range(2))
def test_what_overlayfs_has_renamed(union: UnionFactory, tmp_path: Path, seed: int) -> None:
    pick = random.Random(seed)
    point = tmp_path / "point"
    names = [f"layer{number}" for number in range(GENERATIONS)]
    for path in (point, *(tmp_path / name for name in names)):
        path.mkdir()
    layers = [tmp_path / names[0]]
    build(layers[0], pick)
    for name in names[1:]:
        with overlayfs(layers, point, tmp_path / name):
            anything(point, pick, STEPS)
        layers.insert(0, tmp_path / name)
    assert sum(map(redirects, layers)) > 1
    with overlayfs(layers, point):
        shown = stays(snapshot(point))
    mount = union({"top": "rw", **{path.name: "ro+wh" for path in layers}}, "reval", "dirren=on")
    assert diff(shown, stays(snapshot(mount.path))) == []
    # What is renamed here is renamed as well in a plain directory.
    plain = tmp_path / "plain"
    subprocess.run(["cp", "-a", f"{mount.path}/.", plain], check=True)
    after = random.getstate()
    for root in (mount.path, plain):
        random.setstate(after)
        in_order(root, random.Random(seed))
    assert diff(stays(snapshot(plain)), stays(snapshot(mount.path)), ignore=("mtime_ns", "nlink")) == []
    mount.remount()
    assert diff(stays(snapshot(plain)), stays(snapshot(mount.path)), ignore=("mtime_ns", "nlink")) == []
    assert redirects(tmp_path / "top") > 0


def in_order(root: Path, pick: random.Random) -> None:
    """The same changes wherever they are made: names are taken in order, not as a listing has them."""
    for number in range(STEPS):
        directories = sorted(os.path.relpath(above, root) for above, _, _ in os.walk(root))
        source, place = root / pick.choice(directories), root / pick.choice(directories)
        target = place / pick.choice("abcde")
        try:
            if pick.random() < 0.8 and source != root:
                os.rename(source, target)
            else:
                (place / f"n{number}").write_text(str(number))
        except OSError:
            pass


def test_one_name_and_a_path(union: UnionFactory, tmp_path: Path) -> None:
    """Both forms that overlayfs writes, and whose they are: `user.` is not root's."""
    for name in ("low", "up", "point"):
        (tmp_path / name).mkdir()
    for name in ("p/old/f", "q/f", "r/f"):
        (tmp_path / "low" / name).parent.mkdir(parents=True)
        (tmp_path / "low" / name).write_text(name)
    with overlayfs([tmp_path / "low"], tmp_path / "point", tmp_path / "up") as point:
        (point / "p/old").rename(point / "p/new")
        (point / "q").rename(point / "p/q")
        (point / "r").rename(point / "s")
    assert os.getxattr(tmp_path / "up/p/new", KEY) == b"old"
    assert os.getxattr(tmp_path / "up/p/q", KEY) == b"/q"
    os.setxattr(tmp_path / "up/s", "user.overlay.redirect", os.getxattr(tmp_path / "up/s", KEY))
    os.removexattr(tmp_path / "up/s", KEY)
    mount = union({"up": "ro+wh", "low": "ro"}, "none")
    found = {os.fsdecode(name) for name in snapshot(mount.path)}
    assert found == {"p", "p/new", "p/new/f", "p/q", "p/q/f", "s"}


@pytest.mark.parametrize("udba", ["none", "reval", "notify"])
def test_what_is_written_is_read_by_overlayfs(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """whiteouts=overlay: directories that were renamed here have what they had, there."""
    low, point = tmp_path / "low", tmp_path / "point"
    for path in (low, point):
        path.mkdir()
    for name in ("p/old/f", "p/old/sub/g", "q/f", "r/f", "s/f", "t/deep/f"):
        (low / name).parent.mkdir(parents=True, exist_ok=True)
        (low / name).write_text(name)
    mount = union({"up": "rw", "low": "ro+wh"}, udba, "whiteouts=overlay,dirren=on")
    root = mount.path
    (root / "p/old").rename(root / "new")
    (root / "new/sub").rename(root / "q/sub")
    (root / "new/more").write_text("more")
    (root / "q").rename(root / "t/q")
    (root / "r/f").unlink()
    (root / "s").rename(root / "r")
    (root / "q").mkdir()
    (root / "q/again").write_text("again")
    (root / "t/deep").rename(root / "t/deeper")
    (root / "t/deeper").rename(root / "t/deep")
    shown = without_records(snapshot(root))
    mount.unmount()
    assert redirects(tmp_path / "up") > 0
    with overlayfs([tmp_path / "up", low], point):
        assert diff(shown, without_records(snapshot(point)), ignore=("nlink",)) == []
