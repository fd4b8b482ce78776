"""Whether two objects are told apart by what they differ in, and by nothing else; and who writes to a file."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from udbad.branch import syscalls
from udbad.branch.compare import CONTENT, MODE, OWNER, TIME, TYPE, XATTR, differences

NS = 10**18


@pytest.fixture
def dirfd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH)
    try:
        yield fd
    finally:
        os.close(fd)


def pair(tmp_path: Path, content: bytes = b"the same") -> tuple[Path, Path]:
    """Two equal files a and b."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(content)
    os.utime(first, ns=(NS, NS))
    shutil.copy2(first, second)
    return first, second


def _become_a_symlink(path: Path) -> None:
    path.unlink()
    path.symlink_to("x")


CHANGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "nothing": (lambda path: None, set()),
    "atime": (lambda path: os.utime(path, ns=(1, NS)), set()),
    "mtime": (lambda path: os.utime(path, ns=(NS, NS + 1)), {TIME}),
    "mode": (lambda path: path.chmod(0o4600), {MODE}),
    "xattr": (lambda path: os.setxattr(path, "user.word", b"x"), {XATTR}),
    "another file": (_become_a_symlink, {TYPE}),
    "size": (lambda path: path.write_bytes(b"the same and more"), {CONTENT, TIME}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs(tmp_path: Path, dirfd: int, change: str) -> None:
    _, second = pair(tmp_path)
    act, expected = CHANGES[change]
    act(second)
    assert differences(dirfd, b"a", dirfd, b"b") == expected
    assert differences(dirfd, b"b", dirfd, b"a") == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="ok: only root gives files away")
def test_owner(tmp_path: Path, dirfd: int) -> None:
    _, second = pair(tmp_path)
    os.chown(second, 1, 2)
    assert differences(dirfd, b"a", dirfd, b"b") == {OWNER}


@pytest.mark.parametrize("size", [1, 4096, (1 << 20) + 1, 3 << 20])
@pytest.mark.parametrize("place", ["first", "last"])
def test_one_byte_of_equal_size_and_time(tmp_path: Path, dirfd: int, size: int, place: str) -> None:
    _, second = pair(tmp_path, b"x" * size)
    assert not differences(dirfd, b"a", dirfd, b"b")
    with second.open("r+b") as stream:
        stream.seek(0 if place == "first" else size - 1)
        stream.write(b"y")
    os.utime(second, ns=(NS, NS))
    assert differences(dirfd, b"a", dirfd, b"b") == {CONTENT}


def test_holes_are_zeros_and_are_not_read(tmp_path: Path, dirfd: int) -> None:
    size = 1 << 43  # reading that would not end
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(size)
            stream.seek(1 << 30)
            stream.write(b"data")
        os.utime(tmp_path / name, ns=(NS, NS))
    assert not differences(dirfd, b"a", dirfd, b"b")
    with (tmp_path / "b").open("r+b") as stream:
        stream.seek(1 << 42)
        stream.write(b"\0" * 5000)
    os.utime(tmp_path / "b", ns=(NS, NS))
    assert not differences(dirfd, b"a", dirfd, b"b")
    with (tmp_path / "b").open("r+b") as stream:
        stream.seek(1 << 42)
        stream.write(b"1")
    os.utime(tmp_path / "b", ns=(NS, NS))
    assert differences(dirfd, b"a", dirfd, b"b") == {CONTENT}


def test_symlinks_and_directories(tmp_path: Path, dirfd: int) -> None:
    for name, target in (("a", b"\xff/x"), ("b", b"\xff/x"), ("c", b"\xff/y")):
        os.symlink(target, os.fsencode(tmp_path / name))
        os.utime(tmp_path / name, ns=(NS, NS), follow_symlinks=False)
    assert not differences(dirfd, b"a", dirfd, b"b")
    assert differences(dirfd, b"a", dirfd, b"c") == {CONTENT}
    for name in ("d", "e"):
        (tmp_path / name).mkdir()
    (tmp_path / "e" / "in").touch()
    assert not differences(dirfd, b"d", dirfd, b"e")
    (tmp_path / "e").chmod(0o700)
    assert differences(dirfd, b"d", dirfd, b"e") == {MODE}


def test_who_writes(tmp_path: Path, dirfd: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4096)
    assert not syscalls.is_being_written(dirfd, b"file")
    with path.open("rb"):
        assert not syscalls.is_being_written(dirfd, b"file")
    with path.open("ab"):
        assert syscalls.is_being_written(dirfd, b"file")
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, 4096):
        os.close(fd)
        assert syscalls.is_being_written(dirfd, b"file")
    assert not syscalls.is_being_written(dirfd, b"file")
    fd = os.open(path, os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    assert syscalls.is_being_written(dirfd, b"file")
    os.close(fd)
    with path.open("ab"):  # no lease is left that an open would wait for
        pass
