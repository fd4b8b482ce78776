"""Positions in listings: below 2**31, of one snapshot each, and good for as long as somebody may come back to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.t2_core.core import Core, core
from udbad.inodes.handles import OpenDir
from udbad.types import ROOT_ID
from udbad.union import readdir

LIMIT = 1 << 31
NAMES = [b"n%03d" % number for number in range(100)]


@pytest.fixture
def union(tmp_path: Path) -> Iterator[Core]:
    (tmp_path / "base").mkdir()
    for name in NAMES:
        (tmp_path / "base" / os.fsdecode(name)).touch()
    with core(tmp_path, udba="none") as made:
        yield made


def opened(union: Core, cached: bool = True) -> OpenDir:
    """As edge/operations.py opens one; cached: the kernel may answer for it from what another one has read."""
    handle = union.fs.opendir(ROOT_ID)
    if cached:
        handle.cached = True
        handle.node.cached_opens += 1
    return handle


def listing(union: Core, handle: OpenDir, start: int = 0) -> list[tuple[bytes, int]]:
    """(name, position after it), as they come."""
    return [(name, after) for name, _, _, after in union.fs.readdir(handle.fh, start)]


def of(entries: list[tuple[bytes, int]]) -> list[bytes]:
    return [name for name, _ in entries]


def test_snapshots_that_differ_have_no_position_in_common(union: Core) -> None:
    """Else the kernel would put a part of one behind a part of another (fuse_add_dirent_to_cache())."""
    seen: set[int] = set()
    for number in range(20):
        union.create(f"more{number}")
        positions = [after for _, after in listing(union, opened(union, number % 2 == 0))]
        assert positions == sorted(positions)
        assert seen.isdisjoint(positions)
        seen.update(positions)
    assert max(seen) < LIMIT


def test_an_unchanged_directory_has_one_snapshot(union: Core) -> None:
    """What one handle has begun, another one completes; and nothing is used up."""
    first = listing(union, opened(union))
    for _ in range(5):
        assert listing(union, opened(union)) == first
    union.create("new")
    assert {after for _, after in listing(union, opened(union))}.isdisjoint(after for _, after in first)


def test_going_on_from_what_others_have_read(union: Core) -> None:
    """From the kernel's listing, which is dropped meanwhile: nothing is left out and nothing comes twice."""
    reader = opened(union)
    whole = listing(union, opened(union))
    place = whole[50][1]
    for name in of(whole)[2:5]:  # each makes another listing, in which place 50 is another one
        union.unlink(os.fsdecode(name))
        listing(union, opened(union))
    rest = listing(union, reader, place)
    assert of(rest) == of(whole)[51:]
    assert of(listing(union, reader, rest[10][1])) == of(rest)[11:]


@pytest.mark.parametrize("cached", [True, False])
def test_a_new_handle_for_each_part(union: Core, cached: bool) -> None:
    """As file servers without a state read: seekdir(3) in a directory that was just opened."""
    names: list[bytes] = []
    position = 0
    while part := listing(union, handle := opened(union, cached), position)[:7]:
        union.fs.releasedir(handle.fh)
        names += of(part)
        position = part[-1][1]
    assert sorted(names) == [b".", b"..", *NAMES]


def test_a_position_that_nobody_knows_begins_anew(union: Core) -> None:
    """Names twice are better than names left out."""
    handle = opened(union)
    assert sorted(of(listing(union, handle, LIMIT - 1))) == NAMES


def test_positions_are_given_out_again_but_none_that_is_in_use(union: Core) -> None:
    old = opened(union, cached=False)
    held = listing(union, old)
    node = union.sb.root
    begun = opened(union)
    node.room = (LIMIT - 150, LIMIT)
    union.create("new0")
    late = listing(union, begun)
    assert late[-1][1] < LIMIT
    seen = {after for _, after in (*held, *late)}
    for number in range(1, 30):
        union.create(f"new{number}")
        positions = {after for _, after in listing(union, opened(union, cached=False))}
        assert max(positions) < LIMIT
        assert seen.isdisjoint(positions)
    assert of(listing(union, old, held[50][1])) == of(held)[51:]
    assert of(listing(union, begun, late[50][1])) == of(late)[51:]


def test_more_names_than_positions(union: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readdir, "POSITIONS", (0, 50))
    union.sb.root.room = (0, 50)
    assert sorted(of(listing(union, opened(union)))) == [b".", b"..", *NAMES]
