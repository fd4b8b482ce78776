"""Adding, removing and changing branches of a mount while it is served (semantics 11).

All or nothing: the whole new list is checked first, as for a new mount, then put in place between two
requests. A branch that is in use cannot be removed (EBUSY, with who uses it); how that is seen is in
union/reconfigure.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

import trio

from udbad.branch import mountflags, writelock
from udbad.branch.accept import open_branches
from udbad.branch.branches import Branch, BranchSet, BranchSpec
from udbad.branch.spec import parse_path, printable
from udbad.errors import ExitCode, UserError
from udbad.inodes.paths import last_path
from udbad.mount import strictness
from udbad.mount.offline import check_answering
from udbad.settings.branchlist import edit_branches, find_branch
from udbad.union import reconfigure
from udbad.union.fs import COPYING

if TYPE_CHECKING:
    from udbad.mount.mountproc import MountProcess

log = logging.getLogger(__name__)

_PAUSE = 0.05


def current_specs(branches: BranchSet) -> list[BranchSpec]:
    """The branch list as the user could have written it."""
    return [BranchSpec(one.path, one.perm, one.attrs, one.udba, one.watch) for one in branches.branches]


async def find(branches: BranchSet, path: bytes) -> Branch:
    """The branch that `path` names: as it is written, else by where symbolic links lead. Raises UserError (OPTION).

    In a thread, here and below: the path may lead into our own mount, which has to answer then, or into one that hangs.
    """
    place = await _in_thread(find_branch, current_specs(branches), path)
    if place is None:
        raise UserError(f"{printable(path)} is not a branch", ExitCode.OPTION)
    return branches[place]


async def change_branches(
    process: MountProcess, edits: Sequence[tuple[str, str]], check: Callable[[], None]
) -> BranchSet:
    """Apply (option, value) pairs of add, append, prepend, del and mod, in order; else as `set_branches`.

    Raises UserError: OPTION for bad edits.
    """
    specs = current_specs(process.sb.branches)
    # After this: the branches are the same, as one change at a time is made.
    return await set_branches(process, await _in_thread(edit_branches, specs, edits), check)


async def abandon(process: MountProcess, edits: Sequence[tuple[str, str]], check: Callable[[], None]) -> BranchSet:
    """Remove branches that do not answer, without touching them; returns what the union has then, which begins when
    another process has taken over, soon after this returns. Files that are open there keep failing.

    edits, check: as above. Raises UserError: BRANCH for all else that edits may say, as there is a branch that does
    not answer.
    """
    gone = _silent(process.sb.branches, edits)
    await check_leaving(process, check)
    new = _without(process.sb.branches, gone)
    leave(process, gone, tuple(current_specs(new)))
    return new


async def check_leaving(process: MountProcess, check: Callable[[], None]) -> None:
    """Whether branches that do not answer can be left now. check: as above. Raises UserError."""
    await _no_copyups(process)
    # After this: requests were served; a branch stays offline as long as this process lives.
    check()
    process.check_successor()


def leave(process: MountProcess, gone: Sequence[Branch], specs: tuple[BranchSpec, ...]) -> None:
    """Have another process go on without branches that do not answer, after the next wait of this one. specs: the rest,
    as the options are to say it. Precondition: `check_leaving`."""
    process.beside.nursery.start_soon(_leave_without, process, gone, specs)


def left_out(process: MountProcess, specs: Sequence[BranchSpec]) -> list[Branch]:
    """The branches that do not answer, and that a new list leaves out, which changes nothing else.

    Raises UserError (BRANCH) for any other list, as there is a branch that does not answer.
    """
    branches = process.sb.branches
    gone: list[Branch] = []
    rest = list(specs)
    for branch, was, now in zip(branches.branches, process.options.branches, current_specs(branches), strict=True):
        if rest and rest[0] in (was, now):
            del rest[0]
        else:
            gone.append(branch)
    # One that comes to be the first, and has no permission of its own, would be written to.
    first_changes = branches[0] in gone and (not specs or specs[0].perm is None)
    if rest or first_changes or not all(branch.offline for branch in gone):
        check_answering(branches)
    return gone


def _without(old: BranchSet, gone: Sequence[Branch]) -> BranchSet:
    rest = [branch for branch in old.branches if branch not in gone]
    return BranchSet(tuple(branch.but(index=index) for index, branch in enumerate(rest)), old.generation + 1)


def _silent(branches: BranchSet, edits: Sequence[tuple[str, str]]) -> list[Branch]:
    """Those that `edits` remove, and nothing else. As they are written: to follow symbolic links may be to ask one."""
    named = {os.path.normpath(parse_path(raw)) if key == "del" else b"" for key, raw in edits}
    gone = [branch for branch in branches.branches if branch.offline and os.path.normpath(branch.path) in named]
    if len(gone) != len(named) or len(gone) == len(branches):
        check_answering(branches)
    return gone


async def _leave_without(process: MountProcess, gone: Sequence[Branch], specs: tuple[BranchSpec, ...]) -> None:
    """When the answer is sent: nothing else happens in this process once it has other branches."""
    await _no_copyups(process)
    before, new = (process.options, process.branches), _without(process.branches, gone)
    process.options = process.options.but(branches=specs)
    process.branches = process.sb.branches = new
    process.write_locks.abandon({branch.dev for branch in gone} - {branch.dev for branch in new.branches})
    process.offline.abandoned.update(branch.id for branch in gone)
    log.info("branches are now %s", ":".join(branch.describe() for branch in new.branches))
    try:
        process.make_room()
    except (OSError, UserError) as error:
        process.options, process.branches = before
        process.sb.branches = process.branches
        log.error("no branch was removed: %s", error)


async def set_branches(
    process: MountProcess, specs: Sequence[BranchSpec], check: Callable[[], None], ro: bool | None = None
) -> BranchSet:
    """Make these the branches, top first; returns the new set. One such change at a time.

    check: called when all waiting is over, to raise UserError for what forbids it now. ro: whether the mount is to be
    read-only, None: as it is.
    When this returns, every access sees the new union. Raises UserError: BRANCH for a branch that is
    refused, in use (the message names who uses it) or to be written to while another mount does so.
    """
    sb = process.sb
    old = sb.branches
    check_answering(old)
    before = _written(old, process.options.ro)
    ro = process.options.ro if ro is None else ro
    # Whatever asks a branch for something does so in a thread, which may wait for it as long as it hangs; abandoned
    # only with the mount. After each: requests were served; the branches are the same.
    fresh = await _in_thread(open_branches, specs, ro, process.mount_point, process.options.whiteouts)
    restrictions = process.restrictions
    try:
        await _lock(process, _written(fresh, ro))
        await _in_thread(process.writing.begin, _written(fresh, ro), process.options.plink)
        await strictness.restrict(process, fresh)  # before anything of a new branch shows
        await _no_copyups(process)
        openers = await process.beside.openers()
        # After this: requests were served. Who has opened a file since then, without telling, gets ESTALE for what the
        # kernel has not of it.
        check()
        _check_unused(process, fresh, openers)
        _check_opens(process, fresh)
    except BaseException:
        await _keep(process, before)
        await strictness.relax(process, restrictions)
        fresh.close()
        raise
    new = reconfigure.carry_over(old, fresh, process.offline.abandoned)
    after = _written(new, ro)
    gone = reconfigure.removed(old, new)
    process.coherence.hand_over()
    if process.fs.kept is not None:
        process.fs.kept.leave({number for number, _ in openers})
    reconfigure.apply(sb, new)
    process.branches = new
    process.set_read_only(ro)
    mountflags.settle(after, after, process.options.kernel_flags)
    process.restart_coherence()
    process.writing.sweep(process.beside.nursery)
    # After this: requests were served from the new branches.
    await _keep(process, after)
    strictness.settle(process)
    for branch in gone:
        branch.close()
    log.info("branches are now %s", ":".join(branch.describe() for branch in new.branches))
    left = sorted(process.session.flags & process.restrictions - new.restrictions - process.options.kernel_flags)
    if left:
        log.info("the union stays %s as a branch was that it no longer has, until it is mounted anew", ",".join(left))
    # After this: nothing is used any more; requests meanwhile were served from the new branches.
    await trio.to_thread.run_sync(process.invalidator.flush)
    return new


async def set_read_only(process: MountProcess, ro: bool, check: Callable[[], None]) -> None:
    """Write to the branches no more (the kernel lets nobody begin to by now), or write to them from now on.

    check: as for `set_branches`. Raises UserError (BRANCH), and then nothing has changed: in use, written to by another
    mount, or cannot be written to.
    """
    branches = process.sb.branches
    check_answering(branches)
    before, after = _written(branches, process.options.ro), _written(branches, ro)
    try:
        await _lock(process, after)
        mountflags.settle(after, after, process.options.kernel_flags)
        await _in_thread(process.writing.begin, after, process.options.plink)
        await _no_copyups(process)
        if ro:
            await _no_writers(process)
        check()
    except BaseException:
        await _keep(process, before)
        strictness.settle(process)
        raise
    process.set_read_only(ro)
    process.writing.sweep(process.beside.nursery)
    await _keep(process, after)
    strictness.settle(process)


def _written(branches: BranchSet, ro: bool) -> list[Branch]:
    """The branches that a mount writes to; ro: one that is read-only has none, whatever their permissions are."""
    return [] if ro else [branch for branch in branches.branches if branch.writable]


async def _no_copyups(process: MountProcess) -> None:
    while copies := process.edge.waiting.copyups:
        ended = trio.Event()
        next(iter(copies.values())).ended.append(ended.set)
        # After this: another request may have started a copy-up; look again.
        await ended.wait()


async def _no_writers(process: MountProcess) -> None:
    """The kernel tells of the close of a file after the fact (RELEASE). Raises UserError when that does not come."""
    end = trio.current_time() + writelock.PATIENCE
    if process.fs.kept is not None:
        process.fs.kept.rest(0)
    while writers := [handle for handle in process.sb.handles.files.values() if handle.writable]:
        if trio.current_time() >= end:
            path = os.fsdecode(last_path(writers[0].node))
            raise UserError(f"{path} is open for writing by process {writers[0].pid}", ExitCode.BRANCH)
        # After this: requests were served.
        await trio.sleep(_PAUSE)


_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")


async def _in_thread(call: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
    return await trio.to_thread.run_sync(call, *arguments, abandon_on_cancel=True)


async def _keep(process: MountProcess, written: Sequence[Branch]) -> None:
    """Leave all branches but these, and let others write to them."""
    await _in_thread(process.writing.keep, written)
    # After this: requests were served; what was left has no mark any more.
    process.write_locks.keep(written)


async def _lock(process: MountProcess, written: Sequence[Branch]) -> None:
    """Lock what is to be written to; what was locked before stays so. Raises UserError when another mount has it."""
    end = trio.current_time() + writelock.PATIENCE
    while True:
        try:
            await _in_thread(process.write_locks.take, written, 0.0)
            return
        except UserError:
            if trio.current_time() >= end:
                raise
        # After this: requests were served; the branches are the same.
        await trio.sleep(_PAUSE)


def _check_unused(process: MountProcess, fresh: BranchSet, openers: Sequence[tuple[int, int]]) -> None:
    for branch in reconfigure.missing(process.sb.branches, fresh):
        users = reconfigure.users(process.sb, branch, openers)
        if users:
            raise _in_use(f"branch {os.fsdecode(branch.path)} is in use", users)
    writers = reconfigure.written_behind(process.sb, fresh)
    if writers:
        raise _in_use("the kernel writes to a branch that is to be read-only (io=passthrough)", writers)


def _check_opens(process: MountProcess, fresh: BranchSet) -> None:
    for branch in fresh.branches:
        if process.fs.kept is not None and branch.attrs & COPYING:
            text = f"{branch.describe()} is to copy files up when they are opened, of which io=cached does not tell"
            raise UserError(text, ExitCode.BRANCH)


def _in_use(what: str, users: Sequence[reconfigure.InUse]) -> UserError:
    first = users[0]
    more = f" and {len(users) - 1} more" if len(users) > 1 else ""
    return UserError(f"{what}: {first.what} {os.fsdecode(first.path)} of process {first.pid}{more}", ExitCode.BRANCH)
