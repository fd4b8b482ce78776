"""Mounts that an earlier supervisor has left: found in the run directory, and gone on with."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace

from udbad import __version__
from udbad.control import registry
from udbad.control.protocol import server_pid
from udbad.mount.keeper import Table
from udbad.settings.file import Config, MountSettings
from udbad.settings.options import parse_mount_options
from udbad.supervisor.runner import Runner, Shared
from udbad.supervisor.workers import Worker

log = logging.getLogger(__name__)


def left(config: Config, shared: Shared) -> Iterator[tuple[Runner, Worker | None]]:
    """A runner for each of them; with the process, where it is of another version and one of this can go on with it."""
    for entry in registry.entries(config.daemon.run_dir):
        found = _adopted(entry, config, shared) if entry.supervised else None
        if found is not None:
            yield found


def _adopted(entry: registry.Entry, config: Config, shared: Shared) -> tuple[Runner, Worker | None] | None:
    try:
        worker = Worker(entry.pid, os.pidfd_open(entry.pid), keeper=_ended(entry))
    except OSError:
        return _inherited(entry, config, shared)
    try:
        # The pidfd was taken first, so it means the process that listens now, if that has the number here: the
        # one in the entry may be of another pid namespace. A wedged one is adopted, too; the heartbeat sees to it.
        same = server_pid(entry.control) == entry.pid
    except OSError:
        same = False
    if not same:
        worker.forget()
        # It has ended, perhaps without anybody to say so to, or the number means another process here.
        return _inherited(entry, config, shared)
    runner, active = _runner_of(entry, config, shared)
    runner.adopt(worker, entry, active)
    log.info("%s: adopted process %d", runner.label, entry.pid)
    if entry.version == __version__:
        return runner, None
    if runner.legacy:
        return runner, worker
    log.warning("%s: is served by version %s; when idle: udbad restart %s", runner.label, entry.version, runner.label)
    return runner, None


def _inherited(entry: registry.Entry, config: Config, shared: Shared) -> tuple[Runner, None] | None:
    """A runner for a mount whose process has ended, and left what another one can go on with."""
    runner, active = _runner_of(entry, config, shared)
    if not runner.legacy:
        return None
    runner.inherit(entry, active)
    log.info("%s: goes on where process %d has ended", runner.label, entry.pid)
    return runner, None


def _runner_of(entry: registry.Entry, config: Config, shared: Shared) -> tuple[Runner, MountSettings]:
    """A runner, with what its mount process has left or will leave; and the settings that are in force."""
    active = MountSettings(entry.name, entry.asked, parse_mount_options(entry.options))
    settings = replace(active, options=parse_mount_options(entry.configured))
    wanted = config.mounts.get(entry.name)
    if wanted is not None:
        settings = replace(
            settings, missing_branch=wanted.missing_branch, published=wanted.published, publish=wanted.publish
        )
    runner = Runner(settings, shared, transient=not entry.name)
    if entry.keeper:
        runner.legacy.add((entry.keeper, entry.record))
    return runner, active


def _ended(entry: registry.Entry) -> int:
    """The eventfd by which a keeper says that its mount process has ended (mount/keeper.py); -1: there is none."""
    if not entry.keeper or entry.ended < 0:
        return -1
    try:
        table = Table(entry.keeper)
    except OSError:
        return -1
    try:
        return table.take(entry.ended)
    except OSError:
        return -1
    finally:
        table.close()
