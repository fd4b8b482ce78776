"""mount, umount, and the process behind a mount."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click

from udbad import logs
from udbad.commands.common import run_dir_option, user_errors
from udbad.commands.completion import mount_points
from udbad.errors import ExitCode, UserError
from udbad.ourselves import COMMAND, environment
from udbad.settings.options import parse_mount_options
from udbad.supervisor import sdnotify


@click.command()
@click.option("-o", "options", multiple=True, required=True, help="Mount options, comma separated: br=…,udba=….")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground and serve until unmounted.")
@click.option("-v", "--verbose", is_flag=True, help="Log every operation.")
@click.option(
    "--log-format", type=click.Choice(["plain", "json"]), default="plain", show_default=True,
    help="Lines for people, or JSON.",
)  # fmt: skip
@click.option("--ready-fd", type=int, default=-1, hidden=True)
@click.option("--detach", is_flag=True, hidden=True)
@run_dir_option
@click.argument("source")
@click.argument("mount_point", type=click.Path(path_type=Path))
def mount(
    options: tuple[str, ...],
    foreground: bool,
    verbose: bool,
    log_format: str,
    ready_fd: int,
    detach: bool,
    run_dir: str,
    source: str,
    mount_point: Path,
) -> None:
    """Mount a union on MOUNT_POINT. SOURCE is shown in /proc/mounts and has no meaning otherwise."""
    with user_errors():
        parsed = parse_mount_options(options)
        if parsed.fsname == "none" and source != "none":
            parsed = replace(parsed, fsname=source)
        if not foreground:
            sys.exit(start_in_background(options, verbose, run_dir, source, mount_point))
        from udbad.mount import mountproc  # the supervisor and the tools must not load pyfuse3

        def ready(process: mountproc.MountProcess) -> None:
            if detach:
                # Whoever started us may be waiting for the end of what we could still write.
                logs.to_syslog()
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, 1)
                os.dup2(null, 2)
                os.close(null)
            else:
                sdnotify.notify("READY=1", f"STATUS=serves {os.fsdecode(process.mount_point)}")
            if ready_fd >= 0:
                with suppress(BrokenPipeError):  # whoever started us is gone, which is no reason not to serve
                    os.write(ready_fd, b"READY\n")
                os.close(ready_fd)

        logs.set_up("debug" if verbose else "info", log_format)
        # Whoever names a control socket looks after the mount; it is not listed for others.
        identity = mountproc.Identity(run_dir=None if parsed.control else run_dir)
        mountproc.run(parsed, os.fsencode(mount_point.absolute()), ready, identity)


def start_in_background(options: tuple[str, ...], verbose: bool, run_dir: str, source: str, mount_point: Path) -> int:
    """Start the mount process in a session of its own; 0 when it serves, its exit code when it could not."""
    read_fd, write_fd = os.pipe()
    command = [*COMMAND, "mount", "-f", "--detach", "--ready-fd", str(write_fd)]
    command += ["--run-dir", run_dir]
    command += ["-v"] if verbose else []
    for option in options:
        command += ["-o", option]
    process = subprocess.Popen(
        [*command, "--", source, str(mount_point)],
        pass_fds=(write_fd,),
        stdin=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as ready:
        if ready.read(6) == b"READY\n":
            return 0
    return process.wait() or int(ExitCode.FAILURE)


@click.command()
@click.option("-l", "--lazy", is_flag=True, help="Detach now, finish when the last user is gone.")
@click.argument("mount_point", type=click.Path(path_type=Path), shell_complete=mount_points)
def umount(lazy: bool, mount_point: Path) -> None:
    """Unmount a union, given by its mount point or its name in /proc/mounts."""
    from udbad.kernel.mounts import find_mount, unmount_top

    with user_errors():
        path = find_mount(os.fsencode(mount_point.absolute()), os.fsencode(mount_point))
        try:
            unmount_top(path, lazy)
        except OSError as error:
            code = ExitCode.NOT_ROOT if error.errno == errno.EPERM else ExitCode.FAILURE
            raise UserError(f"{mount_point}: {error.strerror}", code) from error


@click.command("mount-server", hidden=True)
@click.option("--log-format", type=click.Choice(["plain", "json"]), default="plain")
def mount_server(log_format: str) -> None:
    """What the daemon forks mount processes from."""
    logs.set_up("info", log_format)
    from udbad.mount import worker

    sys.exit(worker.main())
