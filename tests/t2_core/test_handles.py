"""Open files whose close(2) fails on the branch, as it may on NFS, CIFS, FUSE and with quotas.

The descriptor is free all the same, and its number the next file's.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.t2_core.core import STRATEGIES, Core, core
from udbad.union.fs import SetAttr

Fail = Callable[[], None]


@pytest.fixture
def failing_close(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fail]:
    """Call it, and from then on every close of a regular file opened for writing reports EDQUOT, and closes it."""
    close = os.close

    def report(fd: int) -> None:
        writable = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_PATH | os.O_ACCMODE) in (os.O_WRONLY, os.O_RDWR)
        close(fd)
        if writable:
            raise OSError(errno.EDQUOT, "injected")

    yield lambda: monkeypatch.setattr(os, "close", report)
    monkeypatch.undo()


@pytest.fixture(params=list(STRATEGIES))
def union(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Core]:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/lower").write_bytes(b"lower")
    with core(tmp_path, udba=request.param) as made:
        yield made


def test_a_release_leaves_nothing_whatever_close_says(union: Core, failing_close: Fail) -> None:
    """The recycled number must not be taken for the file: its stat showed another file's."""
    other = union.create("other", b"something longer")
    handle = union.create("file", b"text")
    node, number = handle.node, handle.fd
    failing_close()
    union.fs.release(handle.fh)
    recycled = os.open(union["top"] / "other", os.O_RDONLY)
    try:
        assert recycled == number, "or this test shows nothing"
        assert node.handles is None
        (union["top"] / "file").unlink()
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
            union.sb.stat(node)
    finally:
        os.close(recycled)
    union.fs.release(other.fh)
    assert union.fs.handles.files == {}
    union.forget_all()
    assert set(union.sb.table.nodes) == {1}


def test_a_file_without_a_name_lets_its_copy_go(union: Core, failing_close: Fail) -> None:
    handle = union.open("lower", os.O_RDWR)
    union.unlink("lower")
    union.write(handle, b"LOW")
    node = handle.node
    failing_close()
    union.fs.release(handle.fh)
    union.forget_all()
    assert node.orphan_fd == -1
    assert set(union.sb.table.nodes) == {1}


def test_readers_and_writers_follow_a_copy_up(union: Core, failing_close: Fail) -> None:
    """What closes in between is a second descriptor of the same file."""
    reader, writer = union.open("lower"), union.open("lower", os.O_RDWR)
    failing_close()
    assert union.write(writer, b"LOW") == 3
    assert union.read(reader) == union.read(writer) == b"LOWer"
    union.run(lambda: union.fs.setattr(writer.node.id, SetAttr(mode=0o600), None, union.caller))
    assert union.write(writer, b"L") == 1
    here = (union["top"] / "lower").stat().st_ino
    assert [os.fstat(handle.fd).st_ino for handle in (reader, writer)] == [here, here]
