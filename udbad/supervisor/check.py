"""What the mounts of a configuration would be refused for if they began now: the rules of branch/accept.py, applied
to what is there, and whether the message bus of [hosts] answers, and permits what they have to do. Opens branches and
mount points, which may hang; so it is for a command, not for the supervisor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from udbad.branch.accept import check_names, open_branches
from udbad.branch.branches import BranchSpec
from udbad.branch.spec import shown
from udbad.control.registry import real_mount_point
from udbad.errors import ExitCode, UserError
from udbad.settings.file import Config, MountSettings, Problem
from udbad.settings.sources import resolved
from udbad.types import Perm


def problems(config: Config) -> Iterator[Problem]:
    """Why mounts that are enabled could not begin: of each the first reason, and the branches that are missing; and
    why no host could be told."""
    if config.hosts.urls:
        yield from _bus_problems(config)
    active = [mount for mount in config.mounts.values() if mount.enabled]
    for mount in active:
        key = f"mounts.{mount.name}"
        for path in missing(mount) if mount.missing_branch == "fail" else ():
            yield Problem(config.origin[key], f"{key}.branches", f"branch {path} does not exist")
        if _comes_later(mount, active):
            continue
        try:
            _try(mount)
        except UserError as error:
            word = "mount_point" if error.code is ExitCode.MOUNT_POINT else "branches"
            yield Problem(config.origin[key], f"{key}.{word}", error.message)


def _bus_problems(config: Config) -> Iterator[Problem]:
    import asyncio  # only where there is one

    from udbad.hosts.bus import BusError, BusSettings
    from udbad.hosts.permitted import refusals

    heard = {name for mount in config.mounts.values() for name in mount.published}
    told = {name for mount in config.mounts.values() if mount.publish for name in mount.published}
    try:
        found = asyncio.run(refusals(BusSettings.of(config.hosts), sorted(heard), sorted(told)))
    except (BusError, UserError) as error:
        found = [str(error)]
    for text in found:
        yield Problem(config.origin["hosts"], "hosts", text)


def missing(mount: MountSettings) -> list[str]:
    """The branches that are not there: waited for, unless missing_branch is "fail"."""
    return [shown(spec.path) for spec in mount.options.branches if not os.path.exists(spec.path)]


def _comes_later(mount: MountSettings, others: Sequence[MountSettings]) -> bool:
    """Whether the mount point is in a union that is not mounted yet."""
    return not os.path.lexists(mount.mount_point) and any(
        mount.mount_point.startswith(other.mount_point.rstrip("/") + "/") for other in others
    )


def _try(mount: MountSettings) -> None:
    """Raises UserError as the mount process would."""
    place = real_mount_point(os.fsencode(mount.mount_point))
    try:
        os.close(os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))  # a dead or wedged mount is not asked
    except OSError as error:
        raise UserError(f"mount point {shown(place)}: {error.strerror}", ExitCode.MOUNT_POINT) from None
    options = resolved(mount.options) if not missing(mount) else mount.options
    specs: list[BranchSpec] = []
    for index, spec in enumerate(options.branches):
        if os.path.exists(spec.path):
            # One that follows a missing first branch does not become writable by that.
            specs.append(spec._replace(perm=Perm.RO) if index and not specs and spec.perm is None else spec)
    if not specs:
        return
    branches = open_branches(specs, options.ro, place, options.whiteouts)
    try:
        for branch in branches.branches if not options.ro else ():
            if branch.writable:
                check_names(branch, options.plink)
    finally:
        branches.close()
