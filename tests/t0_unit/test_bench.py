"""The benchmark's pure parts: what its time is spent on, medians and ratios, goals, the report. No figure is a test."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from tests.bench import budget as budgets
from tests.bench import containers, fusetrace, machine, measure, plot, process, report
from tests.bench.budget import Budget
from tests.bench.data import FULL, QUICK, Data, Scale
from tests.bench.goals import Goal, checks, goals
from tests.bench.measure import NO_TIME, Cell, Course, Row
from tests.bench.session import Figure, Session
from tests.bench.systems import REPOSITORY, SYSTEMS, Place, System
from tests.bench.workload import Workload, figures
from tests.bench.workloads import all_workloads
from udbad.settings.options import parse_mount_options


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_row(key: str, unit: str = "us", *, compare: bool = True, **medians: float) -> Row:
    """Names of systems with _ for -."""
    cells = {name.replace("_", "-"): Cell([value]) for name, value in medians.items()}
    return Row("workload", Figure(key, unit, compare), cells)


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system with io=cached, whether or not udbad has that."""
    system = System("udbad-notify-cached", "udbad", lambda place: [], io="cached")
    monkeypatch.setitem(SYSTEMS, system.name, system)


# Budget


def test_what_ends_in_time_is_allowed() -> None:
    clock = Clock()
    budget = Budget(100, clock)
    assert budget.bounded
    clock.now += 10
    assert budget.allows([10, 40, 40])
    clock.now += 1
    assert not budget.allows([10, 40, 40])


def test_without_an_end_everything_is_allowed() -> None:
    budget = Budget(0, Clock())
    assert not budget.bounded
    assert budget.allows([1e9])
    assert budget.deadline(120) == 120


def test_the_deadline_of_a_client_is_not_after_the_end() -> None:
    clock = Clock()
    budget = Budget(100, clock)
    assert budget.deadline(60) == 60
    assert budget.deadline(120) == 100
    clock.now += 200
    assert budget.left() == 0
    assert budget.deadline(120) == budgets.LEAST


# Rounds


def nothing(session: Session) -> None:
    """A workload's function, never called."""


def ignore(message: str) -> None:
    """Of progress."""


Sessions = list[tuple[str, str]]


class Machine:
    """In the place of real sessions: each takes the seconds of its (workload, system)."""

    def __init__(self, clock: Clock, seconds: dict[tuple[str, str], float], failing: tuple[str, ...] = ()) -> None:
        self.clock = clock
        self.seconds = seconds
        self.failing = failing
        self.ran: Sessions = []

    def one_session(
        self, workload: Workload, system: System, data: Data, budget: Budget
    ) -> tuple[dict[str, float], str]:
        self.ran.append((workload.name, system.name))
        self.clock.now += self.seconds.get((workload.name, system.name), 1.0)
        if system.name in self.failing:
            return {}, "broke"
        return {workload.name: float(len(self.ran))}, ""


def run_rounds(
    monkeypatch: pytest.MonkeyPatch,
    names: dict[str, bool],
    systems: list[str],
    *,
    seconds: float,
    repetitions: int = 3,
    taking: dict[tuple[str, str], float] | None = None,
    failing: tuple[str, ...] = (),
) -> tuple[Sessions, list[Course]]:
    """names: of the workloads, and whether they run once; returns what ran, and the courses with the figures."""
    clock = Clock()
    machine = Machine(clock, taking or {}, failing)
    monkeypatch.setattr(measure, "one_session", machine.one_session)
    courses = [
        Course(Workload(name, nothing, figures("us", name), once=once), [SYSTEMS[system] for system in systems])
        for name, once in names.items()
    ]
    measure.measure(courses, cast("Data", None), repetitions, Budget(seconds, clock), ignore, ignore)
    return machine.ran, courses


def test_every_workload_runs_once_before_any_runs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    systems = ["native", "udbad-none"]
    ran, _ = run_rounds(monkeypatch, {"a": False, "b": False}, systems, seconds=1000, repetitions=2)
    first = ["native", *systems]  # one is thrown away
    again = ["udbad-none", "native"]  # the order rotates
    assert ran == [(name, system) for order in (first, again) for name in "ab" for system in order]


def test_a_workload_that_says_all_at_once_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, courses = run_rounds(monkeypatch, {"a": True, "b": False}, ["native"], seconds=1000)
    assert [len(course.rows[0].cells["native"].samples) for course in courses] == [1, 3]


def test_repetitions_go_before_rows_do(monkeypatch: pytest.MonkeyPatch) -> None:
    # First round: 1 + 1 and 10 + 10, the second half of each thrown away. 4 seconds are left: enough for a only.
    _, courses = run_rounds(
        monkeypatch, {"a": False, "b": False}, ["udbad-none"], seconds=26, taking={("b", "udbad-none"): 10.0}
    )
    assert [len(course.rows[0].cells["udbad-none"].samples) for course in courses] == [3, 1]
    assert not any(cell.reason for course in courses for row in course.rows for cell in row.cells.values())


def test_what_no_time_was_left_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    _, courses = run_rounds(monkeypatch, {"a": False, "b": False}, ["native", "udbad-none"], seconds=4)
    rows = [row for course in courses for row in course.figures()]
    assert report.reasons(rows) == [f"native: {NO_TIME} (b)", f"udbad-none: {NO_TIME} (b)"]


def test_what_asks_at_every_step_comes_when_all_others_have_been(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, _ = run_rounds(monkeypatch, {"a": False, "b": False}, ["udbad-reval", "udbad-none"], seconds=1000)
    late = [i for i, (_, system) in enumerate(ran) if system == "udbad-reval"]
    assert ran[:4] == [(name, "udbad-none") for name in "aabb"]  # the first one of each is thrown away
    assert late == [4, 5]


def test_what_cannot_be_the_best_is_not_repeated() -> None:
    names = ["native", "overlayfs", "mergerfs", "fuse-overlayfs", "unionfs-fuse", "udbad-reval", "udbad-none"]
    workload = Workload("w", nothing, (*figures("us", "a", "b"), *figures("x", "c", compare=False)))
    course = Course(workload, [SYSTEMS[name] for name in names])
    for name in names:
        course.add(name, {"a": 10, "b": 10, "c": 10}, "", 1)
    course.add("mergerfs", {"a": 100, "b": 15, "c": 10}, "", 1)
    course.rows[0].cells["unionfs-fuse"].samples = [16]
    course.rows[1].cells["unionfs-fuse"].samples = [16]
    assert measure.CONTENDER == 1.5
    assert course.contenders() == ["native", "overlayfs", "mergerfs", "fuse-overlayfs", "udbad-none"]


def test_all_is_repeated_when_there_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    systems = ["udbad-none", "udbad-reval"]
    ran, _ = run_rounds(monkeypatch, {"a": False}, systems, seconds=0, repetitions=2)
    assert ran.count(("a", "udbad-reval")) == 2
    ran, _ = run_rounds(monkeypatch, {"a": False}, systems, seconds=1000, repetitions=2)
    assert ran.count(("a", "udbad-reval")) == 1


def test_a_system_that_failed_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, courses = run_rounds(
        monkeypatch, {"a": False}, ["native", "mergerfs"], seconds=1000, failing=("mergerfs",)
    )  # fmt: skip
    assert ran.count(("a", "mergerfs")) == 1
    assert courses[0].rows[0].cells["mergerfs"].reason == "broke"


# Medians and ratios


def test_median_and_spread_of_a_cell() -> None:
    cell = Cell([4.0, 1.0, 2.0])
    assert cell.median == 2
    assert cell.spread == 0.75
    assert Cell().median is None


def test_the_best_peer_is_a_fuse_file_system_of_others() -> None:
    row = make_row("stat", native=1, overlayfs=2, mergerfs=6, mergerfs_cache=5, udbad_none=3)
    assert row.best_peer() == 5
    assert row.best_peer(but=("mergerfs-cache",)) == 6
    assert row.ratio("udbad-none", row.best_peer()) == 0.6


def test_an_io_mode_of_its_own_runs_only_where_it_matters(cached: None) -> None:
    workload = Workload("w", nothing, ())
    assert not workload.applies(SYSTEMS["udbad-notify-cached"])
    assert workload.applies(SYSTEMS["udbad-notify"])


# Goals


@pytest.mark.parametrize("scale", [FULL, QUICK])
def test_every_goal_is_about_a_figure_there_is(scale: Scale) -> None:
    known = [Row(workload.name, figure, {}) for workload in all_workloads(scale) for figure in workload.figures]
    keys = {row.figure.key for row in known}
    for goal in goals(known):
        assert goal.figure in keys
        assert not goal.other or goal.other in keys


def test_figures_have_names_of_their_own() -> None:
    keys = [figure.key for workload in all_workloads(FULL) for figure in workload.figures]
    assert len(set(keys)) == len(keys)


def check_of(goal_figure: str, rows: list[Row], system: str) -> tuple[float, bool]:
    found = [check for check in checks(rows) if check.goal.figure == goal_figure and check.system == system]
    assert len(found) == 1
    return found[0].value, found[0].met


def test_a_goal_is_met_at_its_limit() -> None:
    row = make_row("find cold", fuse_overlayfs=10, mergerfs=20, udbad_none=8, udbad_notify=9)
    assert check_of("find cold", [row], "udbad-none") == (0.8, True)
    assert check_of("find cold", [row], "udbad-notify") == (0.9, False)


def test_goals_have_different_bases() -> None:
    rows = [
        make_row("find warm", mergerfs=10, mergerfs_cache=1, udbad_none=10),
        make_row("stat warm", native=2, udbad_none=3, udbad_reval=50),
        make_row("mount to serving", "ms", mergerfs=1, udbad_none=140),
        make_row("lookup missing, 2 branches", udbad_none=10),
        make_row("lookup missing, 500 branches", udbad_none=11),
    ]
    assert check_of("find warm", rows, "udbad-none") == (1.0, True)
    assert check_of("stat warm", rows, "udbad-none") == (1.5, False)
    assert check_of("stat warm", rows, "udbad-reval") == (50, True)
    assert check_of("mount to serving", rows, "udbad-none") == (140, True)
    assert check_of("lookup missing, 500 branches", rows, "udbad-none") == (1.1, True)


def test_nothing_is_said_of_a_goal_without_a_figure() -> None:
    assert checks([make_row("find cold", udbad_none=8)]) == []  # no peer to compare with
    assert checks([]) == []


def test_the_goals_of_an_io_mode_are_for_its_systems(cached: None) -> None:
    row = make_row("read small warm", native=10, udbad_notify=100, udbad_notify_cached=12)
    assert check_of("read small warm", [row], "udbad-notify-cached") == (1.2, True)
    assert [check.system for check in checks([row])] == ["udbad-notify-cached"]


def test_a_goal_says_what_it_is() -> None:
    assert Goal("x", 0.8).text("ms") == "0.8 of best peer"
    assert Goal("x", 1.3, "native").text("us") == "1.3 of native"
    assert Goal("x", 350, "itself").text("B") == "350 B"


# The report


def test_a_line_shows_medians_goal_and_whether_it_is_met() -> None:
    row = make_row("find cold", "ms", native=5, mergerfs=20, fuse_overlayfs=10, udbad_none=8, udbad_notify=12)
    text = report.markdown([row], {"cpus": "2"}, "bench.svg")
    assert (
        "| figure | native | fuse-overlayfs | mergerfs | udbad-none | udbad-notify | goal | met? |" in text.splitlines()
    )
    assert (
        "| find cold [ms] | 5.00 | **10.0** | 20.0 | 8.00 (0.80) | 12.0 (1.20) | 0.8 of best peer "
        "| none 0.80 met, notify 1.20 **missed** |"
    ) in text.splitlines()
    assert "1 of 2 goals met." in text
    short = report.short([row], {"cpus": "2"})
    assert "| find cold [ms] | 5.00 | - | 10.0 (fuse-overlayfs) | 8.00 (0.80) | 12.0 (1.20) |" in short


def test_an_io_mode_has_a_line_of_its_own(cached: None) -> None:
    row = make_row("read small warm", native=10, mergerfs=20, udbad_notify=40, udbad_notify_cached=12)
    first, second = report.lines([row])
    assert first.label == "read small warm [us]"
    assert report.figure_text(first, "udbad-notify") == "40.0 (2.00)"
    assert second.label == "read small warm, io=cached [us]"
    assert report.figure_text(second, "udbad-notify") == "12.0 (0.60)"
    assert report.figure_text(second, "native") == "10.0"
    assert report.met_text(second) == "notify 1.20 met"
    assert report.met_text(first) == ""


def test_workloads_of_udbad_alone_have_a_table_of_their_own() -> None:
    alone = make_row("seen after create", udbad_notify=1)
    alone.workload = "latency"
    rows = [make_row("find cold", mergerfs=1, udbad_notify=2), make_row("udbad --help", udbad_notify=2), alone]
    assert [[line.row for line in part] for part in report.split(report.lines(rows))] == [rows[:2], [alone]]


def test_a_row_without_figures_is_no_line_but_a_reason() -> None:
    row = make_row("find cold")
    row.cells = {"udbad-none": Cell(reason=NO_TIME)}
    assert report.lines([row]) == []
    assert report.reasons([row]) == [f"udbad-none: {NO_TIME} (workload)"]


def test_fewer_repetitions_are_said() -> None:
    row = make_row("find cold", mergerfs=1, udbad_reval=2)
    row.cells["mergerfs"].samples.append(2.0)
    assert report.repetitions([row]) == "workload 2 (udbad-reval 1)"


def test_a_page_takes_the_new_table() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.replaced(page, "new\n") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="no <!--"):
        report.replaced("nothing to replace", "new\n")


def test_the_page_of_the_figures_has_a_place_for_them() -> None:
    assert report.replaced((REPOSITORY / "docs/performance.md").read_text(), "new\n")


def test_every_io_mode_is_one_that_udbad_has() -> None:
    place = Place((Path("/lower"),), Path("/upper"), Path("/work"), Path("/mnt"))
    for system in SYSTEMS.values():
        if system.kind == "udbad":
            argv = system.argv(place)
            assert parse_mount_options([argv[argv.index("-o") + 1]]).io == (system.io or "requests")


def test_the_plot_has_a_colour_for_each_system() -> None:
    assert set(plot.COLOURS) == {system.column for system in SYSTEMS.values()}


# Children


def test_requests_are_counted_from_the_statistics_of_a_tracing_buffer() -> None:
    assert fusetrace.entries("entries: 40\noverrun: 2\ncommit overrun: 9\nread events: 3\n") == 42


def test_a_command_is_over_when_it_ends_not_when_its_daemon_does(tmp_path: Path) -> None:
    program = "sleep 5 & echo $!; echo done"
    seconds, out = process.run(["sh", "-c", program], deadline=4)
    assert out.endswith("done\n")
    assert seconds < 4
    process.run(["kill", out.split()[0]], deadline=4)


def test_a_command_that_does_not_end_is_ended() -> None:
    called: list[bool] = []
    with pytest.raises(process.Failed, match="sleep not done after 0 s"):
        process.run(["sleep", "5"], deadline=0.1, wedged=lambda: called.append(True))
    assert called


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(process.Failed, match="broken"):
        process.run(["sh", "-c", "echo broken >&2; exit 3"], deadline=4, discard=True)


def test_containers_that_were_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    cost = containers.Cost(2.0, 1.0)
    both, one = {containers.OURS: [cost], containers.THEIRS: [cost], containers.KERNELS: []}, {containers.OURS: [cost]}
    containers._print({"both": both, "one": one, "none": {containers.OURS: []}})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        ["both", "2.00", "2.00", "-", "1.00", "1.00", "1.00", "-", "1.00", "1"],
        ["one", "2.00", "-", "-", "-", "1.00", "-", "-", "-", "1"],
    ]


@pytest.mark.parametrize(("before", "meanwhile"), [("0", str(machine.HALT_POLL_NS)), ("50000", "50000")])
def test_the_machine_is_awake_meanwhile(
    before: str, meanwhile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What halts without polling polls for the run, also for one that fails; what polls is left alone."""
    setting = tmp_path / "guest_halt_poll_ns"
    setting.write_text(f"{before}\n")
    monkeypatch.setattr(machine, "HALT_POLL", setting)
    seen = []

    def run() -> None:
        with machine.awake():
            seen.append(setting.read_text().strip())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert seen == [meanwhile]
    assert setting.read_text().strip() == before


def test_a_machine_that_cannot_poll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "HALT_POLL", tmp_path / "no" / "module")
    with machine.awake():
        assert "guest_halt_poll_ns" not in machine.versions(tmp_path)
