"""What a tree of very many directories costs in notify: `python -m tests.bench.million [DIRECTORIES]` (as root).

Two mounts side by side, of a tree with so many directories (1,000,000) and of one with FEW, both on tmpfs, and in both
the same small part that is worked in. Everything is read once, cold; then the same warm operations in turns, so that
whatever else the machine does meets both; then direct changes at random places of the large one, each of which is
waited for through the mount; then what takes everything at once: lost events, a killed mount process, and the kernel
forgetting all of it. Meanwhile a process asks the mount for what is never cached, without a pause: the longest it has
waited is how long the event loop was held.

Watches go to inotify as long as there are any, and then to fanotify, unless OPTIONS say otherwise (third argument).
"""

from __future__ import annotations

import mmap
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, perf_counter_ns, sleep
from typing import Any

from tests.bench.hung import percentile, timed
from tests.helpers.killing import stopped
from tests.helpers.mount import Mount

MILLION = 1_000_000
FEW = 100
FAN_OUT = 100
"""Directories in a directory."""
PART = 100
"""Directories of the part that is worked in, with FILES files each."""
FILES = 10
SLABS = ("fuse_inode", "dentry", "inotify_inode_mark", "fsnotify_mark_connector")
SECONDS = 3600.0
"""That a mount may last."""

Took = dict[str, list[int]]


@dataclass
class Figures:
    """What was measured, by its name, with its unit; and what was not as it should be."""

    values: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def note(self, name: str, value: float) -> None:
        self.values[name] = value
        print(f"{name:58}{value:14,.1f}", flush=True)


def path_of(number: int) -> str:
    """Where directory `number` is, from 1 on, below the root of the tree."""
    names = []
    while number:
        names.append(f"d{number}")
        number = (number - 1) // FAN_OUT
    return "/".join(reversed(names))


def make_tree(base: Path, directories: int) -> None:
    for number in range(PART):
        (base / f"part/p{number}").mkdir(parents=True)
        for name in range(FILES):
            (base / f"part/p{number}/f{name}").write_bytes(b"of the branch below")
    for number in range(1, directories + 1):
        os.mkdir(base / path_of(number))


def count_directories(root: Path) -> int:
    """As `find` sees them, below `root`."""
    command = ["find", str(root), "-mindepth", "1", "-type", "d", "-printf", "."]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return len(found.stdout)


class _Child:
    """A process of ours, and those it makes, with something to do until `end`."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._pid = os.fork()
        self._ended = False
        if not self._pid:
            try:
                os.setsid()
                work()
            except BaseException:
                traceback.print_exc()
            os._exit(1)

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            os.killpg(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


class Holder(_Child):
    """Reads every directory below one, and has a descriptor of each from then on: the kernel forgets none of them,
    whatever else the machine does."""

    def __init__(self, root: Path) -> None:
        self._said, self._say = os.pipe()
        super().__init__(lambda: self._run(root))
        os.close(self._say)
        self.found = int(os.read(self._said, 100) or -1)
        """How many there are."""
        os.close(self._said)

    def _run(self, root: Path) -> None:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        held: list[int] = []
        waiting, found = [str(root)], 0
        while waiting:
            if len(held) > most - 100:
                if os.fork():
                    signal.pause()
                for fd in held:  # another process goes on, and this one has them
                    os.close(fd)
                held.clear()
            path = waiting.pop()
            held.append(os.open(path, os.O_PATH | os.O_DIRECTORY))
            with os.scandir(path) as entries:
                inside = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            found += len(inside)
            waiting += inside
        os.write(self._say, b"%d" % found)
        signal.pause()


class Prober(_Child):
    """A process that asks a mount for its size, which no kernel keeps, again and again."""

    def __init__(self, path: Path) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        super().__init__(lambda: self._run(path))

    def _run(self, path: Path) -> None:
        while True:
            begun = perf_counter_ns()
            os.statvfs(path)
            took = perf_counter_ns() - begun
            if took > struct.unpack_from("=Q", self._memory)[0]:
                struct.pack_into("=Q", self._memory, 0, took)
            sleep(0.001)

    def worst(self) -> float:
        """Milliseconds, since the last time."""
        sleep(0.05)
        worst = int(struct.unpack_from("=Q", self._memory)[0])
        struct.pack_into("=Q", self._memory, 0, 0)
        return worst / 1e6


def resident(pid: int) -> int:
    """Bytes of memory of a process that are its own."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s*(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def slabs() -> dict[str, int]:
    """Bytes of objects in use of the kernel, of all programs together."""
    used = dict.fromkeys(SLABS, 0)
    for line in Path("/proc/slabinfo").read_text().splitlines()[2:]:
        name, active, _, size = line.split()[:4]
        if name in used:
            used[name] = int(active) * int(size)
    return used


def worker(mount: Mount) -> int:
    return int(mount.control({"op": "status"})["pid"])


def stats(mount: Mount) -> dict[str, Any]:
    return mount.control({"op": "stats"})


@contextmanager
def union(directory: Path, directories: int, options: str, figures: Figures) -> Iterator[Mount]:
    """A new tree, mounted below an empty branch."""
    (directory / "top").mkdir(parents=True)
    make_tree(directory / "base", directories)
    branches = [f"{directory}/top=rw", f"{directory}/base=ro"]
    mount = Mount(branches, directory / "mnt", "notify", f"survive=on{options}", watchdog=SECONDS)
    try:
        begun = perf_counter()
        mount.start()
        figures.note(f"mount of {directories:,} directories to serving [ms]", (perf_counter() - begun) * 1e3)
        yield mount
        mount.unmount()
    finally:
        mount.destroy()


def warm_round(root: Path, turn: int, took: Took) -> None:
    part = root / "part"
    timed(took, "find", count_directories, part)
    for number in random.Random(turn).sample(range(PART), 20):
        here = part / f"p{number}"
        for name in range(FILES):
            timed(took, "stat", os.stat, here / f"f{name}")
            timed(took, "read", (here / f"f{name}").read_bytes)
        timed(took, "create", (here / "new").write_bytes, b"new")
        timed(took, "unlink", os.unlink, here / "new")


def wait_until(seen: Callable[[], bool], seconds: float = 10.0) -> float:
    """Milliseconds until a direct change shows."""
    begun = perf_counter()
    while not seen():
        if perf_counter() - begun > seconds:
            raise AssertionError(f"not seen for {seconds:.0f} s")
        sleep(0.0002)
    return (perf_counter() - begun) * 1e3


def change_one(direct: Path, seen: Path) -> list[float]:
    """Changes of a directory that is on the lower branch, one after the other; milliseconds until each is seen."""
    took = []
    assert not (seen / "new").exists()
    (direct / "new").write_bytes(b"1")
    took.append(wait_until((seen / "new").exists))
    (direct / "new").write_bytes(b"longer")
    took.append(wait_until(lambda: (seen / "new").read_bytes() == b"longer"))
    os.rename(direct / "new", direct / "other")
    took.append(wait_until(lambda: not (seen / "new").exists()))
    os.chmod(direct, 0o711)
    took.append(wait_until(lambda: seen.stat().st_mode & 0o777 == 0o711))
    assert (seen / "other").exists()
    os.unlink(direct / "other")
    took.append(wait_until(lambda: not (seen / "other").exists()))
    return took


def lose_events(mount: Mount) -> float:
    """Have the kernel's queue of inotify overflow, while the process is stopped; milliseconds that it was. 0: nothing
    was lost, as fanotify's queue does not."""
    before = stats(mount)["coherence"]["overflows"]
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    pid = worker(mount)
    begun = perf_counter()
    with stopped(pid):
        for number in range(most // 2 + 100):
            file = mount["base"] / f"many{number}"  # the root got the first watch
            file.touch()
            file.unlink()
    stood = (perf_counter() - begun) * 1e3
    mount.flush()
    return stood if stats(mount)["coherence"]["overflows"] > before else 0.0


def side_by_side(few: Mount, many: Mount, directories: int, rounds: int, figures: Figures) -> None:
    rows: dict[str, Took] = {f"{FEW:,}": defaultdict(list), f"{directories:,}": defaultdict(list)}
    for turn in range(-1, rounds):
        for mount, took in zip((few, many), rows.values(), strict=True):
            warm_round(mount.path, turn, took if turn >= 0 else defaultdict(list))
    for row in rows[f"{FEW:,}"]:
        for name, took in rows.items():
            figures.note(f"{row} warm, of {name} [us]", percentile(took[row], 0.5))


def change_directly(mount: Mount, directories: int, places: int, figures: Figures, when: str = "") -> None:
    took = []
    for number in random.Random(f"{directories} {when}").choices(range(1, directories + 1), k=places):
        direct, seen = mount["base"] / path_of(number), mount.path / path_of(number)
        took += change_one(direct, seen)
        if sorted(os.listdir(direct)) != sorted(os.listdir(seen)):
            figures.wrong.append(f"{seen} after direct changes {when}")
    figures.note(f"direct change {when} until seen, median [ms]", percentile(took, 0.5) * 1e3)
    figures.note(f"direct change {when} until seen, worst [ms]", max(took))


def run(place: Path, directories: int, options: str = "", rounds: int = 10, places: int = 100) -> Figures:
    """All of it, below `place`, on a file system with that much room.

    options: further mount options. rounds: of warm operations. places: where direct changes are made.
    """
    figures = Figures()
    note = figures.note
    options = f",{options}" if options else ""
    wanted = directories + PART + 1
    with ExitStack() as ending:
        few = ending.enter_context(union(place / "few", FEW, options, figures))
        many = ending.enter_context(union(place / "many", directories, options, figures))
        root = many.path
        prober = Prober(root)
        ending.callback(prober.end)

        def all_read(when: str) -> Holder:
            prober.worst()
            begun = perf_counter()
            holder = Holder(root)
            note(f"all read {when} [s]", perf_counter() - begun)
            note("held by that at most [ms]", prober.worst())
            if holder.found != wanted:
                figures.wrong.append(f"{when}: {holder.found} directories, not {wanted}")
            return holder

        memory, kernel = resident(worker(many)), slabs()
        holder = all_read("cold")
        ending.callback(holder.end)
        known = stats(many)["table"]["directories"]
        note("memory of the daemon, a directory [B]", (resident(worker(many)) - memory) / known)
        note("memory of the kernel, a directory [B]", sum(after - kernel[n] for n, after in slabs().items()) / known)
        for part in ("watches", "handles"):
            note(part, stats(many)["coherence"][part])
        note("held by statistics at most [ms]", prober.worst())
        all_read("warm").end()

        count_directories(few.path)
        side_by_side(few, many, directories, rounds, figures)
        change_directly(many, directories, places, figures)

        prober.worst()
        if stopped := lose_events(many):
            note("held by lost events at most [ms]", max(prober.worst() - stopped, 0.0))
            change_directly(many, directories, places, figures, "after lost events")
        prober.worst()
        os.kill(worker(many), signal.SIGKILL)
        os.statvfs(root)
        note("pause after a kill [ms]", prober.worst())
        change_directly(many, directories, places, figures, "after a kill")
        note("held by that at most [ms]", prober.worst())

        holder.end()
        begun = perf_counter()
        while stats(many)["table"]["nodes"] > wanted // 100:
            Path("/proc/sys/vm/drop_caches").write_text("2")
        note("all forgotten [s]", perf_counter() - begun)
        note("held by that at most [ms]", prober.worst())
        note("memory of the daemon then [MiB]", resident(worker(many)) / (1 << 20))
    return figures


def main() -> int:
    directories = int(sys.argv[1]) if len(sys.argv) > 1 else MILLION
    with tempfile.TemporaryDirectory(prefix="udbad-million-") as place:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90%,nr_inodes=0", "none", place], check=True)
        try:
            figures = run(Path(place), directories, ",".join(sys.argv[2:]))
        finally:
            subprocess.run(["umount", "-i", "-l", place], check=True)
    for wrong in figures.wrong:
        print("WRONG:", wrong)
    return bool(figures.wrong)


if __name__ == "__main__":
    sys.exit(main())
