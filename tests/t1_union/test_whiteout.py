"""Temporary names: always possible, always another one, always known for what they are. And what is in a directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from udbad.branch import whiteout
from udbad.branch.whiteout import MAX_NAME, is_temporary, temporary_name


@pytest.mark.parametrize(
    "name",
    [
        *(b"a", b"a.b", b"new\nline"),
        *(b"n" * length for length in (233, 234, 235, MAX_NAME)),
        *(b"\xff" * MAX_NAME, b"\x80" * MAX_NAME),
    ],
    ids=lambda name: f"{name[:9]!r}-{len(name)}",
)
def test_a_name_that_can_be_made(tmp_path: Path, name: bytes) -> None:
    tmp = temporary_name(name)
    os.close(os.open(os.path.join(os.fsencode(tmp_path), tmp), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    assert is_temporary(tmp)
    assert tmp.startswith(whiteout.RESERVED + name[:234] + b".")


@pytest.mark.parametrize("character", ["\u00e9", "\u20ac", "\U0001f600"])
@pytest.mark.parametrize("before", range(4))
def test_characters_are_not_cut(character: str, before: int) -> None:
    """For file systems that refuse names that are no UTF-8."""
    name = (b"x" * before + character.encode() * 121)[:MAX_NAME].decode(errors="ignore").encode()
    tmp = temporary_name(name)
    assert 255 - 3 <= len(tmp) <= 255
    assert name.decode().startswith(tmp.decode()[len(whiteout.RESERVED) : -13])


def test_no_name_comes_twice() -> None:
    """With four digits 300 names had two alike more often than not."""
    assert len({temporary_name(b"name") for _ in range(20_000)}) == 20_000


@pytest.mark.parametrize("name", [b".wh..wh.aufs", b".wh..wh.plnk", b".wh..wh.orph", b".wh..wh.udbad", b".wh..wh..opq"])
def test_what_is_no_temporary_name(name: bytes) -> None:
    assert not is_temporary(name)


@pytest.mark.parametrize("overlay", [False, True])
def test_nothing_is_in_a_directory_that_was_removed(tmp_path: Path, overlay: bool) -> None:
    (tmp_path / "d").mkdir()
    directory = os.open(tmp_path / "d", os.O_PATH)
    try:
        (tmp_path / "d").rmdir()
        assert whiteout.names_in(directory, overlay) == []
    finally:
        os.close(directory)
