"""Copy-ups of files that somebody writes to directly meanwhile: what is published is a state that the file had.

What else may happen while the bytes travel is in test_fs.py.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.t2_core.core import STRATEGIES, Core, core, refuse_tmpfile
from udbad.branch import copydata, datacalls, syscalls
from udbad.types import CopyMethod, Trigger
from udbad.union import copyup
from udbad.union.fs import SetAttr
from udbad.union.superblock import NeedCopyUp

SIZE = 200_000
"""Bytes; two chunks of a copy below."""

Meanwhile = Callable[[Callable[[int], None]], None]


@pytest.fixture(params=list(STRATEGIES))
def union(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Core]:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/file").write_bytes(b"0" * SIZE)
    with core(tmp_path, udba=request.param) as made:
        on_a(made, "nfs")
        yield made


@pytest.fixture
def meanwhile(union: Core, monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """meanwhile(write): `write` is called with the number of the attempt in the middle of each copy, on its half."""
    monkeypatch.setattr(datacalls, "reflink", lambda *_: False)
    monkeypatch.setattr(copydata, "KERNEL_CHUNK", SIZE // 2)

    def install(write: Callable[[int], None]) -> None:
        original = copydata._Copier._copy_in_kernel
        calls = 0

        def copy_half(self: copydata._Copier, offset: int, count: int) -> int:
            nonlocal calls
            if offset == SIZE // 2:
                calls += 1
                write(calls)
            return original(self, offset, count)

        monkeypatch.setattr(copydata._Copier, "_copy_in_kernel", copy_half)

    return install


def on_a(union: Core, file_system: str, ordered: bool = False) -> None:
    """Have the top branch look as one on another file system, whatever this one is; ordered: Branch.keeps_order."""
    branch = union.sb.branches[0]
    as_there = branch.but(fs_type=file_system, keeps_order=ordered)
    for name in ("fs_type", "in_memory", "local", "may_reflink", "keeps_order"):
        object.__setattr__(branch, name, getattr(as_there, name))


def copy_up(union: Core) -> None:
    copyup.run(union.sb, NeedCopyUp(union.find("file"), Trigger.WRITE))


def overwrite(path: Path, mark: int) -> None:
    """Both halves, so that a copy of one half from before and one from after is no state of the file."""
    with path.open("r+b") as stream:
        stream.write(b"%d" % mark * SIZE)


def test_a_file_that_is_overwritten_once_is_copied_again(union: Core, meanwhile: Meanwhile) -> None:
    meanwhile(lambda attempt: overwrite(union["base"] / "file", 1) if attempt == 1 else None)
    copy_up(union)
    assert (union["top"] / "file").read_bytes() == b"1" * SIZE


def test_a_file_that_is_overwritten_all_the_time_is_not_published(union: Core, meanwhile: Meanwhile) -> None:
    path = union["base"] / "file"
    meanwhile(lambda attempt: overwrite(path, attempt) if attempt <= 3 else None)
    handle = union.open("file", os.O_RDWR)
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        union.write(handle, b"x")
    assert [name for name in os.listdir(union["top"]) if "file" in name] == []
    assert union.read(handle, 1) == path.read_bytes()[:1] != b"0", "the lower file goes on being shown"
    union.write(handle, b"x")  # nobody writes any more
    assert (union["top"] / "file").read_bytes() == b"x" + path.read_bytes()[1:]


def test_a_log_that_is_appended_to_all_the_time_is_copied(union: Core, meanwhile: Meanwhile) -> None:
    path = union["base"] / "file"

    def append(_attempt: int) -> None:
        with path.open("ab") as stream:
            stream.write(b"+")

    meanwhile(append)
    copy_up(union)
    assert (union["top"] / "file").read_bytes() == b"0" * SIZE, "all that was there when it began, and no more"


def test_a_file_that_is_cut_while_it_is_copied(union: Core, meanwhile: Meanwhile) -> None:
    meanwhile(lambda attempt: os.truncate(union["base"] / "file", SIZE // 2 + 5) if attempt == 1 else None)
    copy_up(union)
    assert (union["top"] / "file").read_bytes() == b"0" * (SIZE // 2 + 5)


def test_attributes_that_change_meanwhile_are_those_of_the_copy(union: Core, meanwhile: Meanwhile) -> None:
    """The content is as it was, so it is not copied again; the mode from before would show what was just hidden."""
    attempts: list[int] = []

    def close_to_others(attempt: int) -> None:
        attempts.append(attempt)
        (union["base"] / "file").chmod(0o600)

    meanwhile(close_to_others)
    copy_up(union)
    assert attempts == [1]
    assert (union["top"] / "file").stat().st_mode & 0o777 == 0o600


def test_a_change_within_a_tick_of_the_clock(
    union: Core, meanwhile: Meanwhile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where time stamps are ticks a write may leave all of them as they were: content tells, while they are racy."""
    path = union["base"] / "file"

    def unseen(attempt: int) -> None:
        if attempt == 1:
            overwrite(path, 1)

    meanwhile(unseen)
    monkeypatch.setattr(copyup, "stamp", lambda _st: (0, 0, 0, 0))
    monkeypatch.setattr(copyup, "is_racy", lambda *_: True)
    copy_up(union)
    assert (union["top"] / "file").read_bytes() == b"1" * SIZE


def test_a_reflink_is_one_state_whatever_comes_after(union: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def clone(src: int, dst: int) -> bool:
        calls.append(os.pwrite(dst, os.pread(src, SIZE, 0), 0))
        overwrite(union["base"] / "file", len(calls))
        return True

    monkeypatch.setattr(datacalls, "reflink", clone)
    copy_up(union)
    assert calls == [SIZE]
    assert (union["top"] / "file").read_bytes() == b"0" * SIZE


# -- what is synced, and when ---------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """fsync, close(2)'s question and rename, in the order they come."""
    done: list[str] = []

    def record(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: object) -> object:
            done.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, call)

    record(os, "fsync")
    record(datacalls, "write_out")
    record(datacalls, "flush")
    record(syscalls, "rename_at")
    record(syscalls, "link_fd")
    return done


@pytest.mark.parametrize(
    ("file_system", "options", "content", "length", "expected"),
    [
        ("ext4", {}, b"data", None, ["fsync", "link_fd"]),
        ("ext4", {}, b"data", 2, ["fsync", "link_fd"]),
        ("ext4", {}, b"data", 0, ["link_fd"]),
        ("ext4", {}, b"", None, ["link_fd"]),
        ("ext4, ordered", {}, b"data", None, ["write_out", "link_fd"]),
        ("ext4, ordered", {}, b"data", 0, ["link_fd"]),
        ("tmpfs", {}, b"data", None, ["link_fd"]),
        ("ext4", {"fsync_copyup": False}, b"data", None, ["link_fd"]),
        ("ext4, ordered", {"fsync_copyup": False}, b"data", None, ["link_fd"]),
        ("nfs", {}, b"data", None, ["fsync", "link_fd"]),
        ("nfs", {}, b"data", 0, ["flush", "link_fd"]),
        ("nfs", {}, b"", None, ["flush", "link_fd"]),
        ("nfs", {"fsync_copyup": False}, b"data", None, ["flush", "link_fd"]),
    ],
)
def test_content_is_on_disk_before_it_has_a_name(
    tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch,
    file_system: str, options: dict[str, Any], content: bytes, length: int | None, expected: list[str],
) -> None:  # fmt: skip
    """Nothing to sync: no content is wanted, or none would outlive the power anyway. close(2) is asked at least, where
    it has something to tell."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/file").write_bytes(content)
    monkeypatch.setattr(datacalls, "reflink", lambda *_: False)
    with core(tmp_path, **options) as union:
        name, _, ordered = file_system.partition(", ")
        on_a(union, name, bool(ordered))
        copyup.run(union.sb, NeedCopyUp(union.find("file"), Trigger.TRUNCATE, length))
    assert steps == expected


def test_a_file_system_without_files_of_no_name(union: Core, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_tmpfile(monkeypatch)
    copy_up(union)
    assert steps[-1] == "rename_at"
    assert [name for name in os.listdir(union["top"]) if "file" in name] == ["file"]
    assert (union["top"] / "file").read_bytes() == (union["base"] / "file").read_bytes()


def test_what_is_shared_needs_no_sync(union: Core, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datacalls, "reflink", lambda src, dst: os.pwrite(dst, os.pread(src, SIZE, 0), 0) > 0)
    job = copyup.begin(union.sb, NeedCopyUp(union.find("file"), Trigger.WRITE))
    assert job is not None
    try:
        copyup.transfer(job)
        assert job.method is CopyMethod.REFLINK
    finally:
        copyup.abort(job)
    assert steps == ["flush"]


def test_the_home_of_a_pseudo_link_is_synced_and_an_unnamed_copy_is_not(union: Core, steps: list[str]) -> None:
    """The first is found again after a power failure, the other one never."""
    base = union["base"]
    for name in ("one", "two", "alone"):
        (base / name).write_bytes(b"data")
    (base / "two").unlink()
    os.link(base / "one", base / "two")
    for name, expected in (("one", ["fsync", "rename_at"]), ("alone", ["flush"])):
        handle = union.open(name, os.O_RDWR)
        union.unlink(name)
        steps.clear()
        union.write(handle, b"DATA")
        assert steps == expected, name
    assert union.content("two") == b"DATA"


@pytest.mark.parametrize("file_system", [("nfs",), ("ext4",), ("ext4", True)])
def test_an_error_that_close_would_tell_comes_before_the_name(
    union: Core, monkeypatch: pytest.MonkeyPatch, file_system: tuple[Any, ...]
) -> None:
    def over_quota(_fd: int) -> None:
        raise OSError(errno.EDQUOT, "injected")

    for call in ("flush", "write_out"):
        monkeypatch.setattr(datacalls, call, over_quota)
    monkeypatch.setattr(os, "fsync", over_quota)
    on_a(union, *file_system)
    with pytest.raises(OSError, match="injected"):
        copy_up(union)
    assert [name for name in os.listdir(union["top"]) if "file" in name] == []
    assert union.find("file").branch.index == 1


# -- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"small", b"0" * SIZE])
@pytest.mark.parametrize("named", [False, True])
def test_a_copy_has_its_attributes_before_its_name(
    union: Core, monkeypatch: pytest.MonkeyPatch, content: bytes, named: bool
) -> None:
    """So nobody sees others, and no event is of a name that the file had before."""
    (union["base"] / "file").write_bytes(content)
    seen: list[tuple[int, int]] = []
    link, rename = syscalls.link_fd, syscalls.rename_at

    def note(st: os.stat_result) -> None:
        seen.append((st.st_mode & 0o7777, st.st_mtime_ns))

    def link_fd(fd: int, *to: Any) -> None:
        note(os.fstat(fd))
        link(fd, *to)

    def rename_at(dirfd: int, name: bytes, *to: Any) -> None:
        note(os.stat(name, dir_fd=dirfd))
        rename(dirfd, name, *to)

    if named:
        refuse_tmpfile(monkeypatch)
    monkeypatch.setattr(syscalls, "link_fd", link_fd)
    monkeypatch.setattr(syscalls, "rename_at", rename_at)
    changes = SetAttr(mode=0o640, mtime_ns=1_000_000_001)
    node, st = union.run(lambda: union.fs.setattr(union.find("file").id, changes, None, union.caller))
    assert seen == [(0o640, 1_000_000_001)]
    assert node.branch.index == 0
    there = (union["top"] / "file").stat()
    assert (st.st_ino, st.st_mode, st.st_ctime_ns, st.st_nlink) == (
        there.st_ino, there.st_mode, there.st_ctime_ns, there.st_nlink,
    )  # fmt: skip
    assert (union["top"] / "file").read_bytes() == content
    assert (union["base"] / "file").stat().st_mode & 0o7777 != 0o640


def test_attributes_that_cannot_be_set_leave_no_copy(union: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    change = syscalls.chmod_fd

    def refuse(fd: int, mode: int) -> None:
        if mode == 0o640:
            raise OSError(errno.EPERM, "injected")
        change(fd, mode)

    monkeypatch.setattr(syscalls, "chmod_fd", refuse)
    with pytest.raises(OSError, match="injected"):
        union.run(lambda: union.fs.setattr(union.find("file").id, SetAttr(mode=0o640), None, union.caller))
    assert [name for name in os.listdir(union["top"]) if "file" in name] == []
    assert union.find("file").branch.index == 1


# -- moo ------------------------------------------------------------------------------------------


@pytest.fixture(params=list(STRATEGIES))
def moving(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Core]:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/file").write_bytes(b"data")
    with core(tmp_path, {"top": "rw", "base": "rw+moo"}, udba=request.param) as made:
        on_a(made, "ext4")
        yield made


def test_a_source_goes_when_the_name_of_the_copy_is_on_disk(moving: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the directories that were made for it: so the whole file system is synced, as mvdown does."""
    there: list[tuple[bool, bool]] = []
    paths = [moving[name] / "file" for name in ("top", "base")]
    monkeypatch.setattr(datacalls, "sync_fs", lambda _fd: there.append((paths[0].exists(), paths[1].exists())))
    assert moving.content("file") == b"data"
    assert there == [(True, True)]
    assert [path.exists() for path in paths] == [True, False]


@pytest.mark.parametrize("how", ["changed", "replaced", "removed", "open for writing"])
def test_a_source_that_is_in_use_stays(moving: Core, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """It is covered by the copy, and nobody loses what he wrote."""
    path = moving["base"] / "file"
    writers: list[int] = []

    def meanwhile(_fd: int) -> None:
        if how == "changed":
            path.write_bytes(b"new data")
        elif how == "open for writing":
            writers.append(os.open(path, os.O_RDWR))
        else:
            path.unlink()
            if how == "replaced":
                path.write_bytes(b"new data")

    monkeypatch.setattr(datacalls, "sync_fs", meanwhile)
    try:
        assert moving.content("file") == b"data"
        assert path.exists() == (how != "removed")
    finally:
        for fd in writers:
            os.close(fd)
