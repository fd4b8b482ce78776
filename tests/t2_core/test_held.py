"""A path walk that the kernel repeats after ESTALE (union/held.py) succeeds, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from tests.t2_core.core import Core, core
from udbad.branch import syscalls
from udbad.inodes.node import Node
from udbad.types import ROOT_ID
from udbad.union import held
from udbad.union.fs import SetAttr

PID = 4711


@pytest.fixture(params=["none", "reval"])
def union(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Core]:
    for name in ("top", "base"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "f").write_text("first")
    (tmp_path / "base" / "d").mkdir()
    with core(tmp_path, udba=request.param) as made:
        yield made
        made.fs.walks.close()


def replace(path: Path, text: str) -> None:
    path.with_name("new").write_text(text)
    path.with_name("new").replace(path)


def walk(union: Core, name: str, pid: int = PID) -> Node:
    """What LOOKUP does (edge/operations.py)."""
    found = union.fs.lookup(ROOT_ID, name.encode())
    if union.fs.walks.callers:
        found = union.fs.look_again(pid, ROOT_ID, name.encode(), found)
    assert found is not None
    return union.took(found[0])


def stale_once(union: Core, pid: int = PID) -> None:
    """The file is replaced between LOOKUP and GETATTR; the kernel is about to look again."""
    node = walk(union, "f", pid)
    replace(union["base"] / "f", "second")
    with pytest.raises(OSError, match="Stale") as error:
        union.fs.getattr(node.id)
    assert error.value.errno == errno.ESTALE
    union.fs.walks.stale(pid)


def test_what_the_second_walk_found_can_be_used(union: Core) -> None:
    stale_once(union)
    node = walk(union, "f")
    replace(union["base"] / "f", "third, which is longer")
    assert union.fs.getattr(node.id)[1].st_size == len("second")
    os.setxattr(union["base"] / "f", "user.third", b"")
    assert union.fs.listxattr(node.id, union.caller) == []
    handle, _ = union.run(lambda: union.fs.open(node.id, os.O_RDONLY, union.caller))
    assert union.read(handle) == b"second"
    union.fs.release(handle.fh)


def test_a_change_of_what_is_gone_leaves_no_trace(union: Core) -> None:
    """As natively, of a file that was removed between its being found and its being changed."""
    stale_once(union)
    node = walk(union, "f")
    replace(union["base"] / "f", "third")
    _, st = union.run(lambda: union.fs.setattr(node.id, SetAttr(mode=0o600), None, union.caller))
    assert st.st_mode & 0o777 == 0o600
    assert not (union["top"] / "f").exists()
    assert (union["base"] / "f").stat().st_mode & 0o777 == 0o644


def test_nobody_else_is_held_for(union: Core) -> None:
    stale_once(union)
    node = walk(union, "f", PID + 1)
    replace(union["base"] / "f", "third")
    with pytest.raises(OSError, match="Stale"):
        union.fs.getattr(node.id)
    union.fs.walks.stale(0)
    assert 0 not in union.fs.walks.callers, "the kernel itself walks no path"


def test_held_for_a_short_time_only(union: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    stale_once(union)
    node = walk(union, "f")
    walk(union, "d")
    assert node in union.sb.held
    assert not union.fs.walks.expire()
    now = monotonic()
    monkeypatch.setattr(held, "monotonic", lambda: now + held.HOLD_SECONDS)
    assert union.fs.walks.expire()
    assert not union.sb.held
    assert not union.fs.walks.callers


def test_bounded(union: Core) -> None:
    """A storm of misses holds a bounded number of descriptors."""
    for number in range(300):
        (union["base"] / f"n{number}").touch()
    for number in range(300):
        union.fs.walks.stale(PID + number)
        node = walk(union, f"n{number}", PID + number)
        assert node in union.sb.held, "the newest one is always there"
    assert len(union.sb.held) == 256
    assert len(union.fs.walks.callers) == 256


def test_replaced_while_it_is_found(union: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at a name and its being held: it is looked up once more."""
    stale_once(union)
    pin_at = syscalls.pin_at
    times = iter(range(3))

    def slow(dirfd: int, name: bytes) -> int:
        if next(times, None) is not None:
            replace(union["base"] / "f", "third")
        return pin_at(dirfd, name)

    monkeypatch.setattr(syscalls, "pin_at", slow)
    node = walk(union, "f")
    assert union.sb.held[node]
    assert union.fs.getattr(node.id)[1].st_ino == (union["base"] / "f").stat().st_ino
