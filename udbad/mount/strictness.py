"""A union is as strict as its branches: what nobody may do on one of them (nosuid, nodev, noexec), the kernel does not
let anybody do through the union; and through a branch that is not writable nobody of us writes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from udbad.branch import mountflags
from udbad.branch.branches import BranchSet
from udbad.errors import ExitCode, UserError
from udbad.mount.readings import text
from udbad.settings.options import MountOptions

if TYPE_CHECKING:
    from udbad.mount.mountproc import MountProcess

log = logging.getLogger(__name__)


async def restrict(process: MountProcess, branches: BranchSet) -> None:
    """Have the mount be as strict as the strictest of branches to come. It does not become less so without a word:
    what came from them may be in use, and the next mount is as its branches are then. Raises UserError (BRANCH).
    """
    import trio  # not where a mount begins

    before = process.restrictions
    process.restrictions |= branches.restrictions
    flags = process.session.flags | process.flags_for(process.options) & branches.restrictions
    if flags == process.session.flags:
        return
    try:
        await trio.to_thread.run_sync(process.session.set_flags, flags)
    except OSError as error:
        process.restrictions = before
        what = f"the union cannot be made {','.join(sorted(flags - process.session.flags))} as a branch is"
        raise UserError(f"{what}: {error.strerror}", ExitCode.BRANCH) from None
    tell(branches, process.options)


async def relax(process: MountProcess, restrictions: frozenset[str]) -> None:
    """Take back what `restrict` has added to these, for branches that are not to come after all."""
    import trio

    process.restrictions = restrictions
    flags = process.flags_for(process.options)
    if flags != process.session.flags:
        try:
            await trio.to_thread.run_sync(process.session.set_flags, flags)
        except OSError as error:
            place, kept = text(process.mount_point), ",".join(sorted(process.session.flags))
            log.warning("%s stays %s: %s", place, kept, error.strerror)


def tell(branches: BranchSet, options: MountOptions) -> None:
    """Say in the log which flags the mount has from its branches."""
    taken = options.mount_flags(branches.restrictions) - options.mount_flags(frozenset())
    for branch in branches.branches:
        flags = sorted(branch.restrictions & taken)
        if flags:
            words = ",".join(flag.removeprefix("no") for flag in flags)
            log.info("branch %s is mounted %s, so the union is, too; %s in its options is what changes that",
                     branch.describe(), ",".join(flags), words)  # fmt: skip


def settle(process: MountProcess) -> None:
    """Have nothing write to branches that are not writable (now), nor to any of a read-only union."""
    branches = process.branches.answering
    written = [] if process.options.ro else [branch for branch in branches if branch.writable]
    mountflags.settle(branches, written, process.options.kernel_flags)
