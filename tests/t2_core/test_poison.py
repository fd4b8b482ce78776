"""Which request a process is said to have died of."""

from __future__ import annotations

import errno
import gc
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier, get_ident

import pytest

from tests.t2_core.killed import UNIQUE, Killed, Mount, mounted
from udbad.edge import poison
from udbad.edge.poison import DEATHS
from udbad.inodes.record import Record
from udbad.inodes.slot import RESENT
from udbad.kernel import wire
from udbad.types import ROOT_ID
from udbad.union import create

LAYERS = {"top": "rw", "base": "ro"}
MKDIR = struct.pack("<II", 0o755, 0)
OTHER = UNIQUE + 2


class Processes:
    """One after the other, all of which are killed when they make a directory with `name`."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self.record: Record | None = None
        self.name = b""

    def next(self) -> Mount:
        mount = self._stack.enter_context(mounted(self._directory, LAYERS, self.record))
        self.record = mount.record
        return mount

    def mkdir(self, name: bytes, unique: int) -> int | None:
        """The errno that the next process answers; None when it is killed."""
        mount = self.next()
        try:
            mount.send(wire.MKDIR, ROOT_ID, MKDIR + name + b"\0", unique)
        except Killed:
            return None
        answer = mount.answer()
        assert answer is not None
        return answer[1]


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    with ExitStack() as stack:
        made = Processes(tmp_path, stack)
        make: Callable[..., object] = create.mkdir

        def mkdir(sb: object, creds: object, parent: object, name: bytes, *rest: object) -> object:
            if name == made.name:
                raise Killed
            return make(sb, creds, parent, name, *rest)

        monkeypatch.setattr(create, "mkdir", mkdir)
        made.name = b"poison"
        yield made
    made.record = None
    gc.collect()  # slots are used until then


def test_it_is_refused(processes: Processes, expect_log: Callable[[str], None]) -> None:
    """And whatever asks for the same, sent again or not, by every process to come."""
    assert processes.mkdir(b"poison", UNIQUE) is None
    for _ in range(DEATHS - 1):
        assert processes.mkdir(b"poison", UNIQUE | RESENT) is None
    expect_log(f"{DEATHS} processes died of a request: mkdir of /poison")
    assert processes.mkdir(b"poison", UNIQUE | RESENT) == errno.EIO
    assert processes.mkdir(b"poison", OTHER) == errno.EIO
    assert processes.mkdir(b"other", OTHER) == 0
    last = processes.next()
    assert last.native.slot is not None
    assert last.native.slot.counts() == (DEATHS, 0, 0, 2)


def test_another_one_is_not(processes: Processes) -> None:
    """Of so many deaths, not one request had all."""
    for number in range(DEATHS):
        assert processes.mkdir(b"poison", UNIQUE + 2 * number) is None
    processes.name = b""
    assert processes.mkdir(b"poison", UNIQUE | RESENT) == 0


def test_what_they_did_not_die_of(processes: Processes) -> None:
    """Somebody has told so."""
    for number in range(DEATHS + 1):
        assert processes.mkdir(b"poison", UNIQUE | (RESENT if number else 0)) is None
        assert processes.record is not None
        poison.absolve(processes.record.slots)


def test_what_waits(processes: Processes, tmp_path: Path) -> None:
    """A copy-up whose end nobody lives to see."""
    size = 1 << 20
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "file").write_bytes(bytes(size))
    for number in range(DEATHS + 1):
        mount = processes.next()
        body = struct.pack("<I4xQQ8xqqqIIII4xII8x", wire.SET_SIZE, 0, size - 1, *(0,) * 9)
        mount.send(wire.SETATTR, mount.id("file"), body, UNIQUE | (RESENT if number else 0))
        assert mount.native.waiting.copyups
        mount.native.waiting.close()  # the thread ends, and nobody is told
    answer = None
    mount = processes.next()
    mount.send(wire.SETATTR, mount.id("file"), body, UNIQUE | RESENT)
    answer = mount.answer()
    assert answer is not None
    assert answer[1] == 0


def test_what_a_thread_is_at(processes: Processes) -> None:
    mount = processes.next()
    slot = mount.native.slot
    assert slot is not None
    together = Barrier(2)  # else the second may be given the name of the first

    def work(unique: int) -> int:
        slot.begin_in_thread(1)
        slot.begin_in_thread(unique)
        together.wait()
        return get_ident()

    with ThreadPoolExecutor(2) as pool:
        threads = list(pool.map(work, (6, 8)))
    mount.send(wire.MKDIR, ROOT_ID, MKDIR + b"other\0", OTHER)
    poison.blame(mount.record.slots, get_ident())
    assert slot.current == OTHER
    poison.blame(mount.record.slots, threads[1])
    assert slot.current == 8
    poison.blame(mount.record.slots, 1)
    assert slot.current == 0
