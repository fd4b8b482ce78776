"""top: what every mount is doing, live."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from udbad.commands.common import run_dir_option
from udbad.control import client, registry
from udbad.control.protocol import NOT_ANSWERING
from udbad.errors import UserError

if TYPE_CHECKING:
    from rich.console import Group

_ASK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened between two looks at one mount. latency: seconds; depth: branches examined a lookup."""

    operations: float
    latency: float
    depth: float
    events: float
    invalidations: float


def rates(before: Mapping[str, Any], now: Mapping[str, Any], seconds: float) -> Rates:
    """From two answers to "stats"; a process that was started anew in between has begun at zero."""
    if sum(now["requests"].values()) < sum(before["requests"].values()):
        before = {}

    def grown(*keys: str) -> float:
        return max(_total(now, *keys) - _total(before, *keys), 0.0)

    count = grown("requests")
    depths = _depths(before, now)
    lookups = sum(depths)
    return Rates(
        operations=count / seconds,
        latency=grown("seconds") / count if count else 0.0,
        depth=sum(depth * times for depth, times in enumerate(depths)) / lookups if lookups else 0.0,
        events=grown("coherence", "events") / seconds,
        invalidations=grown("invalidator", "sent") / seconds,
    )


def _total(answer: Mapping[str, Any], *keys: str) -> float:
    value: Any = answer
    for key in keys:
        value = value.get(key, {}) if isinstance(value, Mapping) else 0
    if isinstance(value, Mapping):
        return float(sum(value.values()))
    return float(value or 0)


def _depths(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[float]:
    """Lookups by the number of branches examined, all outcomes together."""
    result: list[float] = []
    for outcome, counts in now["depths"].items():
        old = before.get("depths", {}).get(outcome, [0] * len(counts))
        result += [0.0] * (len(counts) - len(result))
        for depth, (count, earlier) in enumerate(zip(counts, old, strict=True)):
            result[depth] += count - earlier
    return result


def render(labels: Mapping[str, str], stats: Mapping[str, Any], shown: Mapping[str, Rates], bars: bool = True) -> Group:
    """labels: key to what a mount is called; stats: its last answer, None when it gave none. bars: for a terminal."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("MOUNT", overflow="fold")
    for column in ("OPS/S", "LATENCY", "DEPTH", "EVENTS/S", "INVAL/S", "NODES", "OPEN", "STATE"):
        table.add_column(column, justify="right")
    copies = []
    for key, label in labels.items():
        answer = stats.get(key)
        if answer is None:
            table.add_row(label, *["-"] * 7, Text(NOT_ANSWERING, style="red"))
            continue
        rate = shown.get(key, Rates(0, 0, 0, 0, 0))
        table.add_row(
            label, f"{rate.operations:.0f}", f"{rate.latency * 1e6:.0f} us", f"{rate.depth:.2f}", f"{rate.events:.0f}",
            f"{rate.invalidations:.0f}", str(answer["table"]["nodes"]), str(answer["open_handles"]),
            answer["coherence"]["state"],
        )  # fmt: skip
        for copy in answer["copyups"]:
            line = Table.grid(padding=(0, 1))
            percent = 100 * copy["done"] // copy["size"] if copy["size"] else 100
            bar = [ProgressBar(copy["size"] or 1, copy["done"], 30)] if bars else []
            line.add_row(Text(f"copy-up {label}{copy['path']}"), *bar, f"{percent} %")
            copies.append(line)
    return Group(table, *copies)


@click.command()
@run_dir_option
@click.option("-d", "--delay", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds.")
@click.option("-n", "--count", type=click.IntRange(min=1), help="Look so many times, then end.")
def top(run_dir: str, delay: float, count: int | None) -> None:
    """Operations, latency, lookup depth, copy-ups and invalidations of every mount, live. Ctrl-C ends it.

    Into a pipe or a file goes one table after the other.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(width=None if os.isatty(1) else 200)
    before: dict[str, tuple[float, Any]] = {}
    looked = 0
    try:
        with ExitStack() as stack:
            live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
            while True:
                entries = registry.entries(run_dir)
                labels = {entry.id: entry.label for entry in entries}
                stats: dict[str, Any] = {}
                shown = {}
                for entry in entries:
                    try:
                        answer = client.ask_mount(entry, {"op": "stats"}, timeout=_ASK_SECONDS)
                    except UserError:
                        continue
                    now = time.monotonic()
                    stats[entry.id] = answer
                    if entry.id in before:
                        shown[entry.id] = rates(before[entry.id][1], answer, now - before[entry.id][0])
                    before[entry.id] = now, answer
                if live is None:
                    console.print(render(labels, stats, shown, bars=False))
                else:
                    live.update(render(labels, stats, shown), refresh=True)
                looked += 1
                if count is not None and looked >= count:
                    return
                time.sleep(delay)
    except KeyboardInterrupt:
        return
