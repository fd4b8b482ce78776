"""A listing without attributes (READDIR) says of names what one with them (READDIRPLUS) says, and asks nobody."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.t2_core.core import STRATEGIES, Core, core
from tests.t2_core.fake_notifier import FakeNotifier
from udbad.coherence.notify import NotifyCoherence
from udbad.edge.operations import Operations
from udbad.edge.table import TABLE
from udbad.inodes.node import Dir
from udbad.kernel import wire
from udbad.types import ROOT_ID
from udbad.union import readdir, view

Listing = dict[bytes, tuple[int, int]]
"""By name: number, DT_*."""


@pytest.fixture(params=[*STRATEGIES, "notify"])
def union(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Core]:
    for branch in ("top", "base"):
        (tmp_path / branch).mkdir()
    top, base = tmp_path / "top", tmp_path / "base"
    for name in ("file", "both", "x" * 242):
        (base / name).write_bytes(name.encode())
    (top / "both").write_bytes(b"upper")
    (base / "hidden").touch()
    (top / ".wh.hidden").touch()
    for directory in (top / "merged", base / "merged", base / "lower"):
        directory.mkdir()
    (base / "link").symlink_to("file")
    os.mkfifo(base / "fifo")
    with socket.socket(socket.AF_UNIX) as made:
        place = f"/proc/self/fd/{os.open(base, os.O_RDONLY)}"
        made.bind(f"{place}/socket")
        os.close(int(place.rpartition("/")[2]))
    os.mknod(base / "device", 0o020600, os.makedev(1, 3))
    with core(
        tmp_path, {"top": "rw", "base": "ro"}, udba="reval" if request.param == "notify" else request.param
    ) as made_core:
        if request.param == "notify":
            made_core.sb.changes.hooks.stop()  # type: ignore[attr-defined]  # a strategy
            strategy = NotifyCoherence(made_core.sb, FakeNotifier())
            strategy.start()
            try:
                yield made_core
            finally:
                strategy.stop()
        else:
            yield made_core


def listed(union: Core, opcode: int, room: int = 4096) -> Listing:
    """As the kernel reads it, until nothing comes any more."""
    operations = Operations(union.fs, union.sb.changes.hooks, lambda call, then: None)  # type: ignore[arg-type]  # a strategy
    row = TABLE[opcode]
    fh = union.fs.opendir(ROOT_ID).fh
    found: Listing = {}
    start = 0
    while True:
        result: Any = row.operation(operations, fh, start, room)
        body = row.encode(result)
        assert len(body) <= room
        if not body:
            break
        at = 0
        while at < len(body):
            at += wire.ENTRY_SIZE if opcode == wire.READDIRPLUS else 0
            number, start, size, kind = struct.unpack_from("<QQII", body, at)
            at += wire.DIRENT_SIZE
            assert body[at : at + size] not in found
            found[bytes(body[at : at + size])] = number, kind
            at += size + 7 & ~7
        if row.undo is not None:
            row.undo(operations, result)
    union.fs.releasedir(fh)
    return found


@pytest.mark.parametrize("first", [wire.READDIR, wire.READDIRPLUS])
def test_both_say_the_same(union: Core, first: int) -> None:
    second = wire.READDIRPLUS if first == wire.READDIR else wire.READDIR
    names = listed(union, first)
    assert names == listed(union, second)
    assert len(names) == 11
    assert {kind for _, kind in names.values()} == {1, 2, 4, 8, 10, 12}
    assert b"hidden" not in names


def one_by_one(listed: Iterable[readdir.Name | readdir.Run]) -> list[readdir.Name]:
    return [name for each in listed for name in (each if isinstance(each, readdir.Run) else (each,))]


def test_a_name_that_came_and_one_that_went(union: Core) -> None:
    """Between two replies of one listing: the one is left out, the other one may come."""
    operations = Operations(union.fs, union.sb.changes.hooks, lambda call, then: None)  # type: ignore[arg-type]  # a strategy
    fh = union.fs.opendir(ROOT_ID).fh
    entries = one_by_one(operations.names(fh, 0))
    names = [name for name, *_ in entries]
    at = names.index(b"both")
    union.fs.unlink(ROOT_ID, b"both")
    if union.sb.root.trusted:
        rest = [name for name, *_ in one_by_one(operations.names(fh, entries[at - 1][3]))]
        assert rest == names[at + 1 :]
    again = [name for name, *_ in one_by_one(operations.names(fh, 0))]
    assert sorted(again) == sorted(name for name in names if name != b"both")
    union.fs.releasedir(fh)


def test_nothing_is_asked_of_a_name_and_nothing_is_made(union: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(500):
        (union["base"] / f"n{number}").touch()
    before = len(union.sb.table.nodes)

    def asked(*arguments: object, **keys: object) -> None:
        raise AssertionError(arguments)

    scans = []
    scan = view.scan

    def counted(*arguments: Any) -> Any:
        scans.append(arguments)
        return scan(*arguments)

    monkeypatch.setattr(view, "scan", counted)
    monkeypatch.setattr(readdir, "_by_hit", asked)
    monkeypatch.setattr(readdir, "_ask", asked)
    assert len(listed(union, wire.READDIR)) == 511
    assert len(scans) == 1
    assert len(union.sb.table.nodes) == before
    assert isinstance(union.sb.root, Dir)
