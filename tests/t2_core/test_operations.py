"""Operations without a kernel: what is left to a thread, and what is left behind when that fails."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.t2_core.core import STRATEGIES, Core, core
from udbad.branch import datacalls, syscalls
from udbad.coherence.base import Coherence
from udbad.edge.operations import Later, Operations


def operations(union: Core) -> Operations:
    assert isinstance(union.sb.changes.hooks, Coherence)
    return Operations(union.fs, union.sb.changes.hooks, lambda call, then: None)


def perform(operation: Callable[..., None], *arguments: object) -> None:
    """With what is left to a thread, in one."""
    try:
        operation(*arguments)
    except Later as later:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(later.call, *later.args).result()


@pytest.fixture(params=list(STRATEGIES))
def union(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Core]:
    for name in ("top/d", "middle/d", "base/d"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "top/f").write_bytes(b"top")
    (tmp_path / "base/lower").write_bytes(b"lower")
    with core(tmp_path, {"top": "rw", "middle": "rw", "base": "ro"}, udba=request.param) as made:
        yield made


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """(call, path) of every fsync and fdatasync from now on."""
    calls: list[tuple[str, Path]] = []

    def record(name: str) -> Callable[[int], None]:
        return lambda fd: calls.append((name, Path(os.readlink(f"/proc/self/fd/{fd}"))))

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, record(name))
    return calls


# -- fsync ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data_only", "call"), [(False, "fsync"), (True, "fdatasync")])
def test_fsync_is_about_the_file_not_about_the_descriptor(
    union: Core, synced: list[tuple[str, Path]], data_only: bool, call: str
) -> None:
    """`sync FILE` opens for reading; of a lower file too, which others may have written to."""
    ops = operations(union)
    for name in ("f", "lower"):
        for flags in (os.O_RDONLY, os.O_RDWR):
            handle = union.open(name, flags)
            synced.clear()
            perform(ops.fsync, handle.fh, data_only)
            assert [(done, path.name) for done, path in synced] == [(call, name)]


def test_fsync_follows_a_copy_up(union: Core, synced: list[tuple[str, Path]]) -> None:
    reader, writer = union.open("lower"), union.open("lower", os.O_RDWR)
    union.write(writer, b"LOW")
    synced.clear()
    perform(operations(union).fsync, reader.fh, False)
    assert len(synced) == 1
    assert os.fstat(reader.fd).st_ino == (union["top"] / "lower").stat().st_ino


@pytest.mark.parametrize(("number", "seen"), [(errno.EIO, errno.EIO), (errno.EINVAL, 0)])
def test_what_fsync_says_is_told(union: Core, monkeypatch: pytest.MonkeyPatch, number: int, seen: int) -> None:
    """EINVAL: the file system has no fsync, as squashfs."""

    def fail(_fd: int) -> None:
        raise OSError(number, "injected")

    monkeypatch.setattr(os, "fsync", fail)
    told = 0
    try:
        perform(operations(union).fsync, union.open("f").fh, False)
    except OSError as error:
        told = error.errno or 0
    assert told == seen


def test_fsync_of_a_directory_is_of_every_writable_branch(union: Core, synced: list[tuple[str, Path]]) -> None:
    handle = union.fs.opendir(union.find("d").id)
    perform(operations(union).fsyncdir, handle.fh, False)
    assert [(call, path.name) for call, path in synced] == [("fsync", "d")] * 2


@pytest.mark.parametrize("failing", ["fsync", "open_listing"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_failing_fsync_of_a_directory_leaves_no_descriptor(
    union: Core, monkeypatch: pytest.MonkeyPatch, failing: str, after: int
) -> None:
    """The fixture that every test has counts them, too; here they are named."""
    handle = union.fs.opendir(union.find("d").id)
    module = os if failing == "fsync" else syscalls
    original = getattr(module, failing)
    left = after

    def fail(fd: int) -> object:
        nonlocal left
        if left == 0:
            raise OSError(errno.EIO, "injected")
        left -= 1
        return original(fd)

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(module, failing, fail)
    with pytest.raises(OSError, match="injected") as caught:
        perform(operations(union).fsyncdir, handle.fh, False)
    assert caught.value.errno == errno.EIO
    assert set(os.listdir("/proc/self/fd")) == before


# -- close ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [False, True])
def test_close_is_asked_about_where_it_may_have_an_error(
    union: Core, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    """Only of what was written, and in a thread, as a server may be slow."""
    asked: list[tuple[int, bool]] = []

    def over_quota(fd: int) -> None:
        asked.append((fd, threading.current_thread() is threading.main_thread()))
        raise OSError(errno.EDQUOT, "injected")

    for branch in union.sb.branches.branches:
        object.__setattr__(branch, "local", local)
    monkeypatch.setattr(datacalls, "flush", over_quota)
    ops = operations(union)
    for name, flags in (("f", os.O_RDONLY), ("lower", os.O_RDWR)):  # the second one has not been written to
        perform(ops.flush, union.open(name, flags).fh)
    assert asked == []
    writer = union.open("f", os.O_WRONLY)
    if local:
        perform(ops.flush, writer.fh)
        assert asked == []
    else:
        with pytest.raises(OSError, match="injected") as caught:
            perform(ops.flush, writer.fh)
        assert caught.value.errno == errno.EDQUOT
        assert asked == [(writer.fd, False)]


@pytest.mark.parametrize(
    ("flags", "all_local", "elsewhere"),
    [(os.O_RDONLY, False, False), (os.O_WRONLY, False, True), (os.O_RDWR, True, True)],
    ids=["read", "write", "both"],
)
def test_who_is_asked_about(union: Core, flags: int, all_local: bool, elsewhere: bool) -> None:
    """A lower file that is going to be copied up counts as what it will be; a shared mapping needs O_RDWR."""
    for local, expected in ((True, all_local), (False, elsewhere)):
        object.__setattr__(union.sb.branches, "close_may_fail", not local)
        assert union.fs.needs_flush(flags | os.O_APPEND) == expected
