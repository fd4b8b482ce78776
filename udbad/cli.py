"""The command line: parsing and printing only."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from udbad import __version__
from udbad.config import parse_mount_options
from udbad.errors import ExitCode, UserError


@contextmanager
def _user_errors() -> Iterator[None]:
    """Mistakes of the user are one line on stderr and an exit code, never a traceback."""
    try:
        yield
    except UserError as error:
        click.echo(f"udbad: {error.message}", err=True)
        sys.exit(int(error.code))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="udbad")
def main() -> None:
    """Unite directories into one mounted tree that stays right while people change the branches."""


@main.command()
@click.option("-o", "options", multiple=True, required=True, help="Mount options, comma separated: br=…,udba=….")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground and serve until unmounted.")
@click.option("-v", "--verbose", is_flag=True, help="Log every operation.")
@click.option("--ready-fd", type=int, default=-1, hidden=True)
@click.argument("source")
@click.argument("mount_point", type=click.Path(path_type=Path))
def mount(
    options: tuple[str, ...], foreground: bool, verbose: bool, ready_fd: int, source: str, mount_point: Path
) -> None:
    """Mount a union on MOUNT_POINT. SOURCE is shown in /proc/mounts and has no meaning otherwise."""
    with _user_errors():
        parsed = parse_mount_options(options)
        if parsed.fsname == "none" and source != "none":
            parsed = parsed.model_copy(update={"fsname": source})
        if os.geteuid() != 0:
            raise UserError("mounting needs root", ExitCode.NOT_ROOT)
        if not foreground:
            sys.exit(_in_background(options, verbose, source, mount_point))
        from udbad.daemon import mountproc  # the supervisor and the tools must not load pyfuse3

        level = logging.DEBUG if verbose else logging.INFO
        logging.basicConfig(level=level, format="udbad: %(levelname)s: %(message)s", stream=sys.stderr)
        mountproc.run(parsed, os.fsencode(mount_point.absolute()), ready_fd)


def _in_background(options: tuple[str, ...], verbose: bool, source: str, mount_point: Path) -> int:
    """Start the mount process in a session of its own; 0 when it serves, its exit code when it could not."""
    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-m", "udbad", "mount", "-f", "--ready-fd", str(write_fd)]
    command += ["-v"] if verbose else []
    for option in options:
        command += ["-o", option]
    process = subprocess.Popen(
        [*command, source, str(mount_point)],
        pass_fds=(write_fd,),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as ready:
        if ready.read(6) == b"READY\n":
            return 0
    return process.wait() or int(ExitCode.FAILURE)


@main.command()
@click.option("-l", "--lazy", is_flag=True, help="Detach now, finish when the last user is gone.")
@click.argument("mount_point", type=click.Path(path_type=Path))
def umount(lazy: bool, mount_point: Path) -> None:
    """Unmount a union."""
    from udbad.kernel.mounts import find_mount, unmount

    with _user_errors():
        path = find_mount(os.fsencode(mount_point.absolute()))
        try:
            unmount(path, lazy)
        except OSError as error:
            raise UserError(f"{mount_point}: {error.strerror}", ExitCode.FAILURE) from error


@main.command()
@click.option("-y", "--yes", is_flag=True, help="Repair everything without asking.")
@click.option("-n", "--no", is_flag=True, help="Repair nothing, only report.")
@click.argument("branch", type=click.Path(path_type=Path))
def fsck(yes: bool, no: bool, branch: Path) -> None:
    """Check a branch that is not mounted for what crashes and hands leave behind, and repair it."""
    from udbad.union.fsck import Defect, run_fsck

    if yes and no:
        raise click.UsageError("-y and -n exclude each other")

    def ask(defect: Defect) -> bool:
        if yes or no:
            return yes
        return click.confirm(f"{defect.remedy}?", default=False)

    with _user_errors():
        sys.exit(int(run_fsck(os.fsencode(branch), ask, click.echo)))


if __name__ == "__main__":
    main()
