"""mount, umount, and what only programs call."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress

import click

from udbad import logs
from udbad.commands.common import layer_source, place_in_store, run_dir_option
from udbad.commands.completion import mount_points
from udbad.commands.serving import READY, Job, finish, serve, serve_in_background, user_errors
from udbad.errors import ExitCode, UserError


@click.command()
@click.option("-o", "options", multiple=True, help="Mount options, comma separated: br=…,udba=….")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground and serve until unmounted.")
@click.option("-v", "--verbose", is_flag=True, help="Log what helps to find a fault, too.")
@click.option(
    "--log-format", type=click.Choice(["plain", "json"]), default="plain", show_default=True,
    help="Lines for people, or JSON.",
)  # fmt: skip
@click.option("--ready-fd", type=int, default=-1, hidden=True)
@run_dir_option
@click.argument("source")
@click.argument("mount_point", type=click.Path(), required=False)
def mount(
    options: tuple[str, ...],
    foreground: bool,
    verbose: bool,
    log_format: str,
    ready_fd: int,
    run_dir: str,
    source: str,
    mount_point: str | None,
) -> None:
    """Mount a union on MOUNT_POINT. SOURCE is shown in /proc/mounts.

    SOURCE docker-aufs:ROOT#ID is a layer of a store, which is mounted with those below it; MOUNT_POINT is its place in
    the store where it is not given. Any other SOURCE is a name only.
    """
    from udbad.settings.options import parse_mount_options

    with user_errors():
        source, named = layer_source(source)
        parsed = parse_mount_options([*options, *named])
        if mount_point is None:
            if parsed.source is None:
                raise UserError("MOUNT_POINT is missing")
            mount_point = place_in_store(parsed.source)
        if parsed.fsname == "none" and source != "none":
            parsed = parsed.but(fsname=source)
        job = Job(parsed, os.path.abspath(mount_point), run_dir, verbose, log_format, background=not foreground)
        job.set_up_log()
        if foreground:
            private = (ready_fd,) if ready_fd >= 0 else ()
            sys.exit(serve(job, lambda: _say_ready(job.mount_point, ready_fd), private))
        else:
            finish(serve_in_background(job))


def _say_ready(mount_point: str, ready_fd: int) -> None:
    from udbad.supervisor import sdnotify

    sdnotify.notify("READY=1", f"STATUS=serves {mount_point}")
    if ready_fd >= 0:
        with suppress(BrokenPipeError):  # whoever started us is gone, which is no reason not to serve
            os.write(ready_fd, READY)
        os.close(ready_fd)


@click.command()
@click.option("-l", "--lazy", is_flag=True, help="Detach now, finish when the last user is gone.")
@click.argument("mount_point", type=click.Path(), shell_complete=mount_points)
def umount(lazy: bool, mount_point: str) -> None:
    """Unmount a union, given by its mount point or its name in /proc/mounts."""
    from pathlib import Path  # not to mount

    from udbad.kernel.mounts import find_mount, unmount_top

    with user_errors():
        path = find_mount(os.fsencode(Path(mount_point).absolute()), os.fsencode(mount_point))
        try:
            unmount_top(path, lazy)
        except OSError as error:
            code = ExitCode.NOT_ROOT if error.errno == errno.EPERM else ExitCode.FAILURE
            raise UserError(f"{mount_point}: {error.strerror}", code) from error


@click.command(hidden=True)
@click.argument("fd", type=int)
def guard(fd: int) -> None:
    """What the guardian of a mount executes to become one of this version."""
    from udbad.mount.guardian import State

    with user_errors():
        state = State.read(fd)
        job = Job.of(state.job)
        job.set_up_log()
        job.let_go()
        sys.exit(serve(job, lambda: None, (), state))


@click.command("mount-server", hidden=True)
def mount_server() -> None:
    """What the daemon forks mount processes from."""
    logs.set_up("info", "plain")
    from udbad.mount import worker

    sys.exit(worker.main())
