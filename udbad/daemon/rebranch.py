"""Adding, removing and changing branches of a mount while it is served (spec section 11).

All or nothing: the whole new list is checked first, as for a new mount, then put in place between two
requests. A branch that is in use cannot be removed (EBUSY, with who uses it); how that is seen is in
union/reconfigure.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio

from udbad.branch import writelock
from udbad.branch.accept import open_branches, prepare_writable
from udbad.branch.branches import BranchSet, BranchSpec
from udbad.config import edit_branches
from udbad.errors import ExitCode, UserError
from udbad.union import fsck, reconfigure

if TYPE_CHECKING:
    from udbad.daemon.mountproc import MountProcess

log = logging.getLogger(__name__)

_PAUSE = 0.05


def current_specs(branches: BranchSet) -> list[BranchSpec]:
    """The branch list as the user could have written it."""
    return [BranchSpec(branch.path, branch.perm, branch.attrs, branch.udba) for branch in branches.branches]


async def change_branches(
    process: MountProcess, edits: Sequence[tuple[str, str]], check: Callable[[], None]
) -> BranchSet:
    """Apply (option, value) pairs of add, append, prepend, del and mod, in order; else as `set_branches`.

    Raises UserError: OPTION for bad edits.
    """
    return await set_branches(process, edit_branches(current_specs(process.tree.branches), edits), check)


async def set_branches(process: MountProcess, specs: Sequence[BranchSpec], check: Callable[[], None]) -> BranchSet:
    """Make these the branches, top first; returns the new set. One such change at a time.

    check: called when all waiting is over, to raise UserError for what forbids it now.
    When this returns, every access sees the new union. Raises UserError: BRANCH for a branch that is
    refused, in use (the message names who uses it) or to be written to while another mount does so.
    """
    tree = process.tree
    old = tree.branches
    fresh = open_branches(specs, process.options.ro, process.mount_point)
    try:
        await _lock(process, fresh)
        while process.operations.copyups:
            # After this: another request may have started a copy-up; look again.
            busy = next(iter(process.operations.copyups.values())).node.busy
            if busy is not None:
                await busy.wait()
        check()
    except BaseException:
        process.write_locks.keep(old.branches)
        fresh.close()
        raise
    new = reconfigure.carry_over(old, fresh)
    gone = reconfigure.removed(old, new)
    try:
        _check_unused(process, gone)
        _prepare_new(process, old, new)
    except BaseException:
        process.write_locks.keep(old.branches)
        for branch in reconfigure.removed(new, old):
            branch.close()
        raise
    process.coherence.stop()
    reconfigure.apply(tree, new)
    process.branches = new
    process.restart_coherence()
    _retire(old, new)
    process.write_locks.keep(new.branches)
    for branch in gone:
        branch.close()
    log.info("branches are now %s", ":".join(branch.describe() for branch in new.branches))
    # After this: nothing is used any more; requests meanwhile were served from the new branches.
    await trio.to_thread.run_sync(process.invalidator.flush)
    return new


async def _lock(process: MountProcess, fresh: BranchSet) -> None:
    """Lock what is to be written to; what was locked before stays so. Raises UserError when another mount has it."""
    if process.options.ro:
        return
    end = trio.current_time() + writelock.PATIENCE
    while True:
        try:
            process.write_locks.take(fresh.branches, 0.0)
            return
        except UserError:
            if trio.current_time() >= end:
                raise
        # After this: requests were served; the branches are the same.
        await trio.sleep(_PAUSE)


def _check_unused(process: MountProcess, gone: Sequence[object]) -> None:
    for branch in process.tree.branches.branches:
        if branch not in gone:
            continue
        users = reconfigure.users(process.tree, branch)
        if users:
            first = users[0]
            raise UserError(
                f"branch {os.fsdecode(branch.path)} is in use: {first.what} {os.fsdecode(first.path)} "
                f"of process {first.pid}" + (f" and {len(users) - 1} more" if len(users) > 1 else ""),
                ExitCode.BRANCH,
            )


def _prepare_new(process: MountProcess, old: BranchSet, new: BranchSet) -> None:
    """Make branches that become writable ready for it."""
    was_writable = {branch.id for branch in old.branches if branch.writable}
    for branch in new.branches:
        if branch.writable and branch.id not in was_writable and not process.options.ro:
            if fsck.begin_writing(branch):
                fsck.sweep_temporaries(branch.root_fd)
            prepare_writable(branch, process.options.plink)


def _retire(old: BranchSet, new: BranchSet) -> None:
    """Branches that were writable and are no more, or are gone, were left in order."""
    writable = {branch.id for branch in new.branches if branch.writable}
    for branch in old.branches:
        if branch.writable and branch.id not in writable:
            fsck.end_writing(branch)
