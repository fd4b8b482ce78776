"""Repetition: every repetition of a workload runs on every system in turn, so that noise of the machine hits all alike.

One run before the first is thrown away: it pays for what no cache had, programs included. The order
rotates from one repetition to the next. May not know what the workloads do. A system that fails gets the reason in the
result and is not asked again in that workload.
"""

import contextlib
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench import process
from tests.bench.data import Data
from tests.bench.process import Failed
from tests.bench.session import Figure, Session
from tests.bench.systems import SYSTEMS, System
from tests.bench.workloads import Workload


@dataclass
class Cell:
    """One figure of one system: samples, or why there are none ("" for a figure that makes no sense there)."""

    samples: list[float] = field(default_factory=list)
    reason: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    @property
    def spread(self) -> float:
        """Half of the distance from the lowest to the highest sample, as a part of the median."""
        middle = self.median
        return (max(self.samples) - min(self.samples)) / 2 / middle if middle else 0.0


@dataclass
class Row:
    """One figure of all systems."""

    workload: str
    figure: Figure
    cells: dict[str, Cell]

    def median(self, name: str) -> float | None:
        return self.cells[name].median if name in self.cells else None

    def best_peer(self) -> float | None:
        """The lowest median among the FUSE competitors."""
        medians = [self.median(name) for name, system in SYSTEMS.items() if system.kind == "peer"]
        return min((value for value in medians if value is not None), default=None)

    def ratio(self, name: str, base: float | None) -> float | None:
        """Median of a system divided by base; None where one of them is missing or a ratio says nothing."""
        value = self.median(name)
        return value / base if self.figure.compare and value is not None and base else None


def applies(workload: Workload, system: System) -> bool:
    """Does this workload make sense for this system?"""
    if workload.systems is not None:
        return system.name in workload.systems
    return system.kind in workload.kinds


def one_session(workload: Workload, system: System, data: Data) -> tuple[dict[str, float], str]:
    """Run a workload once on a system; returns its samples and, if it failed, the reason."""
    base = data.scratch / "run"
    if workload.file_system is not None:
        if workload.file_system not in data.loops:
            return {}, data.loop_errors.get(workload.file_system, "no such loop device")
        base = data.loops[workload.file_system]
    session = Session(system, data, workload.lowers(data, base, system.name), base, workload.deadline)
    session.copies = workload.copies
    reason = ""
    try:
        process.sync(data.scratch)  # what the previous session wrote is not to be waited for in this one
        workload.run(session)
    except (Failed, OSError, ValueError, KeyError) as error:  # what a client printed may be wrong in any way
        reason = str(error) or repr(error)
    finally:
        session.close()
    return session.samples, reason


def measure(
    workload: Workload,
    systems: list[System],
    data: Data,
    repetitions: int,
    progress: Callable[[str], None],
) -> list[Row]:
    """Run one workload on all systems, repetitions times; returns its rows."""
    rows = [Row(workload.name, figure, {system.name: Cell() for system in systems}) for figure in workload.figures]
    waiting = [system for system in systems if applies(workload, system)]
    if waiting:
        progress(f"{workload.name}: {waiting[0].name}, thrown away")
        one_session(workload, waiting[0], data)
    for repetition in range(repetitions):
        turn = repetition % max(1, len(waiting))
        for system in waiting[turn:] + waiting[:turn]:
            progress(f"{workload.name}: {system.name} {repetition + 1}/{repetitions}")
            samples, reason = one_session(workload, system, data)
            for row in rows:
                cell = row.cells[system.name]
                if row.figure.key in samples:
                    cell.samples.append(samples[row.figure.key])
                elif reason:
                    cell.reason = reason
            if reason:
                waiting = [other for other in waiting if other is not system]
    return [row for row in rows if any(cell.samples or cell.reason for cell in row.cells.values())]


def versions(scratch: Path) -> dict[str, str]:
    """What was measured, on what."""
    found = {"kernel": platform.release(), "python": platform.python_version()}
    for name, argv in {
        "fuse-overlayfs": ["fuse-overlayfs", "--version"],
        "mergerfs": ["mergerfs", "--version"],
        "unionfs-fuse": ["unionfs", "--version"],
        "fio": ["fio", "--version"],
        "file system": ["stat", "-f", "-c", "%T", str(scratch)],
        "git": ["git", "--version"],
        "gcc": ["gcc", "-dumpfullversion"],
    }.items():
        with contextlib.suppress(Failed, OSError):
            lines = process.run(argv, deadline=10)[1].strip().splitlines()
            found[name] = next((line for line in lines if line.startswith(name)), lines[0])  # not libfuse's version
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].splitlines()[0]
        found["cpu"] = cpu
    found["cpus"] = str(os.cpu_count())
    found["load average"] = " ".join(f"{value:.1f}" for value in os.getloadavg())  # a busy machine shows here
    found["memory"] = Path("/proc/meminfo").read_text().splitlines()[0].partition(":")[2].strip()
    return found
