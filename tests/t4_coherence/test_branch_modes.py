"""Coherence modes of single branches: a directory gets the weakest cache that its branches in range allow.

Since the root of the union is on every branch, a branch with reval makes the whole mount ask; one with none
is believed where it is, not watched, and takes nothing from the promise of the others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.merge import diff, merge, snapshot
from tests.helpers.mount import Mount, UnionFactory

pytestmark = pytest.mark.fuse


@dataclass(frozen=True)
class Row:
    """top, base: branch permissions. promise_top, promise_base: when a change there must be seen. watched: how many
    of the four directories (root and d, on each branch) are watched. free: a warm tree asks for nothing."""

    mode: str
    top: str
    base: str
    promise_top: str
    promise_base: str
    watched: int
    free: bool

    @property
    def id(self) -> str:
        return f"{self.mode}:{self.top}:{self.base}"


ROWS = (
    Row("notify", "rw", "ro", "flush", "flush", 4, True),
    Row("notify", "rw", "ro+udba=reval", "now", "now", 0, False),
    Row("notify", "rw", "ro+udba=none", "flush", "remount", 2, True),
    Row("notify", "rw+udba=none", "ro", "remount", "flush", 2, True),
    Row("notify", "rw", "rr", "flush", "remount", 2, True),
    Row("notify", "rw", "rr+udba=notify", "flush", "flush", 4, True),
    Row("notify", "rw", "rr+udba=reval", "now", "now", 0, False),
    Row("notify", "rw+udba=reval", "ro+udba=none", "now", "now", 0, False),
    Row("reval", "rw", "ro+udba=none", "now", "now", 4, False),
    Row("reval", "rw", "rr", "now", "now", 2, False),
    Row("none", "rw", "ro", "remount", "remount", 0, True),
    Row("none", "rw", "ro+udba=reval", "now", "now", 0, False),
)


def fill(root: Path) -> None:
    for name in ("top", "base"):
        (root / name / "d").mkdir(parents=True)
        (root / name / "d" / name).write_text("old")


def asked(mount: Mount) -> int:
    requests = mount.requests()
    return requests["lookup"] + requests["getattr"]


def warm(mount: Mount) -> int:
    """Requests of the last of some rounds over every name that the changes concern."""
    before = 0
    for _ in range(3):
        before = asked(mount)
        for name in ("d/top", "d/base", "d/new", "d/hidden"):
            if os.path.lexists(mount.path / name):
                assert (mount.path / name).read_text() == "old"
    return asked(mount) - before


def change(branch: Path) -> None:
    (branch / "d" / branch.name).write_text("changed")
    (branch / "d/new").write_text("new")


def settle(mount: Mount, promise: str) -> None:
    if promise == "flush":
        mount.flush()
    elif promise == "remount":
        mount.remount()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
@pytest.mark.parametrize("where", ["top", "base"])
def test_the_weakest_wins(union: UnionFactory, tmp_path: Path, row: Row, where: str) -> None:
    fill(tmp_path)
    mount = union({"top": row.top, "base": row.base}, row.mode)
    cost = warm(mount)
    assert (cost == 0) is row.free
    before = mount.control({"op": "stats"})["coherence"]
    assert before["watches"] == row.watched
    change(tmp_path / where)
    promise = row.promise_top if where == "top" else row.promise_base
    if promise == "remount":
        mount.flush()
        assert mount.control({"op": "stats"})["coherence"]["events"] == before["events"]  # nobody looks there
    settle(mount, promise)
    assert (mount.path / "d" / where).read_text() == "changed"
    assert (mount.path / "d/new").read_text() == "new"
    assert diff(merge([(tmp_path / "top", True), (tmp_path / "base", False)]), snapshot(mount.path)) == []


@pytest.mark.parametrize("mode", ["none", "notify"])
def test_own_changes_are_right_whatever_the_branches_say(union: UnionFactory, tmp_path: Path, mode: str) -> None:
    fill(tmp_path)
    mount = union({"top": "rw+udba=none", "base": "ro+udba=none"}, mode)
    warm(mount)
    (mount.path / "d/base").write_text("own")
    (mount.path / "d/top").rename(mount.path / "d/renamed")
    (mount.path / "d/new").mkdir()
    assert diff(merge([(tmp_path / "top", True), (tmp_path / "base", False)]), snapshot(mount.path)) == []


def test_the_way_of_a_branch_is_changed_with_the_branch(union: UnionFactory, tmp_path: Path) -> None:
    """`watch` of one branch: what was watched in another way is watched in this one from then on."""
    fill(tmp_path)
    base = tmp_path / "base"
    (base / "only").mkdir()
    mount = union({"top": "rw", "base": "ro"}, "notify", "watch=inotify")

    def watched() -> tuple[int, int]:
        warm(mount)
        os.listdir(mount.path / "only")
        found = mount.control({"op": "stats"})["coherence"]
        return found["watches"], found["handles"]

    seen = [watched()]
    for own, new in (("+watch=fanotify", "new"), ("", "hidden")):
        answer = mount.control({"op": "branches", "edits": [["mod", f"{base}=ro{own}"]]})
        assert answer["ok"]
        assert answer["specs"][1] == f"{base}=ro{own}"
        seen.append(watched())
        (base / "d" / new).write_text("new")
        mount.flush()
        assert (mount.path / "d" / new).read_text() == "new"
        (base / "d" / new).unlink()
        mount.flush()
    assert seen == [(5, 0), (2, 3), (5, 0)]
