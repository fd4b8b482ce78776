"""What a view says about a name that is on one branch only, or on none, is true after whatever was done.

Creating, renaming and removing believe it without asking the branches (union/lookup.py: only_on).
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.inprocess import notify_union
from tests.helpers.posix import EXCHANGE
from tests.t2_core.core import core
from udbad.inodes.node import MAX_STACKED, Dir
from udbad.types import ROOT_CALLER, ROOT_ID, Perm
from udbad.union import lookup, view
from udbad.union.fs import SetAttr, UnionFs
from udbad.union.superblock import Superblock

NAMES = [b"a", b"b", b"c", b"e", b"f", b"g"]
SEEDS = range(60)


def fill(*branches: Path) -> None:
    """Names on one branch, on several, whited out, and as directories."""
    top, base = branches[0], branches[-1]
    for branch in branches:
        (branch / "d").mkdir(parents=True)
    for directory in ("", "d"):
        (base / directory / "a").touch()
        (base / directory / "b").touch()
        (top / directory / "b").touch()
        (base / directory / "c").touch()
        (top / directory / ".wh.c").touch()
        (base / directory / "e").mkdir()
        (top / directory / "f").touch()


def check(sb: Superblock) -> Counter[str]:
    """Compare what is said of every name with what is in the branches. Returns how often there was what answer."""
    said: Counter[str] = Counter()
    for node in sb.table.nodes.values():
        if type(node) is not Dir or node.view is None or node.dead:
            continue
        held = {
            layer.branch.index: set(os.listdir(f"/proc/self/fd/{sb.layer_fd(node, layer)}")) for layer in node.layers
        }
        for name in (*NAMES, b"d"):
            place = lookup.only_on(sb, node, name)
            text = name.decode()
            here = [index for index, names in held.items() if text in names]
            marked = [index for index, names in held.items() if f".wh.{text}" in names]
            said["unclear" if place == lookup.UNCLEAR else "nowhere" if place == lookup.NOWHERE else "one"] += 1
            if place == lookup.NOWHERE:
                assert (here, marked) == ([], []), (node, name)
            elif place != lookup.UNCLEAR:
                assert (here, marked) == ([place], []), (node, name)
    return said


def operations(fs: UnionFs, rng: random.Random) -> list[Callable[[], object]]:
    """One of each kind, on names and directories chosen by `rng`."""
    found = fs.lookup(ROOT_ID, b"d")
    directories = [ROOT_ID] if found is None else [ROOT_ID, found[0].id]
    parent, other = rng.choice(directories), rng.choice(directories)
    name, second = rng.choice(NAMES), rng.choice(NAMES)
    at = fs.lookup(parent, name)

    def create() -> None:
        handle, _ = fs.create(parent, name, os.O_WRONLY | os.O_CREAT, 0o644, ROOT_CALLER)
        fs.release(handle.fh)

    changes: list[Callable[[], object]] = [
        create,
        lambda: fs.mkdir(parent, name, 0o755, ROOT_CALLER),
        lambda: fs.symlink(parent, name, b"x", ROOT_CALLER),
        lambda: fs.unlink(parent, name),
        lambda: fs.rmdir(parent, name),
        lambda: fs.rename(parent, name, other, second, 0),
        lambda: fs.rename(parent, name, other, second, EXCHANGE),
    ]
    if at is not None:
        changes += [
            lambda: fs.link(at[0].id, other, second),
            lambda: fs.setattr(at[0].id, SetAttr(mode=0o755), None, ROOT_CALLER),
        ]
    return changes


def perform(fs: UnionFs, rng: random.Random) -> None:
    operation = rng.choice(operations(fs, rng))
    try:
        fs.run(operation)
    except OSError:
        pass  # EEXIST, ENOTEMPTY and the like: nothing has changed


def load(sb: Superblock) -> None:
    for node in list(sb.table.nodes.values()):
        if type(node) is Dir and node.view is None and node.trusted and not node.dead:
            view.load_view(sb, node)


@pytest.mark.parametrize("plink", [True, False])
def test_own_changes(tmp_path: Path, plink: bool) -> None:
    said: Counter[str] = Counter()
    for seed in SEEDS:
        rng = random.Random(seed)
        here = tmp_path / str(seed)
        fill(here / "top", here / "mid", here / "base")
        with core(
            here, {"top": "rw", "mid": "rw" if seed % 2 else "ro", "base": "ro"}, udba="none", plink=plink
        ) as union:
            union.find("d")
            for _ in range(40):
                load(union.sb)
                perform(union.fs, rng)
                said += check(union.sb)
    assert min(said["one"], said["nowhere"], said["unclear"]) > 100, said


def test_own_and_direct_changes(tmp_path: Path) -> None:
    """The direct ones count when their events have been read."""
    said: Counter[str] = Counter()
    for seed in SEEDS:
        rng = random.Random(seed)
        top, base = tmp_path / f"top{seed}", tmp_path / f"base{seed}"
        fill(top, base)
        with notify_union([(top, Perm.RW), (base, Perm.RO)], tmp_path / "mnt") as union:
            union.look_up(ROOT_ID, b"d")
            for _ in range(40):
                load(union.fs.sb)
                for _ in range(rng.randrange(3)):
                    perform(union.fs, rng)
                directly(rng, top, base)
                union.coherence.drain()
                said += check(union.fs.sb)
            for node in list(union.fs.table.nodes.values()):
                if node.id != ROOT_ID and not node.nlookup:
                    node.nlookup = 1
                    union.references[node.id] = 1
    assert min(said["one"], said["nowhere"], said["unclear"]) > 100, said


def directly(rng: random.Random, *branches: Path) -> None:
    path = rng.choice(branches) / rng.choice(["", "d"]) / (rng.choice(["", ".wh."]) + rng.choice(NAMES).decode())
    try:
        if path.exists():
            path.unlink()
        else:
            path.touch()
    except OSError:
        pass  # a directory, or in one that is gone


def test_many_unclear_names_are_given_up(tmp_path: Path) -> None:
    with core(tmp_path, udba="none") as union:
        load(union.sb)
        root = union.sb.root
        assert lookup.only_on(union.sb, root, b"x") == lookup.NOWHERE
        root.note_stacked(b"x")
        assert lookup.only_on(union.sb, root, b"x") == lookup.UNCLEAR
        for number in range(MAX_STACKED):
            root.note_stacked(b"%d" % number)
        assert lookup.only_on(union.sb, root, b"y") == lookup.UNCLEAR
        assert root.stacked is None
