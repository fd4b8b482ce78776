"""mount, umount, and the process behind a mount."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from udbad import logs
from udbad.commands.common import layer_source, place_in_store, run_dir_option, user_errors
from udbad.commands.completion import mount_points
from udbad.errors import ExitCode, UserError

if TYPE_CHECKING:
    from udbad.mount.guardian import State
    from udbad.mount.mountproc import MountProcess
    from udbad.settings.options import MountOptions

_READY = b"READY\n"


@click.command()
@click.option("-o", "options", multiple=True, help="Mount options, comma separated: br=…,udba=….")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground and serve until unmounted.")
@click.option("-v", "--verbose", is_flag=True, help="Log every operation.")
@click.option(
    "--log-format", type=click.Choice(["plain", "json"]), default="plain", show_default=True,
    help="Lines for people, or JSON.",
)  # fmt: skip
@click.option("--ready-fd", type=int, default=-1, hidden=True)
@run_dir_option
@click.argument("source")
@click.argument("mount_point", type=click.Path(path_type=Path), required=False)
def mount(
    options: tuple[str, ...],
    foreground: bool,
    verbose: bool,
    log_format: str,
    ready_fd: int,
    run_dir: str,
    source: str,
    mount_point: Path | None,
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
            mount_point = Path(place_in_store(parsed.source))
        if parsed.fsname == "none" and source != "none":
            parsed = replace(parsed, fsname=source)
        job = Job(parsed, mount_point.absolute(), run_dir, verbose, log_format, background=not foreground)
        job.set_up_log()
        if foreground:
            private = (ready_fd,) if ready_fd >= 0 else ()
            sys.exit(serve(job, lambda: _say_ready(job.mount_point, ready_fd), private))
        else:
            sys.exit(serve_in_background(job))


@dataclass(frozen=True, slots=True)
class Job:
    """What `udbad mount` was asked for. background: it has left whoever started it once it serves."""

    options: MountOptions
    mount_point: Path
    run_dir: str
    verbose: bool
    log_format: str
    background: bool

    def set_up_log(self) -> None:
        logs.set_up("debug" if self.verbose else "info", self.log_format)

    def let_go(self) -> None:
        if self.background:
            _let_go()

    def words(self) -> dict[str, Any]:
        """For JSON."""
        from udbad.settings.options import format_options

        words = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**words, "options": format_options(self.options), "mount_point": str(self.mount_point)}

    @classmethod
    def of(cls, words: Mapping[str, Any]) -> Job:
        """From `words`."""
        from udbad.settings.options import parse_mount_options

        known = {field.name: words[field.name] for field in fields(cls)}
        options = parse_mount_options(known["options"])
        return cls(**{**known, "options": options, "mount_point": Path(known["mount_point"])})


def serve(job: Job, on_ready: Callable[[], None], private: tuple[int, ...], state: State | None = None) -> int:
    """Mount and serve until unmounted, in this process or, where it can be, in one that this process guards.

    on_ready: called here. private: descriptors that are for nobody else. state: instead, go on as the guardian of a
    mount. Returns the exit code. Raises UserError.
    """
    from udbad.mount import guardian, life, presence  # the supervisor and the tools must not load pyfuse3

    options = job.options
    # Whoever names a control socket looks after the mount; it is not listed for others.
    identity = presence.Identity(run_dir=None if options.control else job.run_dir)
    place = os.fsencode(job.mount_point)

    def serves() -> None:
        on_ready()
        job.let_go()

    def guarded(guard: life.Guard, ready: Callable[[guardian.Place], None]) -> None:
        def serves_here(process: MountProcess) -> None:
            ready((os.fsdecode(process.mount_point), process.session.connection))
            job.let_go()

        with user_errors():
            life.run(options, place, serves_here, identity, guard=guard)

    if life.why_not_survive(options) is not None:
        life.run(options, place, lambda process: serves(), identity)
        return 0
    guarding = guardian.Guardian(guarded, serves, options.restart_timeout, private, job.words())
    return guarding.run() if state is None else guarding.go_on(state)


def _say_ready(mount_point: Path, ready_fd: int) -> None:
    from udbad.supervisor import sdnotify

    sdnotify.notify("READY=1", f"STATUS=serves {mount_point.absolute()}")
    if ready_fd >= 0:
        with suppress(BrokenPipeError):  # whoever started us is gone, which is no reason not to serve
            os.write(ready_fd, _READY)
        os.close(ready_fd)


def serve_in_background(job: Job) -> int:
    """Have a child, in a session of its own, serve; 0 when it does, its exit code when it cannot.

    Forked and nothing executed: what is imported by now need not be imported again. Precondition: no threads, and no
    descriptor above 2 that the child could need.
    """
    read_fd, write_fd = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        with user_errors():
            _detach(write_fd)
            sys.exit(serve(job, lambda: _say(write_fd), (write_fd,)))
    os.close(write_fd)
    with open(read_fd, "rb") as said:
        if said.read(len(_READY)) == _READY:
            return 0
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or int(ExitCode.FAILURE)


def _detach(write_fd: int) -> None:
    """Leave the session and every descriptor of whoever started us, but for where errors are shown."""
    os.setsid()
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != write_fd:
            with suppress(OSError):  # the one that the directory was read with
                os.close(fd)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)


def _say(write_fd: int) -> None:
    """Say that we serve."""
    with suppress(BrokenPipeError):  # whoever started us is gone, which is no reason not to serve
        os.write(write_fd, _READY)
    os.close(write_fd)


def _let_go() -> None:
    """From now on nobody waits for the end of what we could still write."""
    logs.to_syslog()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)


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
