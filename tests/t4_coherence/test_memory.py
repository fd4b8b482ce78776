"""A walk over 200,000 files costs memory while the kernel holds them, and no longer.

The kernel gives its references back when somebody writes 2 to /proc/sys/vm/drop_caches (proc(5)); then
nodes and watches must be what they were before the walk, exactly, and the memory nearly so.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.mount import DEADLINE, Mount, UnionFactory

pytestmark = [pytest.mark.fuse, pytest.mark.stress]

DIRECTORIES = 2000
FILES = 100
"""In each directory."""

KEPT = 0.75
"""Share of the memory taken by one walk that may still be held after two: an allocator gives back whole arenas
only, and a dictionary keeps its size. If every node leaked, it would be about 2, if a part did, the second
peak would say so, too."""
AGAIN = 1.25
"""Peak of a second walk over the peak of the first: what was kept is used again."""


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """200,000 files are made there in a second, and go at once."""
    path = tmp_path / "tmpfs"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g,nr_inodes=400k", "none", path], check=True, timeout=DEADLINE)
    yield path
    subprocess.run(["umount", "-i", "-c", "--", path], check=True, timeout=DEADLINE)


def populate(directory: Path) -> None:
    for number in range(DIRECTORIES):
        here = directory / f"d{number}"
        here.mkdir()
        fd = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in range(FILES):
                os.mknod(f"f{name}", stat.S_IFREG | 0o644, dir_fd=fd)
        finally:
            os.close(fd)


def walk(root: Path) -> int:
    """List and stat everything; how many files there were."""
    found = 0
    for directory in [root, *root.iterdir()]:
        with os.scandir(directory) as entries:
            for entry in entries:
                found += stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode)
    return found


def status(mount: Mount) -> dict[str, Any]:
    return mount.control({"op": "stats"})


def watches(mount: Mount) -> int:
    return int(status(mount)["coherence"]["watches"])


def memory(mount: Mount) -> int:
    """Resident bytes of the daemon."""
    text = Path(f"/proc/{mount.process.pid}/status").read_text()
    match = re.search(r"^VmRSS:\s*(\d+) kB", text, re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def drop_caches(mount: Mount, nodes: int) -> None:
    """Have the kernel give its references back, until the daemon has no more than `nodes`."""
    end = time.monotonic() + 3 * DEADLINE
    while True:
        # The kernel answers the write when it has gone through its lists; FORGETs are sent later, and
        # what was in use by somebody at that moment is only there the next time.
        Path("/proc/sys/vm/drop_caches").write_text("2")
        if status(mount)["table"]["nodes"] <= nodes:
            return
        assert time.monotonic() < end, f"still {status(mount)['table']} after dropping caches"


@pytest.mark.alone
@pytest.mark.parametrize("udba", ["none", "notify"])  # in reval the kernel keeps nothing anyway
def test_a_walk_over_everything_leaves_nothing(tmpfs: Path, union: UnionFactory, udba: str) -> None:
    base = tmpfs / "base"
    base.mkdir()
    populate(base)
    mount = union({"top": "rw", "tmpfs/base": "ro"}, udba)
    # Whatever is loaded at the first use, and what stays known of the root, which is never forgotten.
    assert len(os.listdir(mount.path)) == DIRECTORIES
    assert len(os.listdir(mount.path / "d0")) == FILES
    drop_caches(mount, 1)
    table_before, watches_before, memory_before = status(mount)["table"], watches(mount), memory(mount)

    peaks = []
    for _ in range(2):
        assert walk(mount.path) == DIRECTORIES * FILES
        if udba == "notify":
            assert watches(mount) == watches_before + DIRECTORIES
        assert status(mount)["table"]["nodes"] == 1 + DIRECTORIES * (1 + FILES)
        peaks.append(memory(mount))
        drop_caches(mount, 1)
        mount.flush()
        assert status(mount)["table"] == table_before
        assert watches(mount) == watches_before
    taken = peaks[0] - memory_before
    kept = memory(mount) - memory_before
    print(f"{udba}: before {memory_before >> 20} MiB, peaks {[p >> 20 for p in peaks]}, kept {kept / taken:.0%}")
    assert kept <= KEPT * taken
    assert peaks[1] - memory_before <= AGAIN * taken


@pytest.mark.alone
def test_what_was_only_half_looked_at_is_forgotten_too(union: UnionFactory, tmp_path: Path) -> None:
    """An entry that did not fit into the last reply of a listing, and objects that only an event has led to."""
    many, few = tmp_path / "base" / "many", tmp_path / "base" / "few"
    many.mkdir(parents=True)
    for number in range(3000):
        (many / f"a rather long name, so that replies are full {number}").touch()
    (few / "inner").mkdir(parents=True)
    (few / "inner" / "file").touch()
    mount = union({"top": "rw", "base": "ro"}, "notify")
    before = watches(mount)
    with os.scandir(mount.path / "many") as entries:
        next(entries)
    os.lstat(mount.path / "few" / "inner" / "file")
    (few / "inner").rename(few / "renamed")
    (few / "inner").mkdir()
    (few / "renamed" / "other").touch()
    mount.flush()
    assert status(mount)["table"]["nodes"] > 3
    drop_caches(mount, 1)
    assert watches(mount) == before
