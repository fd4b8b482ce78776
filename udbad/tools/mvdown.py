"""Moving one file's copy from an upper branch to the next lower one (semantics 11.5, aumvdown).

The rules are aufs': a regular file with one name, not pseudo-linked, not open, its source the copy that
the union shows, and nothing between the two branches that would hide it where it goes.
"""

from __future__ import annotations

import os
import stat as st_mod
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from udbad.branch import datacalls, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.branch.mountflags import writing_to
from udbad.branch.spec import printable
from udbad.errors import REPLACED, ExitCode, UserError
from udbad.inodes.node import Dir, Node
from udbad.tools import carry
from udbad.tools.carry import Changed, Copy, Halt, InUse, Work
from udbad.union import copydirs
from udbad.union.superblock import Superblock

_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Options:
    """overwrite_lower: replace a file that is there (aufs' OWLOWER). keep_upper: copy only (KUPPER).

    read_only_upper, read_only_lower: also from, and to, a branch that is not writable (ROUPPER, ROLOWER).
    source: path of the branch to move from (BRID_UPPER), b"": the one whose copy is shown.
    """

    overwrite_lower: bool = False
    keep_upper: bool = False
    read_only_upper: bool = False
    read_only_lower: bool = False
    source: bytes = b""
    openers: Sequence[tuple[int, int]] = ()
    """(node id, pid) of files that the kernel has opened without telling."""


@dataclass(frozen=True, slots=True)
class _Plan:
    parent: Dir
    node: Node
    source: Branch
    target: Branch


def steps(
    sb: Superblock, parts: Sequence[bytes], options: Options, halt: Halt
) -> Generator[Work, None, dict[str, Any]]:
    """Move the file at a path of the union. Yields what a thread has to do; the file is looked up again after each.

    Returns the paths of the two branches and the size in bytes. Raises UserError: REFUSED, with the rule; OSError.
    """
    with sb.carrying(), ExitStack() as lifted:
        return (yield from _attempts(sb, parts, options, halt, lifted))


def _attempts(
    sb: Superblock, parts: Sequence[bytes], options: Options, halt: Halt, lifted: ExitStack
) -> Generator[Work, None, dict[str, Any]]:
    for attempt in range(_ATTEMPTS):
        plan = _check(sb, parts, options)
        lifted.enter_context(writing_to(plan.source, plan.target))
        copy = _begin(sb, parts, plan)
        try:
            with datacalls.syncing(plan.target.root_fd) as fd:
                yield lambda copy=copy: carry.transfer(copy, halt)  # type: ignore[misc]  # a lambda with a default
                again = _check(sb, parts, options)
                if again != plan:
                    raise Changed("changed meanwhile")
                carry.publish(copy)
                yield lambda fd=fd: datacalls.sync_fs(fd)  # type: ignore[misc]  # as above
            if not options.keep_upper:
                again = _check(sb, parts, options, published=True)
                if again != plan:
                    raise Changed("changed meanwhile")
                carry.uncover(sb, plan.parent, copy, plan.target)
        except InUse as use:
            raise _refused(parts, str(use)) from None
        except Changed as change:
            if attempt == _ATTEMPTS - 1:
                raise _refused(parts, str(change)) from None
            continue
        except OSError as error:
            if error.errno not in REPLACED or attempt == _ATTEMPTS - 1:
                raise
            continue
        finally:
            carry.discard(copy)
            os.close(copy.src_dirfd)
            os.close(copy.dst_dirfd)
        assert copy.st is not None
        return {
            "from": os.fsdecode(plan.source.path),
            "to": os.fsdecode(plan.target.path),
            "size": copy.st.st_size,
            "kept": options.keep_upper,
        }
    raise AssertionError("the last attempt returns or raises")


def _refused(parts: Sequence[bytes], reason: str) -> UserError:
    return UserError(f"/{printable(b'/'.join(parts))}: {reason}", ExitCode.REFUSED)


def _check(sb: Superblock, parts: Sequence[bytes], options: Options, published: bool = False) -> _Plan:
    """Every rule. published: the copy is on the lower branch already. Raises UserError (REFUSED), OSError."""
    if sb.options.read_only:
        raise _refused(parts, "the union is mounted read-only")
    parent = carry.find(sb, parts[:-1])
    node = carry.find(sb, parts)
    if type(parent) is not Dir or node is None:
        raise _refused(parts, "not in the union")
    name = parts[-1] if parts else b""
    if node.kind != st_mod.S_IFREG:
        raise _refused(parts, "not a regular file")
    if node.plink is not None:
        raise _refused(parts, "it is pseudo-linked, that is it has other names on lower branches")
    source = _source(sb, parts, parent, node, options)
    label = _label(source)
    if not source.writable and not options.read_only_upper and not options.keep_upper:
        raise _refused(parts, f"{label} is not writable (--read-only-upper moves all the same)")
    st = sb.stat(node)
    if st.st_nlink != 1:
        raise _refused(parts, f"it has {st.st_nlink} names; only a file with one can be moved")
    users = sorted(
        {handle.pid for handle in node.handles or () if handle.fh > 0}
        | {pid for number, pid in options.openers if number == node.id}
    )
    if users and not options.keep_upper:
        raise _refused(parts, f"it is open, by process {', '.join(map(str, users))}")
    if node.busy is not None:
        raise _refused(parts, "it is being copied up")
    target = _target(sb, parts, source, options)
    _check_between(sb, parts, parent, name, source, target)
    layer = parent.layer(target.index)
    if layer is not None and not published:
        _check_lower(parts, sb.layer_fd(parent, layer), name, target, options)
    return _Plan(parent, node, source, target)


def _label(branch: Branch) -> str:
    return f"branch {printable(branch.path)}"


def _source(sb: Superblock, parts: Sequence[bytes], parent: Dir, node: Node, options: Options) -> Branch:
    if not options.source:
        return node.branch
    for branch in sb.branches.branches:
        if branch.path != options.source:
            continue
        if branch.index > node.branch.index:
            raise _refused(parts, f"an upper copy is on {_label(node.branch)}")
        if branch.index < node.branch.index:
            raise _refused(parts, f"{_label(branch)} has no copy of it")
        return branch
    raise UserError(f"{printable(options.source)} is not a branch", ExitCode.OPTION)


def _target(sb: Superblock, parts: Sequence[bytes], source: Branch, options: Options) -> Branch:
    lower = sb.branches.branches[source.index + 1 :]
    if not lower:
        raise _refused(parts, f"{_label(source)} is the bottom branch")
    for branch in lower:
        if branch.writable or options.read_only_lower:
            return branch
    raise _refused(parts, f"no writable branch is below {_label(source)} (--read-only-lower takes the next one)")


def _check_between(
    sb: Superblock, parts: Sequence[bytes], parent: Dir, name: bytes, source: Branch, target: Branch
) -> None:
    """What would hide the copy once the upper one is gone."""
    if parent.floor < target.index:
        opaque = parent.opaque
        what = "a directory above it" if opaque is None else f"its directory on {_label(sb.branches[opaque])}"
        raise _refused(parts, f"{what} is opaque, whited out or renamed, which hides {_label(target)}")
    for layer in parent.layers:
        branch = layer.branch
        if not source.index <= branch.index < target.index:
            continue
        fd = sb.layer_fd(parent, layer)
        if branch.whable and whiteout.hides(branch, fd, name):
            raise _refused(parts, f"a whiteout on {_label(branch)} hides {_label(target)}")
        if branch is not source and syscalls.exists_at(fd, name):
            raise _refused(parts, f"another copy is between, on {_label(branch)}")


def _check_lower(parts: Sequence[bytes], dirfd: int, name: bytes, target: Branch, options: Options) -> None:
    try:
        st = syscalls.stat_at(dirfd, name)
    except FileNotFoundError:
        return
    if not st_mod.S_ISREG(st.st_mode):
        raise _refused(parts, f"{_label(target)} has something else of that name")
    if not options.overwrite_lower:
        raise _refused(parts, f"{_label(target)} has a copy already (--overwrite-lower replaces it)")
    if st.st_nlink != 1:
        raise _refused(parts, f"its copy on {_label(target)} has {st.st_nlink} names")


def _begin(sb: Superblock, parts: Sequence[bytes], plan: _Plan) -> Copy:
    layer = plan.parent.layer(plan.source.index)
    if layer is None:
        raise _refused(parts, "its directory was changed meanwhile")
    lower = copydirs.ensure_dir(sb, plan.parent, plan.target)
    src_dirfd = os.dup(sb.layer_fd(plan.parent, layer))
    try:
        return Copy(plan.source, plan.target, src_dirfd, os.dup(lower), parts[-1])
    except BaseException:
        os.close(src_dirfd)
        raise
