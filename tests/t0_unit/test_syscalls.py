"""A name that has turned into something else between two looks at it is ESTALE: what is there now is found next."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.uncompiled import from_source
from udbad.branch import syscalls


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


KINDS: dict[str, Callable[[Path], object]] = {
    "symlink": lambda path: path.symlink_to("target"),
    "directory": lambda path: path.mkdir(),
    "fifo": lambda path: os.mkfifo(path),
    "device": lambda path: os.mknod(path, 0o20600, os.makedev(1, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY], ids=["read", "write"])
def test_opening_a_file(tmp_path: Path, directory: int, kind: str, flags: int) -> None:
    (tmp_path / "target").touch()
    KINDS[kind](tmp_path / "name")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Stale file handle") as caught:
        syscalls.open_file_at(directory, b"name", flags)
    assert caught.value.errno == errno.ESTALE
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "symlink"])
def test_reading_a_symlink(tmp_path: Path, directory: int, kind: str) -> None:
    KINDS[kind](tmp_path / "name")
    with pytest.raises(OSError, match="Stale file handle") as caught:
        syscalls.readlink_at(directory, b"name")
    assert caught.value.errno == errno.ESTALE


def test_what_is_not_there(directory: int) -> None:
    with pytest.raises(FileNotFoundError):
        syscalls.open_file_at(directory, b"name", os.O_RDONLY)
    with pytest.raises(FileNotFoundError):
        syscalls.readlink_at(directory, b"name")


def test_a_file_without_a_name_in_a_removed_directory(tmp_path: Path) -> None:
    """Only some file systems refuse it, ext4 among them; the error is that of any other new file."""
    (tmp_path / "d").mkdir()
    directory = os.open(tmp_path / "d", os.O_PATH | os.O_DIRECTORY)
    try:
        (tmp_path / "d").rmdir()
        with suppress(FileNotFoundError):
            os.close(syscalls.open_tmpfile(directory, 0o600))
    finally:
        os.close(directory)


def test_a_refused_file_without_a_name(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPERM stays what it is in a directory that is there. In Python, as nobody refuses it to C."""
    calls = from_source(syscalls)

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        calls.open_tmpfile(directory, 0o600)
