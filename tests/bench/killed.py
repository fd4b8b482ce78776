"""How long users wait when a mount process is killed: `python -m tests.bench.killed [KILLS]` (as root).

A mount made by hand and then one of the daemon: a writable branch over one with DIRECTORIES directories, all of which
the mount process knows. It is killed again and again, and each time something is asked for at once that the kernel
knows in no mode. Figures: milliseconds from the kill to the answer, and how many of them the process that has taken
over was on a processor, in all its threads; the rest is for the one that forks it, and waiting for a processor.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep

from tests.bench.hung import percentile
from tests.bench.process import cpu_seconds
from tests.helpers.killing import answered, worker
from tests.helpers.mount import mounted
from tests.t5_daemon.daemon import Daemon, until
from udbad.control import registry

KILLS = 60
DIRECTORIES = 100
BETWEEN = 0.5
"""Seconds from an answer to the next kill."""

Pid = Callable[[], int]
"""The process that serves."""


def _fill(base: Path) -> None:
    for number in range(DIRECTORIES):
        (base / f"d{number}").mkdir(parents=True)


@contextmanager
def by_hand(directory: Path) -> Iterator[tuple[Path, Pid]]:
    (directory / "top").mkdir()
    _fill(directory / "base")
    branches = [f"{directory}/top=rw", f"{directory}/base=ro"]
    with mounted(branches, directory / "mnt", "notify", "survive=on", allow_log="another one takes over") as mount:
        yield mount.path, lambda: worker(mount.process.pid)


@contextmanager
def of_the_daemon(directory: Path) -> Iterator[tuple[Path, Pid]]:
    daemon = Daemon(directory)
    daemon.executed = True
    try:
        path = daemon.add("pool", udba="notify", survive=True)
        _fill(daemon.branch("pool", "base"))
        daemon.start()
        daemon.wait_for("pool")
        yield path, lambda: until(lambda: [entry.pid for entry in registry.entries(daemon.run_dir)], "a process")[0]
        daemon.stop()
    finally:
        daemon.destroy()


def _after(pid: int, serving: Pid) -> int:
    """Who serves after a process."""
    found: int = until(lambda: (now := serving()) != pid and now, "another process")
    return found


def measure(path: Path, serving: Pid, kills: int) -> None:
    os.listdir(path)
    took, used = [], []
    for _ in range(kills):
        sleep(BETWEEN)
        pid = serving()
        begun = perf_counter()
        os.kill(pid, signal.SIGKILL)
        answered(path)
        took.append((perf_counter() - begun) * 1e6)
        used.append(cpu_seconds(_after(pid, serving)) * 1e6)
    for name, values in (("pause", took), ("on a processor", used)):
        print(f"  {name:16}" + "".join(f"{percentile(values, part):8.0f}" for part in (0.5, 0.99)))


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else KILLS
    print(f"{kills} kills, load {os.getloadavg()[0]:.0f} [ms]:    p50     p99")
    for way in (by_hand, of_the_daemon):
        print(way.__name__.replace("_", " "))
        with tempfile.TemporaryDirectory(prefix="udbad-killed-") as directory, way(Path(directory)) as (path, serving):
            measure(path, serving, kills)
    return 0


if __name__ == "__main__":
    sys.exit(main())
