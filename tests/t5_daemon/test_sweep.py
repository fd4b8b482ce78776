"""A branch that was not left in order is swept while the mount serves, and is no reason to wait."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.helpers.mount import DEADLINE, UnionFactory
from tests.t5_daemon.daemon import until
from udbad.branch import walk, whiteout
from udbad.branch.accept import open_branches
from udbad.branch.branches import BranchSet
from udbad.branch.spec import parse_branches
from udbad.mount.writing import Writing

STALE = (".wh..wh.file.0123456789ab", "d/.wh..wh.copy.00ff", ".wh..wh.orph/5")


@pytest.fixture
def dirty(tmp_path: Path) -> Path:
    """A branch that a crash has left: its mark, temporary names, one of them a directory with something in it."""
    top = tmp_path / "top"
    (top / "d").mkdir(parents=True)
    (top / ".wh..wh.orph").mkdir(mode=0o700)
    (top / ".wh..wh.udbad").touch()
    for name in STALE:
        (top / name).touch()
    (top / ".wh..wh.dir.00000000000f" / "deep" / "er").mkdir(parents=True)
    (top / "d" / "file").touch()
    return top


def stale(top: Path) -> list[str]:
    return [str(path.relative_to(top)) for path in top.rglob("*") if str(path.relative_to(top)) in STALE or
            path.name.startswith(".wh..wh.dir.")]  # fmt: skip


@pytest.fixture
def opened(dirty: Path, tmp_path: Path) -> Iterator[BranchSet]:
    (tmp_path / "mnt").mkdir()
    branches = open_branches(parse_branches(f"{dirty}=rw"), False, os.fsencode(tmp_path / "mnt"))
    yield branches
    branches.close()


def test_own_temporaries_stay(dirty: Path, opened: BranchSet) -> None:
    """They are in use while the branch is swept. What another process has left goes; times of directories stay."""
    own = dirty / "d" / os.fsdecode(whiteout.temporary_name(b"name"))
    own.touch()
    os.utime(dirty / "d", ns=(1, 2))
    writing = Writing()

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            writing.sweep(nursery)

    writing.begin(opened.branches, True)
    trio.run(serve)
    assert stale(dirty) == []
    assert own.exists()
    assert (dirty / "d").stat().st_mtime_ns == 2
    assert (dirty / ".wh..wh.udbad").exists()
    writing.close()
    assert not (dirty / ".wh..wh.udbad").exists()


def test_a_forked_process_makes_other_names() -> None:
    """Mount processes are forked from one that has imported this: their names must not look like each other's."""
    name = whiteout.temporary_name(b"name")
    assert whiteout.is_ours(name)
    pid = os.fork()
    if pid == 0:
        os._exit(whiteout.is_ours(name))
    assert os.waitpid(pid, 0)[1] == 0


def test_a_mount_that_ends_meanwhile_keeps_the_mark(
    dirty: Path, opened: BranchSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for a branch that hangs, and nothing is removed once the branch is not ours any more."""
    listed, go_on = threading.Event(), threading.Event()
    real_list = walk.entries_of

    def hang(dirfd: int) -> walk.Entries:
        entries = real_list(dirfd)
        listed.set()
        assert go_on.wait(DEADLINE)
        return entries

    monkeypatch.setattr(walk, "entries_of", hang)
    writing = Writing()

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            writing.sweep(nursery)
            assert await trio.to_thread.run_sync(listed.wait, DEADLINE)
            nursery.cancel_scope.cancel()

    writing.begin(opened.branches, True)
    (sweep,) = (begun.sweep for begun in writing._begun.values())
    assert sweep is not None
    trio.run(serve)
    writing.close()
    go_on.set()
    until(lambda: sweep._fd < 0, "the end of the thread")
    assert len(stale(dirty)) == len(STALE) + 1
    assert (dirty / ".wh..wh.udbad").exists()


def test_a_branch_that_is_left_before_its_turn_keeps_the_mark(dirty: Path, opened: BranchSet) -> None:
    before = len(os.listdir("/proc/self/fd"))
    writing = Writing()
    writing.begin(opened.branches, True)
    writing.close()
    assert (dirty / ".wh..wh.udbad").exists()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.fuse
def test_while_mounted(dirty: Path, union: UnionFactory) -> None:
    """Temporaries are invisible before and after; a branch that is added is swept, too."""
    other = dirty.with_name("other")
    mount = union({"top": "rw", "base": "ro"})
    assert sorted(os.listdir(mount.path)) == ["d"]
    until(lambda: "swept 4 temporary names" in mount.log(), "the sweep")
    assert stale(dirty) == []
    assert (dirty / ".wh..wh.udbad").exists()
    (other / "d").mkdir(parents=True)
    (other / ".wh..wh.udbad").touch()
    (other / STALE[0]).touch()
    assert mount.control({"op": "branches", "edits": [["append", f"{other}=rw"]]})["ok"]
    until(lambda: "swept 1 temporary names" in mount.log(), "the sweep of the new branch")
    assert mount.control({"op": "branches", "edits": [["del", str(other)]]})["ok"]
    assert not (other / ".wh..wh.udbad").exists()
    mount.process.send_signal(signal.SIGTERM)
    assert mount.process.wait(DEADLINE) == 0
    assert not (dirty / ".wh..wh.udbad").exists()
