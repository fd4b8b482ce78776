"""mount.udba: what mount(8) calls for `mount -t udba`, for fstab and for systemd's mount units.

mount(8), "EXTERNAL HELPERS": mount.udba SOURCE DIRECTORY [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]. The
kernel shows the mount as fuse.udba, so mount.fuse.udba is the same program for `mount -o remount`. A running
daemon looks after the mount; without one it gets a mount process of its own.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from udbad.branch import capabilities
from udbad.branch.spec import split_escaped
from udbad.commands.common import absolute_branch, layer_source
from udbad.commands.serving import Job, finish, serve_in_background
from udbad.control import client, registry
from udbad.errors import ExitCode, UserError
from udbad.settings.options import MountOptions, format_options, parse_mount_options

_OF_THE_KERNEL = frozenset({"user_id", "group_id", "rootmode", "fd", "max_read", "blksize"})
"""What FUSE shows in mountinfo, where mount(8) takes the options of a remount from."""

_EDIT = re.compile(r"((?:(?:add|ins)[=:][0-9]+:)|(?:append|prepend|del|mod)[=:])(.*)", re.DOTALL)
"""An option that edits the branch list: what stands before the branch, and the branch."""

# mount(8), "EXIT STATUS".
_USAGE = 1
_FAILED = 32


def main() -> None:
    """Entry point of mount.udba."""
    command.main(prog_name="mount.udba")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "options", multiple=True)
@click.option("-f", "fake", is_flag=True, help="Check the options, do not mount.")
@click.option("-v", "verbose", is_flag=True)
@click.option("-n", is_flag=True, expose_value=False, help="For mount(8).")
@click.option("-s", is_flag=True, expose_value=False, help="For mount(8).")
@click.option("-N", "namespace", hidden=True)
@click.option("-t", "kind", hidden=True)
@click.argument("source")
@click.argument("directory", type=click.Path(path_type=Path))
def command(
    options: Sequence[str],
    fake: bool,
    verbose: bool,
    namespace: str | None,
    kind: str | None,
    source: str,
    directory: Path,
) -> None:
    """Mount a union on DIRECTORY, or change one with -o remount; mount(8) calls this."""
    run_dir = os.environ.get("UDBAD_RUN_DIR") or capabilities.run_dir()
    words = [word for text in options for word in split_escaped(text, ",")]
    words = [word for word in words if word and word.partition("=")[0] not in _OF_THE_KERNEL]
    try:
        if namespace is not None:
            raise UserError("-N is not possible: the mount process is in the mount namespace of its caller",
                            ExitCode.OPTION)  # fmt: skip
        if "remount" in words:
            _remount(run_dir, directory, _changes(words), fake)
        else:
            _mount(run_dir, source, directory, words, fake, verbose)
    except UserError as error:
        click.echo(f"mount.udba: {error.message}", err=True)
        sys.exit(_USAGE if error.code is ExitCode.OPTION else _FAILED)


def _mount(run_dir: str, source: str, directory: Path, words: list[str], fake: bool, verbose: bool) -> None:
    source, named = layer_source(source)
    parsed = parse_mount_options(",".join([*words, *named]))
    if parsed.fsname == "none" and source != "none":
        parsed = parsed.but(fsname=source)
    # The daemon is in another directory than whoever calls us.
    branches = tuple(spec._replace(path=os.path.abspath(spec.path)) for spec in parsed.branches)
    control = parsed.control and os.path.abspath(parsed.control)
    parsed = parsed.but(branches=branches, control=control)
    if fake:
        return
    mount_point = os.fsdecode(registry.real_mount_point(os.fsencode(directory)))
    if _serves_already(run_dir, mount_point, parsed):
        click.echo(f"mount.udba: {mount_point} is mounted so already", err=True)
        return
    request = {"op": "mount", "mount_point": mount_point, "options": format_options(parsed)}
    try:
        client.ask_supervisor(run_dir, request, timeout=600.0)
    except UserError as error:
        if error.code is not ExitCode.NO_DAEMON:
            raise
        told = parsed.but(notices=())
        job = Job(told, mount_point, run_dir, verbose, "plain", background=True)
        job.set_up_log()
        code = serve_in_background(job)
        finish(0 if not code else _USAGE if code == ExitCode.OPTION else _FAILED)


def _serves_already(run_dir: str, mount_point: str, wanted: MountOptions) -> bool:
    """Whether that is mounted, for a second `mount`; `mount -a` does not ask again when it finds the source."""
    entry = registry.read(registry.directory(run_dir, os.fsencode(mount_point)))
    if entry is None:
        return False
    try:
        client.ask_mount(entry, {"op": "ping"}, timeout=10.0)
    except UserError:
        return False  # dead; the mount process takes it away
    if parse_mount_options(entry.configured).but(notices=()) == wanted.but(notices=()):
        return True
    raise UserError(f"{mount_point} is mounted already, with other options (-o remount changes them)",
                    ExitCode.MOUNT_POINT)  # fmt: skip


def _changes(words: list[str]) -> list[str]:
    """The words of a remount, without what the kernel alone says: relatime, where nothing else was asked for before."""
    return [
        word
        for index, word in enumerate(words)
        if word != "remount" and (word != "relatime" or {"noatime", "strictatime"} & set(words[:index]))
    ]


def _remount(run_dir: str, directory: Path, words: list[str], fake: bool) -> None:
    mount_point = registry.real_mount_point(os.fsencode(directory))
    entry = registry.read(registry.directory(run_dir, mount_point))
    if entry is None:
        raise UserError(f"no union that {run_dir} knows is mounted on {directory}", ExitCode.NOT_MOUNTED)
    if not fake:
        client.ask_mount(entry, {"op": "remount", "options": ",".join(map(_absolute_edit, words))})


def _absolute_edit(word: str) -> str:
    """An option with the path of its branch, if it edits the list, as whoever calls us means it."""
    match = _EDIT.fullmatch(word)
    return word if match is None else match[1] + absolute_branch(match[2])


if __name__ == "__main__":
    main()
