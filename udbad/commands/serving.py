"""The process behind a mount: what `udbad mount`, mount.udba and udbad-overlay leave behind.

udbad-overlay runs once for each container, and who calls it waits: so nothing is imported here that does not serve, and
no click.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from udbad import logs
from udbad.branch.spec import printable
from udbad.errors import ExitCode, UserError

if TYPE_CHECKING:
    from udbad.mount.guardian import State
    from udbad.mount.mountproc import MountProcess
    from udbad.settings.options import MountOptions

READY: Final = b"READY\n"
"""What is written to whoever waits for the mount."""


@contextmanager
def user_errors(program: str = "udbad") -> Iterator[None]:
    """Mistakes of the user are one line on stderr and an exit code, never a traceback."""
    try:
        yield
    except UserError as error:
        for line in error.message.splitlines():
            sys.stderr.write(f"{program}: {for_terminal(line)}\n")
        sys.exit(int(error.code))


def for_terminal(text: str) -> str:
    """What users may have named, files and processes, for the terminal of root: without its control characters."""
    return printable(os.fsencode(text))


class Job(NamedTuple):
    """What `udbad mount` was asked for.

    mount_point: an absolute path. background: it has left whoever started it once it serves.
    """

    options: MountOptions
    mount_point: str
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

        return {**self._asdict(), "options": format_options(self.options)}

    @classmethod
    def of(cls, words: Mapping[str, Any]) -> Job:
        """From `words`."""
        from udbad.settings.options import parse_mount_options

        known = {name: words[name] for name in cls._fields}
        options = parse_mount_options(known["options"])
        return cls(**{**known, "options": options})


def serve(job: Job, on_ready: Callable[[], None], private: tuple[int, ...], state: State | None = None) -> int:
    """Mount and serve until unmounted, in this process or, where it can be, in one that this process guards.

    on_ready: called here. private: descriptors that are for nobody else. state: instead, go on as the guardian of a
    mount. Returns the exit code. Raises UserError.
    """
    gc.disable()  # until all is there: of what is imported nothing goes, and to look for that takes 10 ms
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
        try:
            with user_errors():
                _detach(write_fd)
                sys.exit(serve(job, lambda: _say(write_fd), (write_fd,)))
        except SystemExit as end:  # of the guardian, and of each mount process
            finish(end.code if isinstance(end.code, int) else 0)
    os.close(write_fd)
    with open(read_fd, "rb") as said:
        if said.read(len(READY)) == READY:
            return 0
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or int(ExitCode.FAILURE)


def finish(code: int) -> NoReturn:
    """End this process, in which nothing is left to do, without taking the interpreter apart: that takes as long as to
    start it, and somebody waits, or wants the processor."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
        os.write(write_fd, READY)
    os.close(write_fd)


def _let_go() -> None:
    """From now on nobody waits for the end of what we could still write."""
    logs.to_syslog()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)
