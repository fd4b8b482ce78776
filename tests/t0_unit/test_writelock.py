"""The lock of a branch: who gets it, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from udbad.branch import writelock
from udbad.branch.accept import open_branches
from udbad.branch.branches import BranchSet
from udbad.branch.spec import parse_branches
from udbad.branch.writelock import WriteLocks
from udbad.errors import ExitCode, UserError


@pytest.fixture
def branches(tmp_path: Path) -> Iterator[BranchSet]:
    for name in ("a", "b", "c", "mnt"):
        (tmp_path / name).mkdir()
    text = f"{tmp_path}/a=rw:{tmp_path}/b=ro:{tmp_path}/c=rw"
    opened = open_branches(parse_branches(text), False, os.fsencode(tmp_path / "mnt"))
    yield opened
    opened.close()


def test_all_or_none(branches: BranchSet) -> None:
    one, two = WriteLocks(), WriteLocks()
    one.take([branches[2]])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError) as caught:
        two.take(branches.branches, 0.0)
    assert caught.value.code is ExitCode.BRANCH
    assert caught.value.message == (
        f"branch {os.fsdecode(branches[2].path)} is written to by another mount (process {os.getpid()}); "
        "two mounts may not write to one branch"
    )
    assert len(os.listdir("/proc/self/fd")) == before
    one.take(branches.branches, 0.0)  # what it has is no obstacle; the first branch is free again
    one.take(branches.branches, 0.0)
    one.keep([branches[0], branches[1]])
    two.take([branches[2]], 0.0)
    one.close()
    two.take(branches.branches, 0.0)
    two.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_waits_for_the_one_before(branches: BranchSet) -> None:
    one, two = WriteLocks(), WriteLocks()
    one.take(branches.branches)
    threading.Timer(0.2, one.close).start()
    begun = time.monotonic()
    two.take(branches.branches)
    assert 0.1 < time.monotonic() - begun < writelock.PATIENCE
    two.close()


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks(
    branches: BranchSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """NFS wants a descriptor for writing, which a directory has not."""

    def refuse(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    caplog.set_level(logging.DEBUG)
    before = len(os.listdir("/proc/self/fd"))
    one, two = WriteLocks(), WriteLocks()
    one.take(branches.branches)
    two.take(branches.branches)
    assert len(os.listdir("/proc/self/fd")) == before
    assert f"branch {os.fsdecode(branches[0].path)} cannot be locked: {os.strerror(number)}" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    one.close()
    two.close()
