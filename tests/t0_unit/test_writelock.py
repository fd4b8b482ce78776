"""The lock of a branch: who gets it, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from udbad.branch import syscalls, whiteout, writelock
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


STRANGER = 65534


@pytest.fixture
def top(branches: BranchSet) -> Path:
    """The first branch's root."""
    return Path(os.fsdecode(branches[0].path))


@contextmanager
def locked_by_a_stranger(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


def one_writer(branches: BranchSet) -> None:
    """The first branch can be locked at once, by one."""
    one, two = WriteLocks(), WriteLocks()
    one.take([branches[0]], 0.0)
    with pytest.raises(UserError, match="written to by another mount"):
        two.take([branches[0]], 0.0)
    one.close()
    two.take([branches[0]], 0.0)
    two.close()


def test_a_lock_on_the_root_is_no_obstacle(branches: BranchSet, top: Path) -> None:
    with locked_by_a_stranger(top):
        one_writer(branches)
    st = (top / ".wh..wh.orph").stat()
    assert (st.st_uid, stat.S_IMODE(st.st_mode)) == (os.geteuid(), 0o700)


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize(("uid", "mode"), [(STRANGER, 0o700), (0, 0o755), (0, 0o770)])
def test_what_others_can_open_is_replaced(branches: BranchSet, top: Path, uid: int, mode: int, content: bool) -> None:
    """Who owns the branch puts a directory of his own there, and locks it; or a careless copy has changed the mode."""
    orphans = top / ".wh..wh.orph"
    orphans.mkdir()
    os.chown(orphans, uid, 0)
    orphans.chmod(mode)
    if content:
        (orphans / "file").touch()
    with locked_by_a_stranger(orphans):
        one_writer(branches)
    st = orphans.stat()
    assert (st.st_uid, stat.S_IMODE(st.st_mode)) == (0, 0o700)
    left = [name for name in os.listdir(top) if name != ".wh..wh.orph"]
    # With content it stays, under a name that is invisible and swept.
    assert all(whiteout.is_temporary(os.fsencode(name)) for name in left)
    assert len(left) == content


def test_a_replacement_that_comes_second_is_taken_back(
    branches: BranchSet, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another mount has replaced the same directory, and locked its own, since we found it to be open to others."""
    orphans = top / ".wh..wh.orph"
    orphans.mkdir()
    orphans.chmod(0o755)
    first, second = WriteLocks(), WriteLocks()
    replace = writelock._replace

    def late(root_fd: int, directory: bytes, bad_fd: int) -> bool:
        monkeypatch.setattr(writelock, "_replace", replace)
        first.take([branches[0]], 0.0)
        return replace(root_fd, directory, bad_fd)

    monkeypatch.setattr(writelock, "_replace", late)
    with pytest.raises(UserError, match="written to by another mount"):
        second.take([branches[0]], 0.0)
    first.close()
    second.take([branches[0]], 0.0)
    second.close()
    assert os.listdir(top) == [".wh..wh.orph"]


def test_where_nothing_can_be_replaced_there_is_no_lock(
    branches: BranchSet, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without RENAME_EXCHANGE: a stranger's lock does not count."""

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(syscalls, "rename_at", refuse)
    (top / ".wh..wh.orph").mkdir()
    (top / ".wh..wh.orph").chmod(0o755)
    with locked_by_a_stranger(top / ".wh..wh.orph"):
        one = WriteLocks()
        one.take([branches[0]], 0.0)
        one.close()
    assert os.listdir(top) == [".wh..wh.orph"]
