"""One system under one workload in one repetition: mounts, clients, figures.

May not know which workloads exist. Invariant: after close nothing of this session is mounted, runs, or is on disk.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench import process
from tests.bench.data import GIT, Data, Scale
from tests.bench.process import Failed
from tests.bench.systems import Mounted, Place, System

QUIET_SECONDS = 0.3
QUIET = 0.01
"""The part of one processor that a daemon may use and still be quiet."""
SETTLE_SECONDS = 5.0
"""At most, before the measuring begins all the same."""


@dataclass(frozen=True)
class Figure:
    """One line of the table. Every figure is better when smaller, so that every ratio reads the same way."""

    key: str
    unit: str
    # Ratios to native mean nothing for a figure that is a ratio already, or that native does not have.
    compare: bool = True


class Session:
    """What a workload gets. lowers: the read-only branches; base: where upper, work and mount point go (same file
    system as the lowers, so that reflink is possible where there is any)."""

    def __init__(self, system: System, data: Data, lowers: tuple[Path, ...], base: Path, deadline: float) -> None:
        self.system = system
        self.data = data
        self.deadline = deadline
        self.samples: dict[str, float] = {}
        self.copies: tuple[str, ...] = ()
        self.place = Place(lowers, *(base / f"{part}-{system.name}" for part in ("up", "work", "mnt")))
        self.mounted: Mounted | None = None

    @property
    def scale(self) -> Scale:
        return self.data.scale

    @property
    def root(self) -> Path:
        if self.mounted is None:
            raise Failed("not mounted")
        return self.mounted.root

    def mount(self, level: int | None = None, variant: System | None = None) -> None:
        """Mount, anew if it was mounted: the daemon starts with nothing in memory. level: also drop the kernel's caches
        (process.drop_caches), so that what follows is cold on every side. variant: the system, mounted otherwise."""
        self.umount()
        mounted = self.mounted = Mounted(variant or self.system, self.place)
        # A daemon that compiles its sources at every start would show that in its memory.
        mounted.open(self.copies, {"PYTHONDONTWRITEBYTECODE": ""})
        if level is not None:
            self.drop(level)
        self._settle()

    def mount_in_background(self) -> float:
        """Mount as people type it, by a command that returns when the mount serves; returns how many seconds it took.
        Only where the system is mounted by a program; its daemon cannot be asked anything."""
        self.umount()
        self.mounted = Mounted(self.system, self.place)
        return self.mounted.open_in_background(self.deadline)

    def _settle(self) -> None:
        """Wait until udbad does nothing by itself: when it serves, it still loads what it may need later, and the CPU
        time of that, or its share of the processors, would go to what is measured. Peers load nothing then."""
        if self.system.kind != "udbad":
            return
        end = time.monotonic() + SETTLE_SECONDS
        before = -1.0
        while (now := process.cpu_seconds(self.daemon())) - before > QUIET * QUIET_SECONDS and time.monotonic() < end:
            before = now
            time.sleep(QUIET_SECONDS)

    def drop(self, level: int) -> None:
        process.drop_caches(self.data.scratch, level)

    def umount(self) -> None:
        if self.mounted is not None:
            self.mounted.close()
            self.mounted = None

    def close(self) -> None:
        self.umount()
        self.place.wipe()

    def record(self, key: str, value: float) -> None:
        self.samples[key] = value

    def client(self, *argv: object) -> dict[str, float]:
        """Run the C client under the deadline; returns what it printed. Raises Failed."""
        _, out = self._run([self.data.client, *map(str, argv)])
        return {key: float(value) for key, value in (line.split() for line in out.splitlines())}

    def per_operation(self, *argv: object) -> float:
        """Microseconds for one operation of a client run."""
        got = self.client(*argv)
        return got["seconds"] / got["count"] * 1e6

    def command(self, *argv: str | Path) -> float:
        """Run a program under the deadline, its output thrown away; returns seconds. Raises Failed."""
        return self._run(list(argv), discard=True)[0]

    def check_copied_up(self, name: str) -> None:
        """Raise Failed when a change of a lower file did not copy it up (mergerfs writes into the lower branch,
        whatever its mode): its time would be compared with that of a copy."""
        if not (self.place.upper / name).exists():
            raise Failed("changed the lower branch, copied nothing up")

    def output(self, *argv: str | Path) -> str:
        return self._run(list(argv))[1]

    def _run(self, argv: list[str | Path], discard: bool = False) -> tuple[float, str]:
        abort = self.mounted.abort if self.mounted is not None else None
        return process.run(argv, self.deadline, abort, env=os.environ | GIT, discard=discard)

    def daemon(self) -> int:
        """Process id of the daemon. Raises Failed for systems that have none."""
        if self.mounted is None:
            raise Failed("not mounted")
        return self.mounted.pid
