"""The command line: parsing and printing only. The commands are in udbad/commands/."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from udbad import __version__
from udbad.commands import daemon, inspect, layers, mounting, tools, top
from udbad.commands.common import user_errors


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="udbad")
def main() -> None:
    """Unite directories into one mounted tree that stays right while people change the branches."""


@main.command()
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


for _command in (
    *(mounting.mount, mounting.umount, mounting.mount_server),
    *(daemon.run, daemon.check_config, daemon.status, daemon.reload, daemon.restart, daemon.stop, daemon.log_level),
    *(inspect.where, inspect.why, inspect.invalidate, inspect.flush, inspect.udba, inspect.busy, inspect.branch),
    *(tools.diff, tools.mvdown, tools.sync),
    *(layers.layers, layers.layer),
    top.top,
):
    main.add_command(_command)


if __name__ == "__main__":
    main()
