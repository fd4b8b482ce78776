"""What the shells offer at TAB beyond click's own words: mounts, and branches of a mount.

Only the files of the run directory are read: no process is asked and no mount point touched, they may hang. Whoever
may not read them is offered nothing.
"""

from __future__ import annotations

import logging
import os

import click
from click.shell_completion import CompletionItem

from udbad.branch import capabilities
from udbad.branch.spec import parse_branches, split_escaped
from udbad.control.registry import Entry, entries
from udbad.errors import UserError


def _entries(context: click.Context) -> list[Entry]:
    logging.disable()  # what is passed over is no news at TAB
    # A command without the option --run-dir has the variable all the same.
    return entries(context.params.get("run_dir") or os.environ.get("UDBAD_RUN_DIR") or capabilities.run_dir())


def _matching(words: list[str], incomplete: str) -> list[CompletionItem]:
    """Those that begin so; one with a line break would be two for the shell."""
    return [CompletionItem(word) for word in words if word.startswith(incomplete) and word.isprintable()]


def mounts(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names first, then mount points."""
    found = _entries(context)
    return _matching(
        [*(entry.name for entry in found if entry.name), *(entry.mount_point for entry in found)], incomplete
    )


def mount_points(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _matching([entry.mount_point for entry in _entries(context)], incomplete)


def branches(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The paths of the branches of the argument `mount`, top first."""
    where = context.params.get("mount")
    entry = next((one for one in _entries(context) if where in (one.name, one.mount_point)), None)
    lists = [word[3:] for word in split_escaped(entry.options if entry else "", ",") if word.startswith("br=")]
    try:
        return _matching([os.fsdecode(spec.path) for one in lists for spec in parse_branches(one)], incomplete)
    except UserError:  # written by another version
        return []


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shell's own."""
    return [CompletionItem(incomplete, type="file")]
