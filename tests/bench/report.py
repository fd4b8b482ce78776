"""What comes out: a table in the terminal, JSON with the raw samples, Markdown for people.

May not measure anything. A figure has one line, and one more for each io mode of udbad that is not the default and was
measured: there the columns of udbad are those systems, all others the same.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.bench.goals import Check, checks
from tests.bench.measure import Row
from tests.bench.systems import SYSTEMS

CAPTION = (
    "Medians ± half of the spread; of udbad in brackets the ratio to the best FUSE peer of the same line, which is set "
    "in bold. Less is better. Goals are those of udbad-none and udbad-notify where nothing else is said"
)
BEST_PEER = "best FUSE peer"
SHOWN = ("udbad", "kernel", "cpus", "cpu", "guest_halt_poll_ns")
"""What is said of the machine below the lines that have a goal."""
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


@dataclass(frozen=True)
class Line:
    """One line of the table. columns: the system that is shown in each column."""

    row: Row
    io: str
    columns: Mapping[str, str]
    checks: tuple[Check, ...]

    @property
    def name(self) -> str:
        return self.row.figure.key + (f", io={self.io}" if self.io else "")

    @property
    def label(self) -> str:
        """The name and the unit."""
        return self.name + (f" [{self.row.figure.unit}]" if self.row.figure.unit else "")


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def used(rows: Iterable[Row]) -> list[str]:
    """Columns: the systems that have anything to show, those with an io mode of their own in the column of the mode."""
    known = (name for row in rows for name, cell in row.cells.items() if cell.samples or cell.reason)
    columns = {SYSTEMS[name].column for name in known}
    return [name for name in SYSTEMS if name in columns]


def lines(rows: list[Row]) -> list[Line]:
    """The lines of the table, in the order of the rows; none for a row without any figure (`reasons` has it)."""
    rows = [row for row in rows if any(cell.samples for cell in row.cells.values())]
    columns = used(rows)
    checked = checks(rows)
    found = []
    for row in rows:
        names = [name for name, cell in row.cells.items() if cell.samples or cell.reason]
        for io in dict.fromkeys(("", *(SYSTEMS[name].io for name in names))):
            shown = {column: column for column in columns if SYSTEMS[column].kind != "udbad"}
            shown |= {SYSTEMS[name].column: name for name in names if SYSTEMS[name].kind == "udbad"
                      and SYSTEMS[name].io == io}  # fmt: skip
            mine = (check for check in checked if check.goal.figure == row.figure.key and check.goal.io == io)
            found.append(Line(row, io, shown, tuple(mine)))
    return found


def split(found: list[Line]) -> list[list[Line]]:
    """The tables: workloads that others run, too, then those of udbad alone (its latencies), in fewer columns."""
    shared = {
        line.row.workload
        for line in found
        for name, cell in line.row.cells.items()
        if SYSTEMS[name].kind != "udbad" and (cell.samples or cell.reason)
    }
    parts = ([line for line in found if (line.row.workload in shared) is wanted] for wanted in (True, False))
    return [part for part in parts if part]


def figure_text(line: Line, column: str) -> str:
    """Median and spread of one system, "-" where the figure makes no sense for it."""
    name = line.columns.get(column)
    cell = line.row.cells.get(name or "")
    if name is None or cell is None:
        return "-"
    if cell.median is None:
        return "n/a" if cell.reason else "-"
    text = number(cell.median) + (f" ±{cell.spread * 100:.0f}%" if len(cell.samples) > 1 else "")
    best = line.row.best_peer()
    if SYSTEMS[name].kind == "udbad":
        ratio = line.row.ratio(name, best)
        return text if ratio is None else f"{text} ({number(ratio)})"
    return f"**{text}**" if SYSTEMS[name].kind == "peer" and cell.median == best and line.row.figure.compare else text


def best_text(line: Line) -> str:
    """Median and name of the best FUSE peer."""
    best = line.row.best_peer()
    names = [name for name, cell in line.row.cells.items() if cell.median == best and SYSTEMS[name].kind == "peer"]
    return "-" if best is None else f"{number(best)} ({names[0]})"


def goal_text(line: Line) -> str:
    return "; ".join(dict.fromkeys(check.goal.text(line.row.figure.unit) for check in line.checks))


def met_text(line: Line) -> str:
    """What each system has reached, in the terms of the goal."""
    parts = []
    for check in line.checks:
        mode = SYSTEMS[check.system].column.removeprefix("udbad-")
        parts.append(f"{mode} {number(check.value)} {'met' if check.met else '**missed**'}")
    return ", ".join(parts)


def reasons(rows: list[Row]) -> list[str]:
    """Why figures are missing, one line for each system and reason."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        for name, cell in row.cells.items():
            if cell.reason:
                found.setdefault((name, cell.reason), {})[row.workload] = None
    return [f"{name}: {reason} ({', '.join(workloads)})" for (name, reason), workloads in found.items()]


def repetitions(rows: list[Row]) -> str:
    """How often each workload ran, and which systems it ran on less often."""
    taken: dict[str, Counter[str]] = {}
    for row in rows:
        for name, cell in row.cells.items():
            counts = taken.setdefault(row.workload, Counter())
            counts[name] = max(counts[name], len(cell.samples))
    parts = []
    for workload, counts in taken.items():
        most = max(counts.values(), default=0)
        fewer = [f"{name} {count}" for name, count in counts.items() if 0 < count < most]
        parts.append(f"{workload} {most}" + (f" ({', '.join(fewer)})" if fewer else ""))
    return ", ".join(parts)


def summary(checked: list[Check]) -> str:
    met = sum(check.met for check in checked)
    return f"{met} of {len(checked)} goals met" if checked else "no goals in this run"


def terminal(rows: list[Row], console: Console) -> None:
    """The table and the reasons of what is missing."""
    for part in split(lines(rows)):
        columns = used([line.row for line in part])
        table = Table(title=CAPTION)
        for i, head in enumerate(("figure", *columns, "goal", "met?")):
            table.add_column(head, justify="right" if 0 < i <= len(columns) else "left")
        for line in part:
            texts = (*(figure_text(line, column) for column in columns), goal_text(line), met_text(line))
            table.add_row(escape(line.label), *(escape(text.replace("**", "")) for text in texts))
        console.print(table)
    console.print(summary(checks(rows)))
    for text in reasons(rows):
        console.print(f"n/a: {text}", markup=False)
    console.print(f"repetitions: {repetitions(rows)}", markup=False)


def _table(heads: list[str], body: Iterable[list[str]]) -> list[str]:
    """A Markdown table; the first column and the two of the goal are text."""
    bars = "|".join("---" if head in ("figure", "goal", "met?") else "---:" for head in heads)
    return ["| " + " | ".join(heads) + " |", f"|{bars}|", *("| " + " | ".join(cells) + " |" for cells in body)]


def markdown(rows: list[Row], machine: dict[str, str], plot: str) -> str:
    """Everything as Markdown; plot: file name of the picture beside it."""
    text = [f"{CAPTION}.", "", f"![Ratios to native]({plot})"]
    for part in split(lines(rows)):
        columns = used([line.row for line in part])
        goals = any(line.checks for line in part)
        heads = ["figure", *columns, *(["goal", "met?"] if goals else [])]
        body = (
            [
                line.label,
                *(figure_text(line, column) for column in columns),
                *([goal_text(line), met_text(line)] if goals else []),
            ]
            for line in part
        )
        text += ["", *_table(heads, body)]
    text += ["", f"{summary(checks(rows))}."]
    missing = reasons(rows)
    if missing:
        text += ["", "Not available:", "", *(f"- {line}" for line in missing)]
    text += ["", f"Repetitions: {repetitions(rows)}."]
    text += ["", "Measured on: " + "; ".join(f"{key} {value}" for key, value in machine.items()) + "."]
    return "\n".join(text) + "\n"


def short(rows: list[Row], machine: dict[str, str]) -> str:
    """The lines that have a goal as Markdown, the FUSE peers in one column."""
    heads = ["figure", "native", "overlayfs", BEST_PEER, "udbad-none", "udbad-notify", "goal", "met?"]
    body = []
    for line in lines(rows):
        if line.checks:
            cells = [best_text(line) if head == BEST_PEER else figure_text(line, head) for head in heads[1:-2]]
            body.append([line.label, *cells, goal_text(line), met_text(line)])
    of = "; ".join(
        f"{key} {machine[key]}" for key in ("udbad", "kernel", "cpus", "cpu", "guest_halt_poll_ns") if key in machine
    )
    return "\n".join([*_table(heads, body), "", f"{summary(checks(rows))}. Measured on: {of}."]) + "\n"


def replaced(page: str, table: str) -> str:
    """A page with what is between its two marks replaced. Raises ValueError when it has not both."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} and {END}")
    return f"{before}{begin}\n{table}{end}{after}"


def as_json(rows: list[Row], machine: dict[str, str], settings: dict[str, object]) -> str:
    """Everything: settings, machine, raw samples, medians, ratios, goals."""
    figures = []
    for row in rows:
        systems: dict[str, object] = {}
        for name, cell in row.cells.items():
            if cell.median is None:
                systems[name] = {"not_available": cell.reason or "not applicable"}
                continue
            systems[name] = {
                "samples": cell.samples,
                "median": cell.median,
                "low": min(cell.samples),
                "high": max(cell.samples),
                "to_native": row.ratio(name, row.median("native")),
                "to_best_peer": row.ratio(name, row.best_peer()),
                "failed_later": cell.reason or None,
            }
        figures.append(
            {"workload": row.workload, "figure": row.figure.key, "unit": row.figure.unit, "systems": systems}
        )
    units = {row.figure.key: row.figure.unit for row in rows}
    goals = [
        {
            "figure": check.goal.figure,
            "system": check.system,
            "goal": check.goal.text(units[check.goal.figure]),
            "limit": check.goal.limit,
            "measured": check.value,
            "met": check.met,
            "to_best_peer": check.to_peer,
        }
        for check in checks(rows)
    ]
    document = {"settings": settings, "machine": machine, "figures": figures, "goals": goals}
    return json.dumps(document, indent=1) + "\n"


def write(out: Path, rows: list[Row], machine: dict[str, str], settings: dict[str, object], svg: str) -> None:
    """Write bench.json, bench.md and bench.svg into a directory."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(as_json(rows, machine, settings))
    (out / "bench.md").write_text(markdown(rows, machine, "bench.svg"))
    (out / "bench.svg").write_text(svg)


def publish(repository: Path, rows: list[Row], machine: dict[str, str], svg: str) -> None:
    """Put a run into the documentation: the whole table and the picture, and the short table into its page."""
    results = repository / "tests/bench/results"
    results.mkdir(exist_ok=True)
    (results / "bench.md").write_text(markdown(rows, machine, "bench.svg"))
    (results / "bench.svg").write_text(svg)
    page = repository / "docs/performance.md"
    page.write_text(replaced(page.read_text(), short(rows, machine)))
