"""watch and subscribe: one host tells another what changes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from udbad import logs
from udbad.commands.common import run_dir_option, user_errors
from udbad.commands.completion import mounts
from udbad.commands.daemon import config_option
from udbad.errors import ExitCode, UserError

if TYPE_CHECKING:
    from udbad.settings.file import HostsSettings

_pairs = click.argument("pairs", metavar="NAME=DIR...", nargs=-1, required=True)


@click.command()
@config_option
@click.option(
    "--watch", "by", type=click.Choice(["auto", "inotify", "fanotify"]), default="auto", help="As the mount option."
)
@_pairs
def watch(config: Path, by: str, pairs: tuple[str, ...]) -> None:
    """Tell other hosts what changes in each DIR, which they call NAME, for as long as this runs.

    For the machine where the files are; no mount is needed there. Where the message bus is, [hosts] of the
    configuration says.
    """
    with user_errors():
        import asyncio  # not for a help text or a completion

        from udbad.hosts.bus import BusSettings
        from udbad.hosts.serving import watch as serve
        from udbad.settings.file import load

        table = load(config).hosts
        logs.set_up("info", "plain")
        directories = _named(pairs)
        asyncio.run(
            serve(
                BusSettings.of(table), table.name, directories, by,
                lambda count: click.echo(f"watching {count} directories"),
            )
        )  # fmt: skip


@click.command()
@config_option
@run_dir_option
@click.option("--publish", is_flag=True, help="Tell other hosts what is changed through MOUNT, too.")
@click.argument("mount", shell_complete=mounts)
@_pairs
def subscribe(config: Path, run_dir: str, publish: bool, mount: str, pairs: tuple[str, ...]) -> None:
    """Have MOUNT hear what other hosts change on each branch DIR, which they call NAME, for as long as this runs.

    MOUNT: its name, or a path in it; the branches count as `notify` while they are heard of. Where the message bus is,
    [hosts] of the configuration says.
    """
    with user_errors():
        from udbad.settings.file import load

        table = load(config).hosts
        logs.set_up("info", "plain")
        _listen(table, run_dir, mount, _named(pairs), publish, lambda: click.echo(f"listening for {mount}"))


@click.command(hidden=True)
def subscriber() -> None:
    """As `subscribe`, for the daemon (supervisor/subscriptions.py), until standard input ends."""
    import json  # not for a completion

    from udbad.settings.file import HostsSettings

    with user_errors():
        job = json.loads(sys.stdin.buffer.readline())
        logs.set_up(job["log_level"], job["log_format"], job["mount"])
        table = HostsSettings.model_validate(job["hosts"])
        branches, publish = job["published"], job["publish"]
        _listen(table, job["run_dir"], job["mount"], branches, publish, lambda: None, sys.stdin.fileno())


def _listen(
    table: HostsSettings, run_dir: str, mount: str, branches: Mapping[str, str], publish: bool,
    on_ready: Callable[[], None], lifeline: int = -1,
) -> None:  # fmt: skip
    """branches: paths, by what hosts call them. publish: tell what is changed through the mount, too.

    lifeline: of `serving.subscribe`. Raises UserError.
    """
    import asyncio  # as above

    from udbad.hosts import barrier
    from udbad.hosts.bus import BusSettings
    from udbad.hosts.link import MountLink
    from udbad.hosts.ownchanges import OwnChanges
    from udbad.hosts.serving import subscribe as serve
    from udbad.hosts.subscriber import Following, Subscriber

    settings, own = BusSettings.of(table), barrier.socket_path(run_dir, mount, branches)
    host = f"{table.name}/{mount}"
    subscribers = [
        Subscriber(
            settings,
            Following(name, path, table.bound, table.settle, table.publishers, host if publish else ""),
            MountLink(run_dir, mount, path, own=own),
        )
        for name, path in branches.items()
    ]
    changes = [OwnChanges(settings, host, MountLink(run_dir, mount, ""), branches)] if publish else []
    asyncio.run(serve(subscribers, barrier.listen(own), on_ready, lifeline, changes))


def _named(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=DIR. Raises UserError."""
    from udbad.settings.file import BRANCH_ID

    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path or re.fullmatch(BRANCH_ID, name) is None:
            raise UserError(f"{pair}: must be NAME=DIR; NAME: letters, digits, '_' and '-'", ExitCode.OPTION)
        if name in found:
            raise UserError(f"{name} is given twice", ExitCode.OPTION)
        found[name] = os.path.abspath(path)
    return found
