"""Repetition: every repetition of a workload runs on every system in turn, so that noise of the machine hits all alike.

The rounds go through all workloads, so that a repetition is minutes away from the next one of the same workload, and so
that the run can end at any time with figures of all (budget.py). A run with an end spends its time on what ratios and
goals are made of: first once on everything but udba=reval, which takes as long as all others together, then once on
that, and then it repeats the rest, the shortest first, but for FUSE peers that are far from being the best in any
figure of a workload.
One run of each workload before its first is thrown away: it pays for what no cache had, programs included. The
order of the systems rotates from one round to the next. May not know what the workloads do. A system that fails gets
the reason in the result and is not asked again in that workload.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.bench import process
from tests.bench.budget import Budget
from tests.bench.data import Data
from tests.bench.process import Failed
from tests.bench.session import Figure, Session
from tests.bench.systems import SYSTEMS, System
from tests.bench.workload import Workload

NO_TIME = "no time was left"
ONCE = ("udbad-reval",)
CONTENDER = 1.5
"""A peer may still turn out to be the best when its first figure is so many times the best one's."""


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

    def best_peer(self, but: tuple[str, ...] = ()) -> float | None:
        """The lowest median among the FUSE competitors, some left out."""
        names = (name for name, system in SYSTEMS.items() if system.kind == "peer" and name not in but)
        return min((value for name in names if (value := self.median(name)) is not None), default=None)

    def ratio(self, name: str, base: float | None) -> float | None:
        """Median of a system divided by base; None where one of them is missing or a ratio says nothing."""
        value = self.median(name)
        return value / base if self.figure.compare and value is not None and base else None


class Course:
    """One workload over all rounds. taken: seconds of the last repetition on each system that still takes part."""

    def __init__(self, workload: Workload, systems: list[System]) -> None:
        self.workload = workload
        self.rows = [Row(workload.name, figure, {s.name: Cell() for s in systems}) for figure in workload.figures]
        self.taken = {system.name: 0.0 for system in systems if workload.applies(system)}
        self.repetitions = 0

    def add(self, name: str, samples: dict[str, float], reason: str, seconds: float) -> None:
        """What one session brought. A system that failed takes part no more."""
        for row in self.rows:
            cell = row.cells[name]
            if row.figure.key in samples:
                cell.samples.append(samples[row.figure.key])
            elif reason and not (cell.samples and reason == NO_TIME):
                cell.reason = reason
        self.taken[name] = seconds
        if reason:
            del self.taken[name]

    def contenders(self) -> list[str]:
        """The systems to repeat it on when time is short."""
        return [name for name in self.taken if self._contends(SYSTEMS[name])]

    def _contends(self, system: System) -> bool:
        if system.kind != "peer":
            return system.name not in ONCE
        for row in self.rows:
            best, mine = row.best_peer(), row.median(system.name)
            if row.figure.compare and best is not None and mine is not None and mine <= CONTENDER * best:
                return True
        return False

    def cost(self) -> float:
        """Seconds that the next repetition will take."""
        return sum(self.taken[name] for name in self.contenders())

    def figures(self) -> list[Row]:
        """Rows that say something."""
        return [row for row in self.rows if any(cell.samples or cell.reason for cell in row.cells.values())]


def rotated(names: list[str], turn: int) -> list[str]:
    turn %= max(1, len(names))
    return names[turn:] + names[:turn]


def one_session(workload: Workload, system: System, data: Data, budget: Budget) -> tuple[dict[str, float], str]:
    """Run a workload once on a system; returns its samples and, if it failed, the reason."""
    base = data.scratch / "run"
    if workload.file_system is not None:
        if workload.file_system not in data.loops:
            return {}, data.loop_errors.get(workload.file_system, "no such file system")
        base = data.loops[workload.file_system]
    deadline = budget.deadline(workload.deadline)
    session = Session(system, data, workload.lowers(data, base, system.name), base, deadline)
    session.copies = workload.copies
    reason = ""
    try:
        process.sync(data.scratch)  # what the previous session wrote is not to be waited for in this one
        workload.run(session)
    except (Failed, OSError, ValueError, KeyError) as error:  # what a client printed may be wrong in any way
        reason = str(error) or repr(error)
        if deadline < workload.deadline and not budget.left():
            reason = NO_TIME
    finally:
        session.close()
    return session.samples, reason


def one_round(
    course: Course, names: list[str], turn: int, data: Data, budget: Budget, progress: Callable[[str], None]
) -> None:
    """One repetition of a workload on these systems, and before the first one a run that is thrown away."""
    workload = course.workload
    if not course.repetitions and names and budget.left():
        progress(f"{workload.name}: {names[0]}, thrown away")
        one_session(workload, SYSTEMS[names[0]], data, budget)
    for name in rotated(names, turn):
        if not budget.left():
            course.add(name, {}, NO_TIME, 0.0)
            continue
        progress(f"{workload.name}: {name}, round {turn + 1}")
        began = budget.now()
        samples, reason = one_session(workload, SYSTEMS[name], data, budget)
        course.add(name, samples, reason, budget.now() - began)
    course.repetitions += 1


def measure(
    courses: list[Course],
    data: Data,
    repetitions: int,
    budget: Budget,
    progress: Callable[[str], None],
    log: Callable[[str], None],
) -> None:
    """Round by round, until each workload has its repetitions or no time is left. The courses have the figures."""

    def go_on(course: Course, turn: int, names: list[str]) -> None:
        if names:
            began = budget.now()
            one_round(course, names, turn, data, budget, progress)
            log(f"round {turn + 1}: {course.workload.name}: {budget.now() - began:.0f} s")

    once = ONCE if budget.bounded else ()
    for late in (False, True):
        for course in courses:
            go_on(course, 0, [name for name in course.taken if (name in once) is late])
    for turn in range(1, repetitions):
        for course in sorted(courses, key=Course.cost) if budget.bounded else courses:
            names = course.contenders() if budget.bounded else list(course.taken)
            if not course.workload.once and budget.allows(course.taken[name] for name in names):
                go_on(course, turn, names)
