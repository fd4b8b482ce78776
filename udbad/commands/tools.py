"""The tools people know from aufs-util: what a branch changes, and moving files and whole branches down."""

from __future__ import annotations

import json
import os

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from udbad.branch.branches import BranchSpec
from udbad.branch.spec import parse_branch
from udbad.commands.common import need_root, run_dir_option, user_errors
from udbad.commands.inspect import json_option
from udbad.daemon import client
from udbad.errors import ExitCode, UserError
from udbad.types import Perm
from udbad.union.fsck import printable

_STYLES = {"added": "green", "changed": "yellow", "metadata": "cyan", "type": "magenta", "deleted": "red"}


@click.command()
@run_dir_option
@json_option
@click.option("--all", "show_all", is_flag=True, help="Also copies that differ in nothing from what they cover.")
@click.argument("branch", metavar="MOUNT|BRANCH")
@click.argument("lowers", metavar="[LOWER[=PERM[+ATTR]]...]", nargs=-1)
def diff(run_dir: str, as_json: bool, show_all: bool, branch: str, lowers: tuple[str, ...]) -> None:
    """What the top branch of MOUNT (or of a path in it) changes, or BRANCH against the LOWER ones, top first.

    Whiteouts in LOWER count, unless it is given as LOWER=ro. Files are compared by content.
    """
    with user_errors():
        need_root()
        found = _changes(run_dir, branch, lowers, show_all)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("CHANGE", "TYPE", "PATH", "WHAT"):
        table.add_column(column, overflow="fold")
    for one in found:
        path = printable(os.fsencode(one["path"]))
        table.add_row(Text(one["change"], _STYLES.get(one["change"], "")), one["type"], Text(path), one["detail"])
    if found:
        # As wide as it is: a path that a terminal would cut is of no use in a pipe either.
        Console(width=None if os.isatty(1) else 4096).print(table)
    counts = {kind: sum(one["change"] == kind for one in found) for kind in _STYLES}
    click.echo(", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "no changes")


def _changes(run_dir: str, branch: str, lowers: tuple[str, ...], show_all: bool) -> list[dict[str, str]]:
    from udbad.union import branchdiff

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
            return [
                {"path": os.fsdecode(change.path), "change": change.kind.value, "type": change.type,
                 "detail": change.detail}
                for change in branchdiff.changes(one, others)
                if (show_all or change.kind is not branchdiff.ChangeKind.IDENTICAL)
                and (not inside or change.path == inside or change.path.startswith(inside + b"/"))
            ]  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot compare: {error.strerror}", ExitCode.FAILURE) from None
