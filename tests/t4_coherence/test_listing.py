"""Listings that the kernel keeps (FOPEN_CACHE_DIR): free when warm, and never older than the mode allows.

The kernel looks at a directory's mtime before it uses a listing, and a change on a lower branch leaves that of the top
copy alone; so every case below changes names that nobody has asked for by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory

pytestmark = pytest.mark.fuse

LAYERS = {"top": "rw", "middle": "ro+wh", "base": "ro"}
NAMES = [f"n{number}" for number in range(300)]
"""More than fit into one reply."""


def populate(tmp_path: Path) -> None:
    for layer, names in (("top", NAMES[:50]), ("middle", NAMES[50:100]), ("base", NAMES[100:])):
        (tmp_path / layer / "d").mkdir(parents=True)
        for name in names:
            (tmp_path / layer / "d" / name).write_text(layer)


def readdirs(mount: Mount) -> int:
    return mount.requests().get("readdir", 0)


def sent(mount: Mount) -> dict[str, int]:
    found: dict[str, int] = mount.control({"op": "stats"})["invalidator"]["sent"]
    return found


def listed(path: Path | int) -> dict[str, int]:
    """Names and their inode numbers, as the listing has them."""
    with os.scandir(path) as entries:
        return {entry.name: entry.inode() for entry in entries}


def agree(mount: Mount, names: set[str]) -> None:
    shown = listed(mount.path / "d")
    assert set(shown) == names
    for name in names:
        assert (mount.path / "d" / name).stat().st_ino == shown[name], name


@pytest.mark.parametrize("mode", ["none", "notify"])
def test_a_warm_listing_costs_nothing(union: UnionFactory, tmp_path: Path, mode: str) -> None:
    populate(tmp_path)
    mount = union(LAYERS, mode)
    for _ in range(2):
        assert set(listed(mount.path / "d")) == set(NAMES)
    before = readdirs(mount)
    for _ in range(5):
        assert set(listed(mount.path / "d")) == set(NAMES)
    assert readdirs(mount) == before


def test_reval_asks_every_time(union: UnionFactory, tmp_path: Path) -> None:
    populate(tmp_path)
    mount = union(LAYERS, "reval")
    for _ in range(3):
        before = readdirs(mount)
        assert set(listed(mount.path / "d")) == set(NAMES)
        assert readdirs(mount) > before


CHANGES: dict[str, Callable[[Path], tuple[set[str], set[str]]]] = {}
"""What is done directly in a branch directory that has n<number>; the names that come and that go."""


def change(function: Callable[[Path], tuple[set[str], set[str]]]) -> Callable[[Path], tuple[set[str], set[str]]]:
    CHANGES[function.__name__] = function
    return function


def own(here: Path) -> str:
    """A name that this branch alone has."""
    return min(path.name for path in here.iterdir() if path.name.startswith("n"))


@change
def create(here: Path) -> tuple[set[str], set[str]]:
    (here / "new").touch()
    return {"new"}, set()


@change
def mkdir(here: Path) -> tuple[set[str], set[str]]:
    (here / "new").mkdir()
    return {"new"}, set()


@change
def unlink(here: Path) -> tuple[set[str], set[str]]:
    name = own(here)
    (here / name).unlink()
    return set(), {name}


@change
def rename(here: Path) -> tuple[set[str], set[str]]:
    name = own(here)
    (here / name).rename(here / "new")
    return {"new"}, {name}


@change
def replace(here: Path) -> tuple[set[str], set[str]]:
    (here / "other").touch()
    (here / "other").rename(here / own(here))
    return set(), set()


@change
def whiteout(here: Path) -> tuple[set[str], set[str]]:
    """Hides what the base has; on the base itself it hides nothing."""
    (here / f".wh.{NAMES[200]}").touch()
    return set(), set() if here.parent.name == "base" else {NAMES[200]}


@change
def opaque(here: Path) -> tuple[set[str], set[str]]:
    (here / ".wh..wh..opq").touch()
    below = {"top": NAMES[50:], "middle": NAMES[100:], "base": []}[here.parent.name]
    return set(), set(below)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("forgotten", [False, pytest.param(True, marks=pytest.mark.alone)], ids=["", "forgotten"])
def test_a_direct_change_is_listed(union: UnionFactory, tmp_path: Path, layer: str, name: str, forgotten: bool) -> None:
    """forgotten: the kernel has dropped the names, but not the listing."""
    populate(tmp_path)
    mount = union(LAYERS, "notify")
    for _ in range(2):
        assert set(listed(mount.path / "d")) == set(NAMES)
    if forgotten:
        Path("/proc/sys/vm/drop_caches").write_text("2")
        assert set(listed(mount.path / "d")) == set(NAMES)
    come, gone = CHANGES[name](tmp_path / layer / "d")
    mount.flush()
    agree(mount, set(NAMES) - gone | come)
    # And the listing is kept again.
    listed(mount.path / "d")
    before = readdirs(mount)
    agree(mount, set(NAMES) - gone | come)
    assert readdirs(mount) == before


@pytest.mark.parametrize("mode", ["none", "notify"])
def test_own_changes_are_listed_and_told_to_nobody(union: UnionFactory, tmp_path: Path, mode: str) -> None:
    populate(tmp_path)
    mount = union(LAYERS, mode)
    names = set(NAMES)
    assert set(listed(mount.path / "d")) == names
    mount.flush()
    before = sent(mount)
    for number in range(60):
        (mount.path / "d" / f"own{number}").touch()
        (mount.path / "d" / NAMES[number]).unlink()
        (mount.path / "d" / f"own{number}").rename(mount.path / "d" / f"moved{number}")
        names = names - {NAMES[number]} | {f"moved{number}"}
        assert set(listed(mount.path / "d")) == names
    mount.flush()
    assert sent(mount) == before


def test_a_handle_from_better_times(union: UnionFactory, tmp_path: Path) -> None:
    """Opened while the kernel may keep the listing, read again when that is over."""
    populate(tmp_path)
    mount = union(LAYERS, "notify")
    fd = os.open(mount.path / "d", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(2):
            assert set(listed(fd)) == set(NAMES)
        assert mount.control({"op": "udba", "mode": "reval"})["ok"]
        names = set(NAMES)
        for number in range(20):
            (tmp_path / "base" / "d" / f"later{number}").touch()
            names.add(f"later{number}")
            assert set(listed(fd)) == names
    finally:
        os.close(fd)


def test_a_listing_under_way_goes_on(union: UnionFactory, tmp_path: Path) -> None:
    """Begun from the kernel's listing, which is dropped half-way: no name that stays is shown twice or left out."""
    populate(tmp_path)
    mount = union(LAYERS, "notify")
    for _ in range(2):
        assert set(listed(mount.path / "d")) == set(NAMES)
    for turn in range(20):
        with os.scandir(mount.path / "d") as entries:
            seen = [next(entries).name for _ in range(10)]
            (tmp_path / "base" / "d" / f"come{turn}").touch()
            (tmp_path / "base" / "d" / f"come{turn - 1}").unlink(missing_ok=True)
            mount.flush()
            seen += [entry.name for entry in entries]
        stayed = [name for name in seen if name in NAMES]
        assert sorted(stayed) == sorted(NAMES)
