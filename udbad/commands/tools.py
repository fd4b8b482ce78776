"""The tools people know from aufs-util: what a branch changes, and moving files and whole branches down."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from udbad.branch.branches import BranchSpec
from udbad.branch.spec import parse_branch
from udbad.commands.common import for_terminal, print_wide, run_dir_option, user_errors
from udbad.commands.completion import branches, files, mounts
from udbad.commands.inspect import json_option
from udbad.control import client
from udbad.errors import ExitCode, UserError
from udbad.types import Perm

if TYPE_CHECKING:
    from udbad.tools.branchdiff import Change

_REFRESH = 0.2  # seconds
_HOURS = 86400.0  # seconds: one big file to a slow disk
_STYLES = {"added": "green", "changed": "yellow", "metadata": "cyan", "type": "magenta", "deleted": "red"}


@click.command()
@run_dir_option
@json_option
@click.option("--all", "show_all", is_flag=True, help="Also copies that differ in nothing from what they cover.")
@click.argument("branch", metavar="MOUNT|BRANCH", shell_complete=mounts)
@click.argument("lowers", metavar="[LOWER[=PERM[+ATTR]]...]", nargs=-1)
def diff(run_dir: str, as_json: bool, show_all: bool, branch: str, lowers: tuple[str, ...]) -> None:
    """What the top branch of MOUNT (or of a path in it) changes, or BRANCH against the LOWER ones, top first.

    Whiteouts in LOWER count, unless it is given as LOWER=ro. Files are compared by content.
    """
    with user_errors():
        found = _changes(run_dir, branch, lowers, show_all)
    print_changes(found, as_json)


def print_changes(found: list[dict[str, str]], as_json: bool) -> None:
    """Of `change_rows`."""
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("CHANGE", "TYPE", "PATH", "WHAT"):
        table.add_column(column, overflow="fold")
    for one in found:
        path = for_terminal(one["path"])
        table.add_row(Text(one["change"], _STYLES.get(one["change"], "")), one["type"], Text(path), one["detail"])
    if found:
        print_wide(table)
    counts = {kind: sum(one["change"] == kind for one in found) for kind in _STYLES}
    click.echo(", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "no changes")


@click.command()
@run_dir_option
@click.option("--overwrite-lower", is_flag=True, help="Replace a copy that the lower branch has.")
@click.option("--keep-upper", is_flag=True, help="Copy only.")
@click.option("--read-only-upper", is_flag=True, help="Take it away from a branch that is not writable, too.")
@click.option("--read-only-lower", is_flag=True, help="Move to the next branch below, writable or not.")
@click.option("--from", "source", default="", metavar="BRANCH", help="Where the copy must be; default: anywhere.")
@click.argument("path", shell_complete=files)
def mvdown(run_dir: str, path: str, **words: Any) -> None:
    """Move the file PATH of a union from the branch it is on to the next lower writable one.

    For regular files with one name that nobody has open. Exit code 12, and one line that says why, when it may not.
    """
    with user_errors():
        if words["source"]:
            words["source"] = os.path.abspath(words["source"])
        entry, inside = client.locate(run_dir, path)
        answer = client.ask_mount(entry, {"op": "mvdown", "path": inside, **words}, _HOURS)
    verb = "copied" if answer["kept"] else "moved"
    click.echo(f"{verb} from {for_terminal(answer['from'])} to {for_terminal(answer['to'])}, {answer['size']} bytes")


@click.group()
def sync() -> None:
    """Merge a branch of MOUNT down into the branch below it, while the mount is used."""


@sync.command("copy")
@run_dir_option
@click.argument("mount", shell_complete=mounts)
@click.argument("source", shell_complete=branches)
@click.argument("target", shell_complete=branches)
def sync_copy(run_dir: str, mount: str, source: str, target: str) -> None:
    """Make TARGET hold what the two branches show together; SOURCE stays as it is."""
    with user_errors():
        _sync(run_dir, mount, "copy", source, target)


@sync.command("move")
@run_dir_option
@click.argument("mount", shell_complete=mounts)
@click.argument("source", shell_complete=branches)
@click.argument("target", shell_complete=branches)
def sync_move(run_dir: str, mount: str, source: str, target: str) -> None:
    """As copy, and take away from SOURCE what was merged. Exit code 12 when something had to stay."""
    with user_errors():
        _sync(run_dir, mount, "move", source, target)


def _sync(run_dir: str, mount: str, mode: str, source: str, target: str) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    entry, _ = client.locate(run_dir, mount)
    words = {"mode": mode, "source": os.path.abspath(source), "target": os.path.abspath(target)}
    client.ask_mount(entry, {"op": "sync", **words})
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    # Nothing is drawn where nobody sees it.
    with Progress(*columns, console=Console(stderr=True), disable=not os.isatty(2), transient=True) as bar:
        task = bar.add_task("counting", total=None)
        while True:
            try:
                answer = client.ask_mount(entry, {"op": "sync-status"})
                if not answer["running"]:
                    break
                total = max(answer["size"], answer["synced_size"], 1)
                text = f"{answer['synced']} of {max(answer['names'], answer['synced'])} names"
                text += f", {answer['moved']} moved" if answer["move"] else ""
                bar.update(task, description=text, total=total, completed=answer["synced_size"])
                time.sleep(_REFRESH)
            except KeyboardInterrupt:
                client.ask_mount(entry, {"op": "sync-stop"})
    _report(answer)


def _report(answer: Mapping[str, Any]) -> None:
    if answer["error_text"]:
        raise UserError(f"sync: {answer['error_text']}", ExitCode(answer["error_code"]))
    for path, reason in answer["left"].items():
        click.echo(f"stays: {for_terminal(path)}: {reason}")
    more = answer["left_count"] - len(answer["left"])
    if more > 0:
        click.echo(f"stays: {more} more")
    target = for_terminal(answer["target"])
    if answer["move"]:
        click.echo(f"{answer['moved']} names moved into {target}")
    else:
        click.echo(f"{answer['synced']} names, {answer['synced_size']} bytes are in {target}")
    if answer["left_count"]:
        raise SystemExit(int(ExitCode.REFUSED))


def _changes(run_dir: str, branch: str, lowers: tuple[str, ...], show_all: bool) -> list[dict[str, str]]:
    from udbad.tools import branchdiff

    inside = b""
    if lowers:
        top = parse_branch(branch)
        rest = [spec if spec.perm else BranchSpec(spec.path, Perm.RO, frozenset({"wh"}))
                for spec in map(parse_branch, lowers)]  # fmt: skip
    else:
        try:
            entry, path = client.locate(run_dir, branch)
        except UserError as error:
            raise UserError(f"{error.message}; to compare a branch, name the lower ones too", error.code) from None
        inside = os.fsencode(path)
        specs = [parse_branch(text) for text in client.ask_mount(entry, {"op": "branches"})["specs"]]
        if len(specs) == 1:
            raise UserError(f"{entry.label} has one branch: there is nothing below it to compare with")
        top, *rest = specs
    try:
        with branchdiff.opened(top, rest) as (one, others):
            found = branchdiff.changes(one, others)
            return change_rows(
                (change for change in found if not inside or (change.path + b"/").startswith(inside + b"/")), show_all
            )
    except OSError as error:
        raise UserError(f"cannot compare: {error.strerror}", ExitCode.FAILURE) from None


def change_rows(found: Iterable[Change], show_all: bool) -> list[dict[str, str]]:
    """What became of each name, in words; show_all: names with nothing but a copy of what was there, too."""
    return [
        {"path": os.fsdecode(change.path), "change": change.kind.value, "type": change.type, "detail": change.detail}
        for change in found
        if show_all or change.kind.value != "identical"
    ]


@click.command()
@click.option("-y", "--yes", is_flag=True, help="Repair everything without asking.")
@click.option("-n", "--no", is_flag=True, help="Repair nothing, only report.")
@click.argument("branch", type=click.Path(path_type=Path))
@click.argument("lowers", metavar="[LOWER]...", type=click.Path(path_type=Path), nargs=-1)
def fsck(yes: bool, no: bool, branch: Path, lowers: tuple[Path, ...]) -> None:
    """Check a branch that is not mounted for what crashes and hands leave behind, and repair it.

    With all branches below it as LOWER, pseudo-links that no name leads to any more are leftovers, too.
    """
    from udbad.tools.fsck import Defect, run_fsck

    if yes and no:
        raise click.UsageError("-y and -n exclude each other")

    def ask(defect: Defect) -> bool:
        if yes or no:
            return yes
        return click.confirm(f"{defect.remedy}?", default=False)

    with user_errors():
        sys.exit(int(run_fsck(os.fsencode(branch), ask, click.echo, [*map(os.fsencode, lowers)])))


@click.command()
@click.argument("source", metavar="FROM", type=click.Choice(["aufs", "overlay"]))
@click.argument("target", metavar="TO", type=click.Choice(["aufs", "overlay"]))
@click.argument("branch", type=click.Path(path_type=Path))
def convert(source: str, target: str, branch: Path) -> None:
    """Rewrite the whiteouts of a branch that is not in use: aufs to overlay or overlay to aufs.

    Opaque marks, too. It shows the same tree afterwards. When it was interrupted, the same command goes on.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from udbad.tools.convert import convert as run

    if source == target:
        raise click.UsageError("FROM and TO are the same")
    columns = (TextColumn("directories"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    drawn = Progress(*columns, console=Console(stderr=True), disable=not os.isatty(2), transient=True)
    with user_errors(), drawn as bar:
        task = bar.add_task("", total=None)
        try:
            marks = run(
                os.fsencode(branch), source, target, lambda done, count: bar.update(task, completed=done, total=count)
            )
        except OSError as error:
            raise UserError(f"{for_terminal(str(branch))}: {error.strerror}", ExitCode.FAILURE) from None
    click.echo(f"{for_terminal(str(branch))}: {marks} marks rewritten")
