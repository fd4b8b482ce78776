"""Requests held in the daemon while thousands of invalidations of the same directories wait: nothing wedges.

A notification blocks in the kernel until the request it concerns is answered (fuse_reverse_inval_entry
takes the directory's i_rwsem, inval_inode waits for pages under READ). The watchdog of the mount would
abort a wedged connection, and the test would then fail when it unmounts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.merge import diff, merge, snapshot
from tests.helpers.mount import Mount, UnionFactory
from tests.helpers.profile import scaled
from tests.helpers.slow_mount import TRANSFER, Gate, slow_daemon

pytestmark = pytest.mark.fuse

FILES = 50
BIG = 8
"""Files too large for a copy-up on the event loop."""
SIZE = 300_000
CHANGES = 3000
"""Names that come and go directly in the directory that requests are held in."""
FEWER = scaled(1000, CHANGES)
"""While one kind of operation alone is held: each is held at its own place, none at a number of changes."""
WATCHDOG = 120.0


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()  # a test that failed must not leave the daemon holding


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A lower branch: the directory `d` with small files, big files and subdirectories."""
    directory = tmp_path / "base" / "d"
    directory.mkdir(parents=True)
    for number in range(FILES):
        (directory / f"f{number}").write_bytes(b"%d" % number)
        (directory / f"s{number}").mkdir()
    for number in range(BIG):
        (directory / f"big{number}").write_bytes(os.urandom(SIZE))
    return tmp_path / "base"


@contextmanager
def in_threads(calls: list[Callable[[], Any]]) -> Iterator[list[Future[Any]]]:
    with ThreadPoolExecutor(len(calls)) as pool:
        yield [pool.submit(call) for call in calls]


@contextmanager
def opened_at_last(gate: Gate) -> Iterator[None]:
    """Also when something fails: whoever is held would be waited for."""
    try:
        yield
    finally:
        gate.open()


def copy_up(path: Path) -> None:
    with path.open("r+b", buffering=0) as stream:
        stream.write(b"changed")


def read(path: Path) -> bytes:
    return path.read_bytes()


CLIENTS: dict[str, Callable[[Path], list[Callable[[], Any]]]] = {
    "lookup": lambda d: [lambda n=n: (d / f"unknown{n}").exists() for n in range(8)],  # type: ignore[misc]  # n=n binds the number
    "readdir": lambda d: [lambda: sorted(os.listdir(d)) for _ in range(4)],
    "read": lambda d: [lambda n=n: read(d / f"big{n}") for n in range(BIG)],  # type: ignore[misc]  # as above
    TRANSFER: lambda d: [lambda n=n: copy_up(d / f"big{n}") for n in range(4)],  # type: ignore[misc]  # as above
    "unlink": lambda d: [lambda: (d / "f0").unlink()],
    "mkdir": lambda d: [lambda: (d / "made").mkdir()],
    "rename": lambda d: [lambda: (d / "own").rename(d / "moved")],
    "getattr": lambda d: [lambda: os.stat(d / "s2")],
}
"""Operation that is held → calls that cause it below the directory d."""

AT_ONCE = {"lookup": 8}
"""At least so many reach the daemon: the kernel lets one call at a time change or list a directory."""

LOCKING = ("lookup", "readdir", "unlink", "mkdir", "rename")
"""While one of them is not answered, the kernel takes no invalidation of a name in the directory."""


def change_directly(directory: Path, count: int = CHANGES) -> None:
    """Names come and go, files and their attributes change, directories are replaced."""
    for number in range(count):
        name = directory / f"n{number}"
        name.touch()
        if number % 2:
            name.unlink()
    for number in range(2, FILES):
        (directory / f"f{number}").write_bytes(b"new content of %d" % number)
        (directory / f"s{number}").chmod(0o700)
    for number in range(10, 20):
        (directory / f"s{number}").rename(directory / f"moved{number}")
    for number in range(BIG):
        os.utime(directory / f"big{number}", ns=(0, number))


def begin_flush(mount: Mount) -> threading.Thread:
    thread = threading.Thread(target=mount.flush)
    thread.start()
    return thread


def warm(mount: Mount) -> None:
    """Have names, negatives and attributes in the kernel, but no file contents."""
    for directory, names, files in os.walk(mount.path):
        for name in [*names, *files, "absent"]:
            os.path.lexists(os.path.join(directory, name))


def agree(mount: Mount) -> None:
    mount.flush()
    assert diff(merge([(mount["top"], True), (mount["base"], False)]), snapshot(mount.path)) == []


@pytest.mark.parametrize("held", [*CLIENTS, "everything"])
def test_held_requests_and_thousands_of_invalidations(union: UnionFactory, base: Path, gate: Gate, held: str) -> None:
    # Each client would be held at the attributes of the directory, and nothing come to what locks it.
    words = [word for word in CLIENTS if word != "getattr"] if held == "everything" else [held]
    count = CHANGES if held == "everything" else FEWER
    with slow_daemon(gate, *words):
        mount = union({"top": "rw", "base": "ro"}, "notify", watchdog=WATCHDOG)
        (mount.path / "d/own").touch()
        warm(mount)
        (base / "d/direct").touch()  # so that the kernel has to ask for the listing again
        mount.flush()
        gate.close()
        calls = [call for word in words for call in CLIENTS[word](mount.path / "d")]
        with in_threads(calls) as futures, opened_at_last(gate):
            gate.wait_held(LOCKING if held == "everything" else words, AT_ONCE.get(held, 1))
            change_directly(base / "d", count)
            flushing = begin_flush(mount)
            # The event loop is free: the control socket answers, and the daemon has seen the changes.
            statistics = mount.control({"op": "stats"})
            assert statistics["coherence"]["state"] == "healthy"
            while mount.control({"op": "stats"})["coherence"]["events"] < count:
                flushing.join(0.01)
            if held in (*LOCKING, "everything"):
                while not mount.control({"op": "stats"})["invalidator"]["pending"]:
                    assert flushing.is_alive(), "nothing waits for the held request"
                assert flushing.is_alive()
            gate.open()
            for future in futures:
                future.result(WATCHDOG)
            flushing.join(WATCHDOG)
            assert not flushing.is_alive()
        agree(mount)


def test_unmounting_with_thousands_of_invalidations_waiting(union: UnionFactory, base: Path) -> None:
    mount = union({"top": "rw", "base": "ro"}, "notify", watchdog=WATCHDOG)
    warm(mount)
    change_directly(base / "d")
    mount.unmount()
    mount.remount()
    agree(mount)


def test_working_in_a_directory_that_changes_all_the_time(union: UnionFactory, base: Path) -> None:
    """Own operations and invalidations of one directory, as fast as both go."""
    mount = union({"top": "rw", "base": "ro"}, "notify", watchdog=WATCHDOG)
    warm(mount)
    inside = mount.path / "d"

    def work(number: int) -> None:
        for turn in range(150):
            mine = inside / f"w{number}.{turn}"
            mine.write_bytes(b"x")
            mine.rename(inside / f"v{number}.{turn}")
            os.listdir(inside)
            (inside / f"n{turn}").exists()
            (inside / f"v{number}.{turn}").unlink()

    with in_threads([lambda: work(0), lambda: work(1), lambda: change_directly(base / "d")]) as futures:
        for future in futures:
            future.result(WATCHDOG)
    agree(mount)
