"""The life of a mount process: a keeper first, then the mount, serving it, and its end in order."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from udbad.control import registry
from udbad.errors import ExitCode, UserError
from udbad.inodes import garbage
from udbad.inodes.record import Record
from udbad.mount import crash, descriptors, keeper
from udbad.mount.handover import Predecessor
from udbad.mount.keeper import Left
from udbad.mount.mountproc import STOPPING, MountProcess, is_portable
from udbad.mount.offline import ask_first
from udbad.mount.presence import NOBODY, Identity
from udbad.mount.readings import text
from udbad.mount.watchdog import Watchdog
from udbad.settings.options import MountOptions, format_options, parse_mount_options
from udbad.settings.sources import resolved

log = logging.getLogger(__name__)

_SWITCH_SECONDS = 0.0005
_PATIENT_PART = 4
"""How much of `restart_timeout` a process waits at most, when those before it have crashed one after the other."""


class Renewal(NamedTuple):
    """How whoever guards a mount process goes over to another version. command: a program with its first arguments;
    path: PYTHONPATH; control: the socket of the mount process."""

    command: Sequence[str]
    path: str
    control: str


class Guard(NamedTuple):
    """Whoever starts another mount process when this one is killed.

    told: called with what will be left of this process, before it does anything else. left: what was left before, the
    newest first. died: time.monotonic() of the end of the process before. ended: an eventfd for this one's keeper, -1
    where the guard goes by its pidfd. renewed: has it go over to another version, raises OSError when it has ended;
    None: it does so by itself.
    """

    told: Callable[[Left], None]
    left: Sequence[Left] = ()
    died: float = 0.0
    ended: int = -1
    renewed: Callable[[Renewal], None] | None = None
    over: Callable[[], None] = lambda: None
    """Called when the union was unmounted: from here on there is nothing to go on with, however this process ends."""


def why_not_survive(options: MountOptions) -> str | None:
    """Why a mount with these options ends with its process; None when another process can take it over."""
    if not options.survive:
        return "survive=off"
    if is_portable(options):
        return "it is served through pyfuse3"
    return keeper.why_not()


def run(
    options: MountOptions,
    mount_point: bytes,
    on_ready: Callable[[MountProcess], None],
    identity: Identity = NOBODY,
    configured: str | None = None,
    guard: Guard | None = None,
) -> None:
    """Mount and serve in this process until unmounted; configured: the options that the configuration has.

    guard: who has another process go on with the mount when this one ends otherwise, None: nobody does.

    Raises UserError when it cannot start; then nothing of it is left. Whatever else ends a mount that has served is
    raised as it is, and leaves the mount point dead and the branches marked for the next mount; or to the next process,
    where there is a guard.
    """
    mortal = why_not_survive(options)
    if mortal is not None:
        if options.survive:
            log.info("the mount ends with this process: %s", mortal)
        if options.branch_timeout:
            log.info("a branch that hangs is waited for, branch_timeout has no effect: %s", mortal)
    with ExitStack() as ending:
        record = predecessor = own = None
        watched = -1
        asked = 0
        if guard is not None and mortal is None:
            record = Record.create()
            ending.callback(os.close, record.fd)
            watch = Watchdog(record, options.branch_timeout, keeper.clone) if options.branch_timeout else None
            descriptors.reserve(pid for pid, _ in guard.left)
            # Before any thread is.
            own = keeper.Keeper(options.restart_timeout, guard.ended, watch)
            ending.callback(own.end)
            watched = crash.watch(record)
            ending.callback(crash.forget, watched)
            guard.told((own.pid, record.fd))
            own.is_known()
        gc.disable()  # all that is made stays, so there is nothing to be found
        try:
            if guard is not None and guard.left:
                predecessor = Predecessor(guard.left, registry.real_mount_point(mount_point), guard.died)
                ending.callback(predecessor.close)
                ending.callback(predecessor.join)
                if record is not None:
                    _pace(predecessor.crash.pace(record, guard.died), options.restart_timeout)
                options = parse_mount_options(predecessor.facts["options"])
                configured = predecessor.facts["configured"]
            else:
                configured = configured or format_options(options)
                options = resolved(options)
                if options.branch_timeout:
                    asked = ask_first([spec.path for spec in options.branches], options.branch_timeout)
            process = MountProcess(options, mount_point, identity, record, predecessor, own)
            if asked:
                os.waitpid(asked, 0)  # has ended long since
        except OSError as error:
            raise _no_start(mount_point, error) from error
        finally:
            gc.freeze()
            gc.enable()
        garbage.spare(lambda: len(process.sb.table.nodes))
        process.configured = configured or process.configured
        process.mortal = mortal or ""
        process.guard = guard
        # A thread that has to tell the kernel what to forget waits so long for a busy event loop; by default 5 ms.
        sys.setswitchinterval(_SWITCH_SECONDS)
        for number in STOPPING:
            signal.signal(number, process.on_late_signal)
        try:
            process.serve(lambda: on_ready(process))
        except BaseException as error:
            if process.ready:
                if not isinstance(error, UserError):
                    ending.pop_all()  # for the next process
                    crash.tell(watched, error)
                raise
            process.abandon()
            if isinstance(error, (OSError, RuntimeError)):  # the latter: pyfuse3
                raise _no_start(mount_point, error) from error
            raise
        process.close()
        if process.offline:
            ending.pop_all()  # closing files there may wait: the guard ends the keeper, which has them, too
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # at its exit, Python gives up its own handlers first


def _pace(seconds: float, patience: float) -> None:
    """Wait, but not so long that nobody could take the mount over in time; patience: restart_timeout, 0: any."""
    if seconds > 0:
        time.sleep(min(seconds, patience / _PATIENT_PART) if patience else seconds)


def _no_start(mount_point: bytes, error: Exception) -> UserError:
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return UserError(f"cannot mount on {text(mount_point)}: {reason}", ExitCode.FAILURE)
