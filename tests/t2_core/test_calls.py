"""How many system calls frequent operations make: what is held here was counted, and more would be a step back."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.inprocess import notify_union
from tests.helpers.syscalls import counted
from tests.t2_core.core import core
from udbad.types import ROOT_CALLER, ROOT_ID, Perm
from udbad.union.fs import SetAttr, UnionFs

FLAGS = os.O_WRONLY | os.O_CREAT


def make(fs: UnionFs, directory: int) -> None:
    fs.create(directory, b"new", FLAGS, 0o644, ROOT_CALLER)


OPERATIONS: dict[str, tuple[Callable[[UnionFs, int], object], int]] = {
    "create": (make, 2),  # open, fstat
    "rename": (lambda fs, directory: fs.rename(directory, b"old", directory, b"renamed", 0), 3),
    "unlink": (lambda fs, directory: fs.unlink(directory, b"old"), 2),
    "mkdir": (lambda fs, directory: fs.mkdir(directory, b"made", 0o755, ROOT_CALLER), 6),
    "rmdir": (lambda fs, directory: fs.rmdir(directory, b"empty"), 2),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_in_a_directory_that_is_known(tmp_path: Path, name: str) -> None:
    operation, most = OPERATIONS[name]
    (tmp_path / "top/d/empty").mkdir(parents=True)
    (tmp_path / "top/d/old").touch()
    (tmp_path / "base").mkdir()
    branches = [(tmp_path / "top", Perm.RW), (tmp_path / "base", Perm.RO)]
    with notify_union(branches, tmp_path / "mnt") as union:
        directory = union.look_up(ROOT_ID, b"d")
        union.list(directory)
        union.told()
        with counted() as calls:
            operation(union.fs, directory)
        for fh in list(union.fs.handles.files):
            union.fs.release(fh)
    assert sum(calls.values()) <= most, calls


def test_events_of_copy_ups(tmp_path: Path) -> None:
    """Each puts the times of its directory back, of which two events tell: no branch is asked what that is now."""
    (tmp_path / "top").mkdir()
    (tmp_path / "base/d").mkdir(parents=True)
    for name in ("first", "second"):
        (tmp_path / "base/d" / name).write_bytes(b"x" * 2000)
    branches = [(tmp_path / "top", Perm.RW), (tmp_path / "base", Perm.RO)]
    with notify_union(branches, tmp_path / "mnt") as union:
        directory = union.look_up(ROOT_ID, b"d")
        union.list(directory)
        for each in (b"first", b"second"):
            node = union.look_up(directory, each)
            union.fs.run(partial(union.fs.setattr, node, SetAttr(mode=0o600), None, ROOT_CALLER))
            with counted() as calls:
                told = union.told()
        assert sum(calls.values()) <= 4, calls  # poll and read, twice
        assert {(one.kind, one.node) for one in told} == {("attributes", directory)}
        (tmp_path / "top/d").chmod(0o700)
        assert union.fs.getattr(directory)[1].st_mode & 0o7777 == 0o700
        union.coherence.attr_ttl(*union.fs.getattr(directory))
        (tmp_path / "top/d").chmod(0o710)
        assert {(one.kind, one.node) for one in union.told()} == {("attributes", directory)}


def test_the_copy_up_of_a_small_file(tmp_path: Path) -> None:
    (tmp_path / "base/d").mkdir(parents=True)
    for name in ("first", "second"):
        (tmp_path / "base/d" / name).write_bytes(b"x" * 2000)
    with core(tmp_path, udba="none") as union:
        union.run(lambda: union.fs.setattr(union.find("d/first").id, SetAttr(uid=1), None, ROOT_CALLER))
        node = union.find("d/second").id
        with counted() as calls:
            union.run(lambda: union.fs.setattr(node, SetAttr(uid=1), None, ROOT_CALLER))
    assert sum(calls.values()) <= 28, calls  # with fsync(2) or without, with FICLONE or without
