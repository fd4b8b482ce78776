"""Changes that follow each other faster than a clock ticks: what is concluded from time stamps must hold for them, too.

reval believes what it knows of a directory while its watches say nothing, and where it has none while the times of its
branch directories are the same; notify takes an event for an echo while the times of a file are what the kernel was
told.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.merge import Tree, diff, merge, resolve, snapshot
from tests.helpers.mount import DEADLINE, Mount, UnionFactory
from tests.helpers.profile import scaled
from tests.helpers.slow_mount import COARSE, UNWATCHED, slow_daemon

pytestmark = pytest.mark.fuse

ROUNDS = scaled(300, 1000)
DEEP = "a/b/c"


@pytest.fixture
def coarse(tmp_path: Path) -> Iterator[Path]:
    """A branch `base` whose time stamps are whole seconds: ext4 with inodes of 128 bytes."""
    image, place = tmp_path / "image", tmp_path / "base"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-I", "128", str(image)], check=True, capture_output=True, timeout=DEADLINE
    )
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True, timeout=DEADLINE)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=DEADLINE)


def exists(path: Path) -> bool:
    return os.path.lexists(path)


def toggle(branch: Path, name: str) -> None:
    path = branch / DEEP / name
    if exists(path):
        path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def toggle_directory(branch: Path, name: str) -> None:
    """A whole path of directories that is there in one branch and then is not."""
    if exists(branch / DEEP):
        for path in sorted((branch / "a").rglob("*"), reverse=True):
            path.unlink() if not path.is_dir() else path.rmdir()
        (branch / "a").rmdir()
    else:
        (branch / DEEP).mkdir(parents=True)


def toggle_mark(branch: Path, name: str) -> None:
    toggle(branch, ".wh." + name)


def toggle_opaque(branch: Path, name: str) -> None:
    toggle(branch, ".wh..wh..opq")


def swap(branch: Path, name: str) -> None:
    """A directory above takes the place of another one, which has other names."""
    here, aside = branch / "a" / "b", branch / "aside"
    if exists(here) and not exists(aside):
        here.rename(aside)
    elif exists(aside) and not exists(here):
        here.parent.mkdir(exist_ok=True)
        aside.rename(here)


CHANGES: list[Callable[[Path, str], None]] = [toggle, toggle, toggle_directory, toggle_mark, toggle_opaque, swap]


def branches(mount: Mount) -> list[tuple[bytes, int]]:
    return [(os.fsencode(branch), branch is not mount.branches[-1]) for branch in mount.branches]


def truth(mount: Mount) -> Tree:
    """The last branch is the read-only one, whose whiteouts do not count."""
    return merge((Path(os.fsdecode(path)), whable) for path, whable in branches(mount))


def agree(mount: Mount, names: list[str]) -> None:
    """Each name, asked for by its path, is there if the merge of the branches has it."""
    deep = branches(mount)
    for part in os.fsencode(DEEP).split(b"/"):
        deep = resolve(deep, part)
    for name in names:
        assert exists(mount.path / DEEP / name) == bool(resolve(deep, os.fsencode(name))), name


@pytest.mark.parametrize("words", [(), (UNWATCHED,), (UNWATCHED, COARSE)], ids=["watched", "exact", "coarse"])
@pytest.mark.parametrize("seed", range(scaled(1, 3)))
def test_reval_and_a_fast_hand(union: UnionFactory, tmp_path: Path, seed: int, words: tuple[str, ...]) -> None:
    layers = {"top": "rw", "middle": "rw", "base": "ro"}
    with slow_daemon(None, *words):
        mount = union(layers, "reval", allow_log="and its whiteout are both in branch")
    dice = random.Random(seed)
    names = [f"n{number}" for number in range(30)]
    for number in range(ROUNDS):
        dice.choice(CHANGES)(dice.choice(mount.branches), dice.choice(names))
        agree(mount, dice.sample(names, 3))
        if number % 100 == 0:
            assert diff(truth(mount), snapshot(mount.path)) == []


@pytest.mark.parametrize("udba", ["reval", "notify"])
def test_times_in_whole_seconds(coarse: Path, union: UnionFactory, udba: str) -> None:
    (coarse / DEEP).mkdir(parents=True)
    file = coarse / DEEP / "file"
    file.write_text("0000")
    mount = union({"top": "rw", "base": "ro"}, udba)
    names = [f"n{number}" for number in range(30)]
    for number in range(100):
        toggle(coarse, names[number % 7])
        mode = 0o600 + number % 8
        file.chmod(mode)
        with file.open("r+") as direct:
            direct.write(f"{number:04}")
        mount.flush()
        agree(mount, names)
        shown = mount.path / DEEP / "file"
        assert (shown.stat().st_mode & 0o777, shown.read_text()) == (mode, f"{number:04}")
