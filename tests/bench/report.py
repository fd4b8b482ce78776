"""What comes out: a table in the terminal, JSON with the raw samples, Markdown for the README.

May not measure anything. Every figure is shown with its spread and as a ratio to native and to the best FUSE peer.
"""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.goals import goals
from tests.bench.measure import Row
from tests.bench.systems import SYSTEMS

CAPTION = "Median ± half of the spread; ratio to native (n) and to the best FUSE peer (p); less is better"


def sections(rows: list[Row]) -> list[tuple[list[str], list[Row]]]:
    """(systems, rows) of each table: the comparison, then what only udbad has (its latencies), in fewer columns."""
    alone: list[Row] = []
    compared: list[Row] = []
    for row in rows:
        others = (cell for name, cell in row.cells.items() if SYSTEMS[name].kind != "udbad")
        (compared if any(cell.samples or cell.reason for cell in others) else alone).append(row)
    found = []
    for part in filter(None, (compared, alone)):
        names = part[0].cells
        used = [name for name in names if any(row.cells[name].samples or row.cells[name].reason for row in part)]
        found.append((used, part))
    return found


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def figure_text(row: Row, name: str) -> str:
    """Median and spread of one system, "-" where the figure makes no sense for it."""
    cell = row.cells[name]
    if cell.median is None:
        return "n/a" if cell.reason else "-"
    return f"{number(cell.median)} ±{cell.spread * 100:.0f}%"


def ratio_text(row: Row, name: str) -> str:
    """Ratios to native (n) and to the best FUSE peer (p)."""
    bases = (("n", row.median("native")), ("p", row.best_peer()))
    ratios = ((mark, row.ratio(name, base)) for mark, base in bases)
    return " ".join(f"{number(ratio)}{mark}" for mark, ratio in ratios if ratio is not None)


def reasons(rows: list[Row]) -> list[str]:
    """Why figures are missing, one line for each system and reason."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        for name, cell in row.cells.items():
            if cell.reason:
                found.setdefault((name, cell.reason), {})[row.workload] = None
    return [f"{name}: {reason} ({', '.join(workloads)})" for (name, reason), workloads in found.items()]


def goal_lines(rows: list[Row]) -> list[tuple[str, float, float | None]]:
    """(goal, limit, measured) for each goal this run says something about."""
    by_key = {row.figure.key: row for row in rows}
    lines = ((goal.text, goal.limit, goal.value(by_key)) for goal in goals(by_key))
    return [line for line in lines if line[2] is not None]


def terminal(rows: list[Row], console: Console) -> None:
    """The table, the goals, and the reasons of what is missing."""
    for names, part in sections(rows):
        table = Table(title=CAPTION)
        table.add_column("figure")
        for name in names:
            table.add_column(name, justify="right")
        for row in part:
            cells = (f"{figure_text(row, name)}\n[dim]{ratio_text(row, name)}[/dim]" for name in names)
            table.add_row(f"{row.figure.key} [{row.figure.unit}]".replace("[", "\\["), *cells)
        console.print(table)
    checks = Table(title="goals")
    for head in ("goal", "limit", "measured", ""):
        checks.add_column(head)
    for text, limit, value in goal_lines(rows):
        assert value is not None
        checks.add_row(text, number(limit), number(value), "met" if value <= limit else "[bold]missed[/bold]")
    if checks.row_count:
        console.print(checks)
    for line in reasons(rows):
        console.print(f"n/a: {line}", markup=False)


def markdown(rows: list[Row], machine: dict[str, str], plot: str) -> str:
    """The table as Markdown; plot: file name of the picture beside it."""
    lines = [f"{CAPTION}.", "", f"![Ratios to native]({plot})"]
    for names, part in sections(rows):
        lines += ["", "| figure | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
        for row in part:
            cells = []
            for name in names:
                ratios = ratio_text(row, name)
                cells.append(figure_text(row, name) + (f" ({ratios})" if ratios else ""))
            lines.append(f"| {row.figure.key} [{row.figure.unit}] | " + " | ".join(cells) + " |")
    checked = goal_lines(rows)
    if checked:
        lines += ["", "| goal | limit | measured | |", "|---|---:|---:|---|"]
        for text, limit, value in checked:
            assert value is not None
            met = "met" if value <= limit else "**missed**"
            lines.append(f"| {text} | {number(limit)} | {number(value)} | {met} |")
    missing = reasons(rows)
    if missing:
        lines += ["", "Not available:", "", *(f"- {line}" for line in missing)]
    lines += ["", "Measured on: " + "; ".join(f"{key} {value}" for key, value in machine.items()) + "."]
    return "\n".join(lines) + "\n"


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
    goals_met = [
        {"goal": text, "limit": limit, "measured": value, "met": value is not None and value <= limit}
        for text, limit, value in goal_lines(rows)
    ]
    document = {"settings": settings, "machine": machine, "figures": figures, "goals": goals_met}
    return json.dumps(document, indent=1) + "\n"


def write(out: Path, rows: list[Row], machine: dict[str, str], settings: dict[str, object], svg: str) -> None:
    """Write bench.json, bench.md and bench.svg into a directory."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(as_json(rows, machine, settings))
    (out / "bench.md").write_text(markdown(rows, machine, "bench.svg"))
    (out / "bench.svg").write_text(svg)
