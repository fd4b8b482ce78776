"""Files and directories that the kernel has open without telling (io=cached)."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.t2_core.core import core
from tests.t2_core.killed import Killed, Mount, mounted
from udbad.kernel import wire
from udbad.types import ROOT_ID

LAYERS = {"top": "rw"}


def ask(mount: Mount, opcode: int, node: int, body: bytes) -> bytes:
    mount.send(opcode, node, body)
    reply = mount.answer()
    assert reply is not None
    assert reply[1] == 0, os.strerror(reply[1])
    return reply[2]


def look_up(mount: Mount, name: bytes) -> int:
    number: int = wire.QWORD.unpack_from(ask(mount, wire.LOOKUP, ROOT_ID, name + b"\0"))[0]
    return number


def listing(mount: Mount, node: int) -> bytes:
    """READDIRPLUS from the beginning, by whoever has it open without a handle."""
    return ask(mount, wire.READDIRPLUS, node, struct.pack("<QQIIQII", 0, 0, 4096, 0, 0, 0, 0))


def test_a_handle_does_not_outlive_its_directory(tmp_path: Path) -> None:
    """A process is killed while it forgets a directory that had been read. That the handle was closed is not in the
    record, as no answer follows a FORGET. Who comes to have the number next, or the same directory, which is looked up
    again, must not be read by it: its descriptors are closed (ESTALE, or no names)."""
    (tmp_path / "top/d").mkdir(parents=True)
    with mounted(tmp_path, LAYERS, cached=True, udba="none") as first:
        number = look_up(first, b"d")
        listing(first, number)
        with patch.object(os, "close", side_effect=Killed), pytest.raises(Killed):
            first.send(wire.FORGET, number, wire.QWORD.pack(1))
        (tmp_path / "top/d/x").touch()
        with mounted(tmp_path, LAYERS, first.record, cached=True, udba="none") as second:
            assert look_up(second, b"d") == number
            assert b"x" in listing(second, number)


def test_nobody_is_woken_while_nothing_is_written(tmp_path: Path) -> None:
    """What closes files that were written to runs while there are some: an idle mount process sleeps."""
    with core(tmp_path) as union:
        union.fs.keep_files(64)
        kept = union.fs.kept
        assert kept is not None
        woken = []
        kept.on_written = lambda: woken.append(kept.rest(0.0))
        handle = union.create("f")
        assert woken == [False], "it is made open for writing"
        for turn in range(2, 4):
            assert (kept.rest(), handle.writable) == (True, True), "it was made or written to a moment ago"
            assert (kept.rest(0.0), handle.writable) == (False, False)
            for _ in range(2):
                kept.write(union.fs.creds, handle, 0, b"new", 0)
            assert len(woken) == turn
        kept.leave(())
        kept.open(-union.find("f").id)
        assert (len(woken), kept.rest(0.0)) == (3, False), "it is read"
        kept.leave(())


def test_more_files_are_written_than_are_kept(tmp_path: Path) -> None:
    """Each for the first time within a moment, as somebody copies many small files in: the one that is being written is
    not closed to make room, and those before it are, though they were written to just now."""
    most = 8
    with core(tmp_path) as union:
        union.fs.keep_files(most)
        kept = union.fs.kept
        assert kept is not None
        names = [f"f{number}" for number in range(3 * most)]
        for name in names:
            union.create(name)
            assert len(kept) <= most
        for name in names:
            assert union.fs.write_kept(-union.find(name).id, 0, name.encode(), 0) == len(name)
            assert len(kept) <= most
        assert [(tmp_path / "top" / name).read_text() for name in names] == names
        kept.leave(())
