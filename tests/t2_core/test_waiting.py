"""Requests that wait (edge/waiting.py): any number of them, and none for nothing; a socket pair is /dev/fuse."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.inprocess import Union, notify_union
from tests.helpers.mount import DEADLINE
from tests.t2_core.test_native import Kernel
from udbad.branch import datacalls
from udbad.edge.waiting import is_dying
from udbad.kernel import wire
from udbad.types import ROOT_ID, Perm
from udbad.union import copyup

FILES = 150
CHMOD = struct.pack("<IIQQQqqqIIIIIIII", wire.SET_MODE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0o100600, 0, 0, 0, 0)


class World:
    """A union of `top` over `base`, whose files f0 … are lower ones."""

    def __init__(self, union: Union, top: Path, base: Path) -> None:
        self.union = union
        self.top = top
        self.base = base
        self.kernel = Kernel(union)
        self._unique = 1000

    def look_up(self, name: bytes) -> int:
        self.kernel.ask(wire.LOOKUP, ROOT_ID, name + b"\0")
        error, body = self.kernel.answer()
        assert error == 0
        return int.from_bytes(body[:8], "little")

    def ask(self, opcode: int, node: int, body: bytes, pid: int = 1) -> int:
        """Send a request; its unique number."""
        self._unique += 1
        self.kernel.ask(opcode, node, body, self._unique, pid)
        return self._unique

    def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        self.kernel.ask(wire.OPEN, node, wire.TWO_WORDS.pack(flags, 0))
        error, body = self.kernel.answer()
        assert error == 0
        return int.from_bytes(body[:8], "little")

    def temporaries(self) -> list[str]:
        return [name for name in os.listdir(self.top) if name.startswith(".wh.")]

    def run_until(self, done: Callable[[], bool]) -> None:
        """Have the event loop go on."""
        end = time.monotonic() + DEADLINE
        while not done():
            assert time.monotonic() < end
            self.kernel.native.loop.call_posted()
            time.sleep(0.001)

    def close(self) -> None:
        for fh in list(self.union.fs.handles.files):
            self.union.fs.release(fh)
        self.kernel.forget_all()
        self.kernel.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    top, base = tmp_path / "top", tmp_path / "base"
    for each in (top, base):
        each.mkdir()
    for number in range(FILES):
        (base / f"f{number}").write_bytes(bytes(100_000))
    with notify_union([(top, Perm.RW), (base, Perm.RO)], tmp_path / "mnt") as union:
        made = World(union, top, base)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is not set, no copy-up comes to its end, and no fsync; a copy-up asks whether it is wanted."""
    opened = threading.Event()
    transfer, sync = copyup.transfer, datacalls.sync_file

    def held(job: copyup.Job, cancelled: Callable[[], bool]) -> None:
        while not opened.wait(0.005):
            if cancelled():
                raise OSError(errno.ECANCELED, "given up")
        transfer(job, cancelled)

    def held_sync(fd: int, data_only: bool) -> None:
        assert opened.wait(DEADLINE)
        sync(fd, data_only)

    monkeypatch.setattr(copyup, "transfer", held)
    monkeypatch.setattr(datacalls, "sync_file", held_sync)
    yield opened
    opened.set()


@pytest.fixture
def process() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """A process that a test can kill; what a shell has started goes with it at the end."""
    made = []

    def start(script: str) -> subprocess.Popen[bytes]:
        made.append(subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True))
        return made[-1]

    yield start
    for each in made:
        with suppress(ProcessLookupError):
            os.killpg(each.pid, signal.SIGKILL)
        each.wait()
        if each.stdout is not None:
            each.stdout.close()


def test_hundreds_wait_and_others_are_served(world: World, gate: threading.Event) -> None:
    """Neither the number of threads nor anything else is a limit to how many may wait."""
    nodes = [world.look_up(b"f%d" % number) for number in range(FILES)]
    handles = [world.open(node) for node in nodes]
    begun = time.monotonic()
    waiting = {world.ask(wire.SETATTR, node, CHMOD) for node in nodes}
    waiting |= {world.ask(wire.FSYNC, nodes[0], wire.QWORD_AND_WORD.pack(fh, 0)) for fh in handles}
    assert len(waiting) == 2 * FILES
    assert world.kernel.answers() == {}
    world.kernel.ask(wire.GETATTR, nodes[0], bytes(16))
    assert world.kernel.answer()[0] == 0, "beside them"
    assert time.monotonic() - begun < DEADLINE / 4
    assert len(world.kernel.native.waiting.copyups) == FILES
    gate.set()
    answers = world.kernel.wait(2 * FILES)
    assert {unique: error for unique, (error, _) in answers.items()} == dict.fromkeys(waiting, 0)
    assert (world.top / f"f{FILES - 1}").stat().st_mode & 0o7777 == 0o600
    assert world.temporaries() == []


def test_many_wait_for_one_copy(world: World, gate: threading.Event) -> None:
    node = world.look_up(b"f0")
    waiting = [world.ask(wire.SETATTR, node, CHMOD) for _ in range(20)]
    assert len(world.kernel.native.waiting.copyups) == 1
    gate.set()
    answers = world.kernel.wait(20)
    assert sorted(answers) == waiting
    assert all(error == 0 for error, _ in answers.values())


def test_a_write_that_waits_keeps_its_data(world: World, gate: threading.Event) -> None:
    node = world.look_up(b"f0")
    fh = world.open(node, os.O_RDWR)
    body = struct.pack("<QQIIQII", fh, 10, 5, 0, 0, 0, 0)
    world.ask(wire.WRITE, node, body + b"first")
    world.ask(wire.WRITE, node, struct.pack("<QQIIQII", fh, 20, 5, 0, 0, 0, 0) + b"other")
    world.look_up(b"f1")
    gate.set()
    assert all(answer == (0, wire.TWO_WORDS.pack(5, 0)) for answer in world.kernel.wait(2).values())
    assert (world.top / "f0").read_bytes()[10:25] == b"first" + bytes(5) + b"other"
    assert (world.base / "f0").read_bytes() == bytes(100_000)


def test_a_copy_that_fails_is_told_to_all(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of those that wait tries for itself."""
    tried = []

    def full(job: copyup.Job, cancelled: object) -> None:
        tried.append(job)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(copyup, "transfer", full)
    node = world.look_up(b"f0")
    for _ in range(3):
        world.ask(wire.SETATTR, node, CHMOD)
    assert [error for error, _ in world.kernel.wait(3).values()] == [errno.ENOSPC] * 3
    assert len(tried) == 3
    assert (world.temporaries(), os.listdir(world.top)) == ([], [])


# -- reads from a disk ----------------------------------------------------------------------------


@pytest.fixture
def disk(world: World, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One that is as quick as a test says: what a read gets while there is something in the list; then the data. The
    threads that read are in `world.threads`."""
    said: list[bool] = []
    read = datacalls.read_cached

    def cached(fd: int, size: int, offset: int) -> Any:
        return said.pop(0) if said else read(fd, size, offset)

    def waited(*_: int) -> bytes:
        assert threading.current_thread() is not threading.main_thread()
        return b"from a thread"

    monkeypatch.setattr(datacalls, "read_cached", cached)
    monkeypatch.setattr(os, "pread", waited)
    monkeypatch.setattr(world.kernel.native.waiting, "patience", DEADLINE)
    return said


def ask_to_read(world: World, fh: int) -> int:
    return world.ask(wire.READ, 0, struct.pack("<QQIIQII", fh, 0, 100, 0, 0, 0, 0))  # struct fuse_read_in


def test_a_quick_disk_is_looked_at_again(world: World, disk: list[bool]) -> None:
    """Others are served meanwhile, and nothing is left to a thread."""
    node = world.look_up(b"f0")
    fh = world.open(node)
    disk += [True] * 3
    unique = ask_to_read(world, fh)
    assert world.kernel.native.look(), "not there yet"
    world.kernel.ask(wire.GETATTR, node, bytes(16))
    assert world.kernel.answer()[0] == 0
    assert world.kernel.native.look()
    assert disk == []
    assert not world.kernel.native.look()
    assert world.kernel.answers() == {unique: (0, bytes(100))}


def test_what_no_disk_was_asked_for_is_not_looked_at_again(world: World, disk: list[bool]) -> None:
    """As on file systems without RWF_NOWAIT."""
    disk.append(False)
    unique = ask_to_read(world, world.open(world.look_up(b"f0")))
    assert not world.kernel.native.look()
    assert world.kernel.wait() == {unique: (0, b"from a thread")}


def test_a_slow_disk_is_left_to_threads(world: World, disk: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are looked for nevertheless, so that it is noticed when it is quick."""
    waiting = world.kernel.native.waiting
    fh = world.open(world.look_up(b"f0"))
    monkeypatch.setattr(waiting, "patience", 1e-9)
    looked = []
    for _ in range(40):
        disk[:] = [True] * 3
        unique = ask_to_read(world, fh)
        looked.append(len(disk) == 2 and not world.kernel.native.look() and len(disk) == 1)
        assert world.kernel.wait() == {unique: (0, b"from a thread")}
    assert looked[:4] == [True] * 4
    assert 0 < sum(looked[4:]) < 5
    monkeypatch.setattr(waiting, "patience", DEADLINE)
    for _ in range(20):
        disk[:] = [True]
        ask_to_read(world, fh)
        world.kernel.wait()
    disk[:] = [True]
    unique = ask_to_read(world, fh)
    assert not world.kernel.native.look()
    assert world.kernel.answers() == {unique: (0, bytes(100))}


def test_what_is_looked_for_is_answered_at_the_end(world: World, disk: list[bool]) -> None:
    fh = world.open(world.look_up(b"f0"))
    disk.append(True)
    unique = ask_to_read(world, fh)
    world.kernel.native.waiting.close()
    assert world.kernel.answers() == {unique: (0, b"from a thread")}


def test_a_small_file_is_asked_for_when_it_is_opened(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: later the kernel may have it."""
    began: list[int] = []
    monkeypatch.setattr(datacalls, "start_reading", began.append)
    for name, size, times in ((b"f0", 0, 0), (b"f1", 1, 1), (b"f2", 16 << 10, 1), (b"f3", (16 << 10) + 1, 0)):
        path = world.base / name.decode()
        path.write_bytes(bytes(size))
        os.utime(path, (1, 1))
        began.clear()
        node = world.look_up(name)
        for _ in range(2):
            world.open(node)
        assert len(began) == times
        world.union.fs.table.node(node).branch.local = False
        world.union.fs.table.node(node).seen = None
        began.clear()
        world.open(node)
        assert began == [], "a server is not asked for nothing"
        world.union.fs.table.node(node).branch.local = True


# -- changes of ranges ----------------------------------------------------------------------------


def fallocate(fh: int, mode: int, offset: int, length: int) -> bytes:
    return struct.pack("<QQQII", fh, offset, length, mode, 0)  # struct fuse_fallocate_in


def test_a_range_is_changed_beside_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread, after a copy-up; its end is on the event loop, and then comes the answer."""
    opened, ended = threading.Event(), []
    real, changed = datacalls.fallocate, world.union.fs.changed

    def held(*arguments: int) -> None:
        assert opened.wait(DEADLINE)
        assert threading.current_thread() is not threading.main_thread()
        real(*arguments)

    def end(change: object, failed: bool) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert world.kernel.answers() == {}
        ended.append(failed)
        changed(change, failed)  # type: ignore[arg-type]  # what it was given

    monkeypatch.setattr(datacalls, "fallocate", held)
    monkeypatch.setattr(world.union.fs, "changed", end)
    node = world.look_up(b"f0")
    fh = world.open(node, os.O_RDWR)
    unique = world.ask(wire.FALLOCATE, node, fallocate(fh, 3, 0, 10))
    world.run_until(lambda: (world.top / "f0").exists())
    world.kernel.ask(wire.GETATTR, node, bytes(16))
    assert world.kernel.answer()[0] == 0
    opened.set()
    assert world.kernel.wait() == {unique: (0, b"")}
    assert ended == [False]
    assert world.kernel.native.operations.fs.getattr(node)[1].st_size == 100_000


def test_a_range_that_cannot_be_changed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never ENOSYS, which the kernel remembers for ever."""
    failed = []
    monkeypatch.setattr(world.union.fs, "changed", lambda change, how: failed.append(how))
    node = world.look_up(b"f0")
    fh = world.open(node, os.O_RDWR)
    for number, told in ((errno.EOPNOTSUPP, errno.EOPNOTSUPP), (errno.ENOSYS, errno.EIO), (errno.ENOSPC, errno.ENOSPC)):

        def refuse(*_: int, number: int = number) -> None:
            raise OSError(number, "")

        monkeypatch.setattr(datacalls, "fallocate", refuse)
        unique = world.ask(wire.FALLOCATE, node, fallocate(fh, 0, 0, 10))
        assert world.kernel.wait() == {unique: (told, b"")}
    assert failed == [True] * 3


@pytest.mark.parametrize("opcode", [wire.COPY_FILE_RANGE, wire.COPY_FILE_RANGE_64])
def test_copying_a_range(world: World, opcode: int) -> None:
    (world.base / "f0").write_bytes(b"0123456789")
    source, target = world.look_up(b"f0"), world.look_up(b"f1")
    fh_in, fh_out = world.open(source), world.open(target, os.O_WRONLY)
    # struct fuse_copy_file_range_in
    unique = world.ask(opcode, source, struct.pack("<QQQQQQQ", fh_in, 2, target, fh_out, 5, 1 << 62, 0))
    form = "<Q" if opcode == wire.COPY_FILE_RANGE_64 else "<II"  # fuse_copy_file_range_out, fuse_write_out
    count = struct.pack(form, *(8,) if opcode == wire.COPY_FILE_RANGE_64 else (8, 0))
    assert world.kernel.wait() == {unique: (0, count)}
    assert (world.top / "f1").read_bytes()[:20] == bytes(5) + b"23456789" + bytes(7)


def test_looking_for_holes(world: World) -> None:
    with (world.base / "f0").open("wb") as stream:
        stream.truncate(1 << 20)
        stream.seek(1 << 19)
        stream.write(b"x")
    node = world.look_up(b"f0")
    fh = world.open(node)

    def seek(offset: int, whence: int) -> tuple[int, bytes]:
        world.kernel.ask(wire.LSEEK, node, struct.pack("<QqII", fh, offset, whence, 0))  # struct fuse_lseek_in
        answer: tuple[int, bytes] = world.kernel.answer()
        return answer

    assert seek(0, os.SEEK_DATA) == (0, struct.pack("<Q", 1 << 19))
    assert seek(0, os.SEEK_HOLE) == (0, bytes(8))
    assert seek(-1, os.SEEK_DATA) == (errno.ENXIO, b"")
    assert seek(0, os.SEEK_END) == (errno.EINVAL, b"")


def test_a_file_without_a_name(world: World) -> None:
    """The kernel sends "/" for the name (vfs_tmpfile())."""
    world.kernel.ask(wire.TMPFILE, ROOT_ID, struct.pack("<IIII", os.O_RDWR, 0o100640, 0o022, 0) + b"/\0")
    error, body = world.kernel.answer()
    assert (error, len(body)) == (0, wire.ENTRY_SIZE + wire.OPENED.size)
    (node,) = struct.unpack_from("<Q", body)
    mode, links = struct.unpack_from("<II", body, 40 + 60)  # struct fuse_attr
    assert (mode, links) == (0o100640, 0)
    world.kernel.ask(wire.LINK, ROOT_ID, struct.pack("<Q", node) + b"new\0")
    error, body = world.kernel.answer()
    assert error == 0
    assert struct.unpack_from("<Q", body) == (node,)
    assert struct.unpack_from("<I", body, 40 + 64) == (1,)
    assert (world.top / "new").exists()


# -- INTERRUPT ------------------------------------------------------------------------------------


def interrupt(world: World, unique: int) -> None:
    world.ask(wire.INTERRUPT, 0, wire.QWORD.pack(unique))


def killed(process: subprocess.Popen[bytes]) -> int:
    """Its number, when it is dead and nobody has waited for it."""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.wait()
    return process.pid


def test_a_copy_that_nobody_waits_for_is_given_up(world: World, gate: threading.Event, process: Any) -> None:
    dead = killed(process("exec sleep 60"))
    unique = world.ask(wire.SETATTR, world.look_up(b"f0"), CHMOD, pid=dead)
    before = (world.base / "f0").stat()
    interrupt(world, unique)
    assert world.kernel.wait() == {unique: (errno.EINTR, b"")}
    assert not gate.is_set()
    assert os.listdir(world.top) == []
    after = (world.base / "f0").stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    gate.set()
    world.ask(wire.SETATTR, world.look_up(b"f0"), CHMOD)
    assert [error for error, _ in world.kernel.wait().values()] == [0], "the next one is made"


def test_a_copy_that_another_one_waits_for_goes_on(world: World, gate: threading.Event, process: Any) -> None:
    dead = killed(process("exec sleep 60"))
    node = world.look_up(b"f0")
    first = world.ask(wire.SETATTR, node, CHMOD, pid=dead)
    second = world.ask(wire.SETATTR, node, CHMOD)
    interrupt(world, first)
    assert world.kernel.wait() == {first: (errno.EINTR, b"")}
    assert len(world.kernel.native.waiting.copyups) == 1
    gate.set()
    assert [(unique, error) for unique, (error, _) in world.kernel.wait().items()] == [(second, 0)]


def test_a_signal_that_does_not_kill_changes_nothing(world: World, gate: threading.Event, process: Any) -> None:
    """SIGALRM with a handler, SIGCHLD: no system call on a file is ended by it. One that kills later is noticed."""
    client = process("trap : ALRM; echo ready; while :; do sleep 60; done")
    assert client.stdout.readline() == b"ready\n"
    unique = world.ask(wire.SETATTR, world.look_up(b"f0"), CHMOD, pid=client.pid)
    client.send_signal(signal.SIGALRM)
    interrupt(world, unique)
    time.sleep(0.05)
    world.kernel.native.loop.call_posted()
    assert world.kernel.answers() == {}
    killed(client)
    assert world.kernel.wait() == {unique: (errno.EINTR, b"")}
    assert world.temporaries() == []


def test_who_is_dying() -> None:
    assert not is_dying(os.getpid())
    assert not is_dying(0), "somebody in another pid namespace"
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert not is_dying(child.pid)
    finally:
        child.kill()
        child.wait()
    assert is_dying(child.pid)


def test_the_end_of_the_connection_gives_up_what_waits(world: World, gate: threading.Event) -> None:
    node = world.look_up(b"f0")
    world.ask(wire.SETATTR, node, CHMOD)
    world.kernel.native.waiting.close()
    world.kernel.native.loop.call_posted()
    assert [error for error, _ in world.kernel.answers().values()] == [errno.EINTR]
    assert os.listdir(world.top) == []
    assert world.kernel.native.waiting.copyups == {}
