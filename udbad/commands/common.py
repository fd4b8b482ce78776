"""What several commands need: errors as one line, and whom to ask."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from udbad.branch import capabilities
from udbad.branch.spec import escape, split_escaped, unescape
from udbad.commands.serving import for_terminal, user_errors
from udbad.control import client
from udbad.control.protocol import Message
from udbad.layers.source import SCHEME, absolute, parse

if TYPE_CHECKING:
    from rich.console import RenderableType


__all__ = [
    "absolute_branch",
    "ask_mount",
    "for_terminal",
    "layer_source",
    "place_in_store",
    "print_wide",
    "run_dir_option",
    "user_errors",
]


def print_wide(drawn: RenderableType) -> None:
    """As wide as it is into a pipe or a file: a path that a terminal would cut is of no use there."""
    from rich.console import Console  # not for commands that print none

    Console(width=None if os.isatty(1) else 4096).print(drawn)


run_dir_option = click.option(
    "--run-dir",
    default=capabilities.run_dir,
    envvar="UDBAD_RUN_DIR",
    show_default=capabilities.SYSTEM_RUN_DIR,
    help="Where the daemon and the mount processes have their sockets.",
)


def ask_mount(run_dir: str, where: str, request: Message) -> Message:
    """Ask the mount that a path is in, or that has this name. Raises UserError, also for a refusal."""
    entry, _ = client.locate(run_dir, where)
    return client.ask_mount(entry, request)


def absolute_branch(branch: str) -> str:
    """PATH[=PERM...] for a mount process, which is in another directory than its caller; escapes stay right.

    An empty path stays as it is, for the mount process to refuse.
    """
    path = split_escaped(branch, "=")[0]
    return escape(os.path.abspath(unescape(path))) + branch[len(path) :] if path else branch


def layer_source(source: str) -> tuple[str, list[str]]:
    """SOURCE of a mount as its caller means it, and the mount option that it stands for where it is a layer."""
    if not source.startswith(SCHEME):
        return source, []
    source = absolute(source)
    return source, ["source=" + escape(source, "\\,")]


def place_in_store(source: str) -> str:
    """Where a store has the mount of one of its layers; source: as an option of the mount has it."""
    named = parse(source)
    assert named is not None
    return named.mount_point()
