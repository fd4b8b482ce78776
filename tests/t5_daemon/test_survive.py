"""kill -9 of a mount process: another one goes on, and no program that uses the mount notices.

Every client here has something that only the process that was killed knew of: open files, removed ones, half a
listing. The pause is printed (pytest -s), and is no verdict: machines differ.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers.killing import stop
from tests.helpers.mount import Mount, UnionFactory
from tests.helpers.profile import scaled
from tests.helpers.turns import CAN_BE_ASKED_FOR, turns
from tests.t5_daemon.daemon import DEADLINE, Daemon, until
from udbad.control import registry
from udbad.kernel import scheduling
from udbad.mount import keeper

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not())),
]

MODES = ("none", "reval", "notify")
TAKEN_OVER = "another one takes over"
NAMES = 3000
"""Of a directory whose listing takes several requests."""
KILLS = int(scaled("5", "100"))
PAUSE = 0.1, 0.5
"""Seconds between two kills."""


def worker(mount: Mount) -> int:
    pid = mount.control({"op": "status"})["pid"]
    assert isinstance(pid, int)
    assert pid != mount.process.pid
    return pid


def kill(mount: Mount) -> None:
    os.kill(worker(mount), signal.SIGKILL)


@pytest.fixture(params=MODES)
def mount(request: pytest.FixtureRequest, union: UnionFactory, tmp_path: Path) -> Mount:
    """Top and base; base has a file and a directory with many names."""
    directory = tmp_path / "base" / "many"
    directory.mkdir(parents=True)
    for number in range(NAMES):
        (directory / f"name {number:05d}").touch()
    (tmp_path / "base" / "file").write_bytes(b"of base")
    return union(udba=request.param, options="survive=on", allow_log=TAKEN_OVER)


@contextmanager
def client(work: Callable[[], None], seconds: float = DEADLINE) -> Iterator[None]:
    """A process that does `work` and must end without an error."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    pidfd = os.pidfd_open(pid)
    try:
        yield
        until(
            lambda: os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT), "the end of a client", seconds
        )
    finally:
        os.close(pidfd)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    assert status == 0, "a client met an error"


def test_files(mount: Mount) -> None:
    """Open ones, on either branch; removed ones; those with a lock or a mapping."""
    lower = os.open(mount.path / "file", os.O_RDONLY)
    upper = os.open(mount.path / "upper", os.O_RDWR | os.O_CREAT)
    removed = os.open(mount.path / "removed", os.O_RDWR | os.O_CREAT)
    os.write(removed, b"still here")
    os.unlink(mount.path / "removed")
    os.write(upper, b"x" * mmap.PAGESIZE)
    mapping = mmap.mmap(upper, mmap.PAGESIZE)
    fcntl.flock(upper, fcntl.LOCK_EX)
    before = os.fstat(lower).st_ino, os.fstat(upper).st_ino, os.fstat(removed).st_ino
    for _ in range(2):
        kill(mount)
        assert os.pread(lower, 100, 0) == b"of base"
        assert not CAN_BE_ASKED_FOR or turns(worker(mount))[2] == scheduling.SHORTEST
        assert os.pread(removed, 100, 0) == b"still here"
        os.pwrite(upper, b"written", 10)
        assert os.pread(upper, 7, 10) == b"written"
        mapping[0:6] = b"mapped"
        mapping.flush()
        assert (mount["top"] / "upper").read_bytes()[:17] == b"mappedxxxxwritten"
        assert (os.fstat(lower).st_ino, os.fstat(upper).st_ino, os.fstat(removed).st_ino) == before
        other = os.open(mount.path / "upper", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
        assert sorted(os.listdir(mount.path)) == ["file", "many", "upper"]
        mapping[0:6] = b"xxxxxx"
    mapping.close()
    for fd in (lower, upper, removed):
        os.close(fd)


def test_a_file_that_is_copied_up_afterwards(mount: Mount) -> None:
    reader = os.open(mount.path / "file", os.O_RDONLY)
    writer = os.open(mount.path / "file", os.O_RDWR)
    kill(mount)
    os.pwrite(writer, b"OF", 0)
    assert os.pread(reader, 100, 0) == b"OF base"
    assert (mount["top"] / "file").read_bytes() == b"OF base"
    assert (mount["base"] / "file").read_bytes() == b"of base"
    os.close(reader)
    os.close(writer)


def test_directories(mount: Mount) -> None:
    """Half a listing, a directory that somebody is in, and one that was removed meanwhile."""
    (mount.path / "gone").mkdir()
    removed = os.open(mount.path / "gone", os.O_RDONLY)
    (mount.path / "gone").rmdir()
    here = os.open(mount.path / "many", os.O_RDONLY)
    with os.scandir(mount.path / "many") as entries:
        found = [next(entries).name for _ in range(10)]
        kill(mount)
        found += [entry.name for entry in entries]
    assert len(found) == len(set(found)) == NAMES
    before = os.stat(mount.path / "many").st_mtime_ns, os.stat(mount.path).st_mtime_ns
    kill(mount)
    assert (os.stat(mount.path / "many").st_mtime_ns, os.stat(mount.path).st_mtime_ns) == before
    assert sorted(os.listdir(mount.path / "many")) == sorted(found)
    assert os.listdir(removed) == []
    with pytest.raises(FileNotFoundError):
        os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=removed)
    os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    assert (mount["top"] / "many" / "new").exists()
    os.close(removed)
    os.close(here)


def test_a_direct_change_during_the_outage(mount: Mount) -> None:
    """Nobody was there to see the event."""
    assert (mount.path / "file").read_bytes() == b"of base"
    assert not (mount.path / "new").exists()
    pid = worker(mount)
    stop(mount.process.pid)
    os.kill(pid, signal.SIGKILL)
    (mount["base"] / "new").write_bytes(b"new")
    (mount["base"] / "file").unlink()
    mount.process.send_signal(signal.SIGCONT)
    mount.flush()
    assert (mount.path / "new").read_bytes() == b"new"
    assert not (mount.path / "file").exists()


@pytest.mark.parametrize("udba", MODES)
def test_a_directory_that_is_being_read(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Nobody sees by its times that a process has ended, and nobody is shown what was there before."""
    (tmp_path / "base/d").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / "base/d" / name).touch()
    mount = union(udba=udba, options="survive=on,io=requests", allow_log=TAKEN_OVER)
    d = mount.path / "d"

    def listing_requests() -> int:
        before = mount.requests()
        os.listdir(d)
        after = mount.requests()
        return sum(after.get(name, 0) - before.get(name, 0) for name in ("readdir", "readdirplus"))

    with ExitStack() as stack:
        reader = os.open(d, os.O_RDONLY)
        stack.callback(os.close, reader)
        stack.callback(os.close, os.open(d, os.O_RDONLY))
        assert sorted(os.listdir(reader)) == ["a", "b"]
        assert (listing_requests() == 0) == (udba != "reval")
        before = os.stat(d).st_mtime_ns, os.stat(mount.path).st_mtime_ns
        kill(mount)
        mount.flush()  # the kernel has been told what to ask for anew
        assert (os.stat(d).st_mtime_ns, os.stat(mount.path).st_mtime_ns) == before
        if udba == "notify":
            assert [listing_requests() > 0 for _ in range(3)] == [True] * 3, "an answer may still come in"
            pid = worker(mount)
            stop(mount.process.pid)
            os.kill(pid, signal.SIGKILL)
            (mount["base"] / "d/new").touch()
            mount.process.send_signal(signal.SIGCONT)
            assert sorted(os.listdir(d)) == ["a", "b", "new"]
            os.lseek(reader, 0, os.SEEK_SET)
            assert sorted(os.listdir(reader)) == ["a", "b", "new"], "who begins anew"
    until(lambda: (listing_requests() == 0) == (udba != "reval"), "the kernel keeps the listing")
    os.rename(mount["base"] / "d/b", mount["base"] / "d/c")
    if udba != "none":
        mount.flush()
        assert "c" in os.listdir(d)


def test_counting(mount: Mount) -> None:
    """Nothing is lost and nothing done twice, whatever is under way."""
    seed = random.SystemRandom().getrandbits(32)
    draw = random.Random(seed)
    until_then = time.monotonic() + KILLS * sum(PAUSE) / 2

    def append() -> None:
        fd = os.open(mount.path / "appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        count = 0
        while time.monotonic() < until_then:
            os.write(fd, b"%08d\n" % count)
            count += 1
        os.close(fd)
        assert (mount.path / "appended").read_bytes() == b"".join(b"%08d\n" % number for number in range(count))

    def names() -> None:
        count = 0
        while time.monotonic() < until_then:
            os.mkdir(mount.path / f"dir {count}")
            os.rename(mount.path / f"dir {count}", mount.path / "renamed")
            os.link(mount.path / "appended", mount.path / "renamed" / "link")
            assert os.stat(mount.path / "renamed" / "link").st_nlink == 2
            os.unlink(mount.path / "renamed" / "link")
            os.symlink("nowhere", mount.path / "renamed" / "link")
            os.rename(mount.path / "renamed" / "link", mount.path / "link")
            os.unlink(mount.path / "link")
            os.rmdir(mount.path / "renamed")
            count += 1

    (mount.path / "appended").touch()
    pauses = []
    with client(append), client(names):
        for _ in range(KILLS):
            time.sleep(draw.uniform(*PAUSE))
            pid = worker(mount)
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            os.path.lexists(mount.path / f"nothing {began}")
            pauses.append(time.monotonic() - began)
    print(f"seed {seed}: {KILLS} kills, pause {min(pauses) * 1000:.0f} to {max(pauses) * 1000:.0f} ms")
    assert sorted(os.listdir(mount.path)) == ["appended", "file", "many"]


def test_told_to_stop_while_a_process_is_dead(union: UnionFactory) -> None:
    """The guardian has not noticed yet, and tells it; then it tells the next one."""
    mount = union(options="survive=on", allow_log=TAKEN_OVER)
    pid = worker(mount)
    pidfd = os.pidfd_open(pid)
    stop(mount.process.pid)
    os.kill(pid, signal.SIGKILL)
    until(lambda: select.select([pidfd], [], [], 0)[0], "the end of the mount process")
    os.close(pidfd)
    mount.process.terminate()
    mount.process.send_signal(signal.SIGCONT)
    assert mount.process.wait(DEADLINE) == 0
    assert not mount.is_mounted


def test_killed_at_its_orderly_end(union: UnionFactory) -> None:
    """After the unmount, at whatever it does then: there is nothing to take over, and nobody tries."""
    for step in range(10):
        mount = union(options="survive=on,restart_timeout=2", allow_log=TAKEN_OVER)
        pid = worker(mount)
        pidfd = os.pidfd_open(pid)
        subprocess.run(["umount", mount.path], check=True)
        time.sleep(step / 1000)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        assert mount.process.wait(DEADLINE) == 0, mount.log()


def test_nobody_takes_over(union: UnionFactory) -> None:
    """The guardian is gone, too: after restart_timeout who waits gets an error."""
    mount = union(options="survive=on,restart_timeout=1")
    pid = worker(mount)
    mount.process.kill()
    mount.process.wait(DEADLINE)
    assert os.listdir(mount.path) == []  # the mount goes on
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(OSError, match=os.strerror(errno.ECONNABORTED)):  # of what waits
        os.listdir(mount.path)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.listdir(mount.path)
    mount.kill()


def test_off(union: UnionFactory) -> None:
    """One process, as ever."""
    mount = union(options="survive=off")
    assert mount.control({"op": "status"})["pid"] == mount.process.pid
    assert mount.control({"op": "status"})["mortal"] == "survive=off"


def test_restart_in_place(daemon: Daemon) -> None:
    point = daemon.add("a", survive=True)
    daemon.start()
    fd = os.open(point / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"before")
    pid = daemon.state("a")["pid"]
    daemon.command("restart", "a")
    state = daemon.state("a")
    assert state["pid"] != pid
    os.write(fd, b" and after")
    assert (point / "file").read_bytes() == b"before and after"
    os.close(fd)
    daemon.stop()
    assert "ended; starting another" not in daemon.log()


def eventfd_ids(pid: int, number: str = "") -> set[str]:
    """Of the eventfds of a process, or of that with this number."""
    numbers = [number] if number else os.listdir(f"/proc/{pid}/fdinfo")
    words = [Path(f"/proc/{pid}/fdinfo/{each}").read_text().split() for each in numbers]
    return {each[each.index("eventfd-id:") + 1] for each in words if "eventfd-id:" in each}


def test_an_adopted_process_is_watched_by_its_keeper(daemon: Daemon) -> None:
    """A thread of it may outlive a SIGKILL, and a pidfd says nothing until that has ended."""
    daemon.add("a", survive=True)
    daemon.start()
    daemon.kill()
    daemon.start()
    (entry,) = registry.entries(daemon.run_dir)
    assert daemon.process is not None
    said = eventfd_ids(entry.keeper, str(entry.ended))
    assert len(said) == 1
    assert said <= eventfd_ids(daemon.process.pid)
    os.kill(entry.pid, signal.SIGKILL)
    daemon.wait_for("a", not_pid=entry.pid)
    daemon.stop()


def test_what_a_killed_process_leaves_has_a_parent(daemon: Daemon) -> None:
    """Its keeper becomes a child of the fork server, and none of pid 1, which may wait for nobody."""
    daemon.add("a", survive=True)
    daemon.start()
    entry = next(iter(registry.entries(daemon.run_dir)))
    server = _parent(entry.pid)
    stop(entry.keeper)  # it can be killed still
    stop(server)  # it waits for nobody meanwhile
    os.kill(entry.pid, signal.SIGKILL)
    until(lambda: _parent(entry.keeper) != entry.pid, "another parent")
    assert _parent(entry.keeper) == server
    os.kill(server, signal.SIGCONT)
    until(lambda: not _parent(entry.keeper), "the keeper's end")
    daemon.wait_for("a", not_pid=entry.pid)
    daemon.stop()


def _parent(pid: int) -> int:
    """0: there is no such process, not even a dead one."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def test_the_daemon_is_killed_first(daemon: Daemon) -> None:
    """Who uses the mount waits for the next daemon, which goes on with it."""
    point = daemon.add("a", survive=True)
    daemon.start()
    fd = os.open(point / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"before")
    pid = daemon.state("a")["pid"]
    daemon.kill()
    os.kill(pid, signal.SIGKILL)

    def write() -> None:
        os.write(fd, b" and after")

    with client(write):
        daemon.start()
    assert (point / "file").read_bytes() == b"before and after"
    os.close(fd)
    assert json.loads(daemon.command("status", "--json"))["mounts"][0]["restarts"] == 1
    daemon.stop()
