"""The command line: which commands there are. They are in udbad/commands/, one of whose modules is imported at a time.

To import all of them takes as long as the interpreter and click together, and none but --help shows more than one.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Final

import click

from udbad import __version__

COMMANDS: Final = {
    "branch": ("inspect", "List, add, remove and change the branches of a mount while it is mounted."),
    "busy": ("inspect", "Who uses BRANCH of MOUNT, which keeps it from being removed."),
    "check-config": ("daemon", "Say everything that is wrong with a configuration; exit code 0 when nothing is."),
    "diff": (
        "tools",
        "What the top branch of MOUNT (or of a path in it) changes, or BRANCH against the LOWER ones, top first.",
    ),
    "feed": ("feed", "Have MOUNT look at what standard input says has changed on its branches, a path a line."),
    "flush": (
        "inspect",
        "Return when every direct change made up to now is seen through MOUNT (its name, or a path in it).",
    ),
    "convert": (
        "tools",
        "Rewrite the whiteouts of a branch that is not in use: aufs to overlay or overlay to aufs.",
    ),
    "fsck": ("tools", "Check a branch that is not mounted for what crashes and hands leave behind, and repair it."),
    "guard": ("mounting", ""),
    "invalidate": ("inspect", "Forget what is cached about PATH and everything below it."),
    "layer": ("layers", "Make, fill and remove layers of a store ROOT."),
    "layers": ("layers", "The layers of the store ROOT: which lies on which, and how much is in each."),
    "log-level": (
        "daemon",
        "Change how much is logged, by MOUNT or by the daemon and all its mounts, until the next start.",
    ),
    "mount": ("mounting", "Mount a union on MOUNT_POINT."),
    "mount-server": ("mounting", ""),
    "mvdown": ("tools", "Move the file PATH of a union from the branch it is on to the next lower writable one."),
    "reload": ("daemon", "Have the daemon read its configuration again; says for each changed key what became of it."),
    "restart": (
        "daemon",
        "Have another process go on with MOUNT, of the version that is installed now, which nobody notices.",
    ),
    "run": ("daemon", "Run the daemon in the foreground: mount what the configuration says and keep it mounted."),
    "status": ("daemon", "Every mount: who serves it, since when, with which branches."),
    "stop": ("daemon", "Stop the daemon, and with it every mount unless they are kept."),
    "subscribe": (
        "hosts",
        "Have MOUNT hear what other hosts change on each branch DIR, which they call NAME, for as long as this runs.",
    ),
    "subscriber": ("hosts", ""),
    "sync": ("tools", "Merge a branch of MOUNT down into the branch below it, while the mount is used."),
    "top": ("top", "Operations, latency, lookup depth, copy-ups and invalidations of every mount, live."),
    "udba": ("inspect", "Change how MOUNT follows direct changes of its branches."),
    "umount": ("mounting", "Unmount a union, given by its mount point or its name in /proc/mounts."),
    "watch": ("hosts", "Tell other hosts what changes in each DIR, which they call NAME, for as long as this runs."),
    "where": ("inspect", "Which branch serves PATH, and every copy of it."),
    "why": ("inspect", "How PATH is resolved: name by name, what each branch has and what follows."),
}
"""By name: the module of udbad/commands/ and what `udbad --help` says of it, the beginning of its help; "" for one
that is not shown."""


class _Commands(MutableMapping[str, click.Command]):
    """The commands by their names, imported when they are asked for."""

    def __init__(self) -> None:
        self._added: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._added:
            module = import_module(f"udbad.commands.{COMMANDS[name][0]}")
            self._added[name] = getattr(module, name.replace("-", "_"))
        return self._added[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._added[name] = command

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands stay")

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Group(click.Group):
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does, without the commands."""
        shown = {name: text for name, (_, text) in sorted(COMMANDS.items()) if text}
        room = formatter.width - 6 - max(map(len, shown))
        rows = [(name, click.Command(name, help=text).get_short_help_str(room)) for name, text in shown.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=_Group, commands=_Commands(), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="udbad")
def main() -> None:
    """Unite directories into one mounted tree that stays right while people change the branches."""


if __name__ == "__main__":
    main()
