"""What the top one of several branches changes against the rest, read from the branches, mounted or not.

As Docker's Changes (semantics 13), and finer: content and attributes are told apart, and a copy that
differs in nothing from what it covers is no change. A whiteout or an opaque directory deletes what is
visible below it; a directory that is gone is one deletion, not one for each name in it. What lower
branches show is decided by resolve.py alone.

Read-only. The number of descriptors it needs grows with the depth of the tree, times the branches.
"""

from __future__ import annotations

import os
import stat as st_mod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from udbad.branch import compare, redirect, syscalls, whiteout
from udbad.branch.branches import Branch, BranchSet, BranchSpec
from udbad.branch.layers import look
from udbad.branch.policy import parse_copyup, parse_create
from udbad.branch.spec import printable
from udbad.branch.walk import kind_name, open_branch
from udbad.errors import GONE
from udbad.inodes.node import Dir, Layer
from udbad.types import Perm
from udbad.union import redirects, resolve, view
from udbad.union.resolve import Answer
from udbad.union.superblock import Superblock, UnionOptions

_NO_NODE = 0  # directories here belong to no inode table


class ChangeKind(Enum):
    """What became of a name; the value is what people and programs see."""

    ADDED = "added"
    CHANGED = "changed"
    METADATA = "metadata"
    TYPE = "type"
    DELETED = "deleted"
    IDENTICAL = "identical"


@dataclass(frozen=True, slots=True)
class Change:
    """One name. path: in the union, without a leading slash. type: what is there now, or was before it was deleted.

    detail: what differs (for METADATA and CHANGED), the earlier type (TYPE), or "opaque" for a directory that
    hides all that was in it.
    """

    path: bytes
    kind: ChangeKind
    type: str
    detail: str


@dataclass(slots=True)
class _Level:
    """A directory of the top branch, and what lies below it and can be compared, None: nothing.

    hides: nothing of that is visible in the union, because this directory, or one above it, is opaque or has a
    whiteout beside it. overlay: marks of overlayfs count.
    """

    path: bytes
    fd: int
    lower: Dir | None
    hides: bool
    overlay: bool
    redirects: bool
    """Directories may have been renamed."""
    above: bytes | None = None
    """Its path on lower branches, where that is another one."""
    todo: list[bytes] = field(default_factory=list)


@contextmanager
def opened(top: BranchSpec, lowers: Sequence[BranchSpec]) -> Iterator[tuple[Branch, BranchSet]]:
    """The branches of a comparison, open for reading; whiteouts count on branches with rw or +wh.

    Raises UserError: BRANCH for a path that is no directory, NOT_ROOT.
    """
    branches: list[Branch] = []
    try:
        for index, spec in enumerate([top, *lowers]):
            fd = open_branch(spec.path)
            branches.append(
                Branch(
                    index, max(index - 1, 0), spec.path, spec.perm or Perm.RO, spec.attrs, spec.udba,
                    root_fd=fd, anchor_fd=os.dup(fd), dev=os.fstat(fd).st_dev, fs_type="",
                    unmarked=whiteout.unmarked(fd),
                )
            )  # fmt: skip
        yield branches[0], BranchSet(tuple(branches[1:]))
    finally:
        for branch in branches:
            branch.close()


def changes(top: Branch, lowers: BranchSet) -> Generator[Change, None, None]:
    """Every change, a directory before what is in it, else in order of names. Raises OSError.

    Whether the whiteouts of `top` count does not matter: it is taken as one that does.
    """
    overlay = top.unmarked
    sb = Superblock(lowers, UnionOptions(parse_create("tdp"), parse_copyup("tdp")), max_fds=1)
    hides = whiteout.opaque(top.root_fd, overlay)
    renamed = overlay or redirect.may_have(top.root_fd)
    levels = [_Level(b"", syscalls.open_dir_at(top.root_fd, b"."), sb.root, hides, overlay, renamed)]
    try:
        yield from _names(sb, levels[0])
        while levels:
            level = levels[-1]
            if not level.todo:
                _close(sb, levels.pop())
                continue
            child = _enter(sb, level, level.todo.pop())
            if child is not None:
                levels.append(child)
                yield from _names(sb, child)
    finally:
        for level in levels:
            _close(sb, level)


def _close(sb: Superblock, level: _Level) -> None:
    os.close(level.fd)
    if level.lower is not None and level.lower is not sb.root:
        for layer in level.lower.layers:
            os.close(layer.fd)


def _enter(sb: Superblock, level: _Level, name: bytes) -> _Level | None:
    held = look(level.fd, name, True, level.overlay)
    if held.fd < 0:
        return None  # changed while we were looking
    try:
        origin = _origin(sb, level, name)
        if origin is not None:
            layers: list[Layer] | None = redirects.followed(sb, -1, origin) or None
        else:
            layers = None if level.lower is None else _below(sb, level.lower, name)
    except BaseException:
        os.close(held.fd)
        raise
    path = level.path + b"/" + name if level.path else name
    lower = None if layers is None else Dir(_NO_NODE, layers)
    hides = level.hides or held.end is not None if origin is None else held.opaque
    above = origin
    if above is None and level.above is not None:
        above = level.above + b"/" + name
    return _Level(path, held.fd, lower, hides, level.overlay, level.redirects, above)


def _origin(sb: Superblock, level: _Level, name: bytes) -> bytes | None:
    """The path that a directory has on lower branches, where it was renamed."""
    if not level.redirects:
        return None
    fd = syscalls.open_dir_at(level.fd, name)
    try:
        said = redirect.read(fd, sb.redirect_key)
    except redirect.Unusable:
        return b""
    finally:
        os.close(fd)
    if said is None or said.startswith(b"/"):
        return said
    return (b"/" + level.path if level.above is None else level.above).rstrip(b"/") + b"/" + said


def _below(sb: Superblock, lower: Dir, name: bytes) -> list[Layer] | None:
    found = resolve.resolve(sb, lower, name)
    return found.layers if found.answer is Answer.FOUND else None


def _names(sb: Superblock, level: _Level) -> Iterator[Change]:
    """The changes of one directory; notes its subdirectories to be visited, last one first."""
    names = set(whiteout.names_in(level.fd, level.overlay))
    mine = sorted(name for name in names if not name.startswith(whiteout.PREFIX))
    gone = {name[len(whiteout.PREFIX) :] for name in names if name.startswith(whiteout.PREFIX)
            and not name.startswith(whiteout.RESERVED)}  # fmt: skip
    if level.hides:
        gone |= _visible(sb, level.lower)
    for name in sorted(gone.difference(mine).union(mine)):
        path = level.path + b"/" + name if level.path else name
        if name in names:
            change = _compare(sb, level, name, path)
            if change is not None:
                yield change
        elif level.lower is not None:
            found = resolve.resolve(sb, level.lower, name)
            if found.answer is Answer.FOUND:
                _discard(found)
                yield Change(path, ChangeKind.DELETED, kind_name(found.kind), "")
    level.todo.reverse()


def _visible(sb: Superblock, lower: Dir | None) -> set[bytes]:
    return set() if lower is None else set(view.scan(sb, lower))


def _discard(found: resolve.Found) -> None:
    for layer in found.layers or ():
        os.close(layer.fd)


def _compare(sb: Superblock, level: _Level, name: bytes, path: bytes) -> Change | None:
    """How a name of the top branch differs from what it covers; None when it is gone by now."""
    try:
        st = syscalls.stat_at(level.fd, name)
    except FileNotFoundError:
        return None
    kind = st_mod.S_IFMT(st.st_mode)
    label = kind_name(kind)
    is_dir = kind == st_mod.S_IFDIR
    if is_dir:
        level.todo.append(name)
        try:
            origin = _origin(sb, level, name)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return None
        if origin:
            return Change(path, ChangeKind.ADDED, label, f"was {printable(origin)}")
    found = resolve.CLEAR if level.lower is None else resolve.resolve(sb, level.lower, name)
    if found.answer is not Answer.FOUND:
        return Change(path, ChangeKind.ADDED, label, "")
    try:
        if found.kind != kind:
            return Change(path, ChangeKind.TYPE, label, f"was a {kind_name(found.kind)}")
        assert level.lower is not None
        layer = level.lower.layer(found.branch.index)
        assert layer is not None
        differs = compare.differences(level.fd, name, sb.layer_fd(level.lower, layer), name)
        hides = is_dir and _hides(level, name)
    except OSError as error:
        if error.errno not in GONE:
            raise
        return None
    finally:
        _discard(found)
    words = ", ".join([*sorted(differs), *(["opaque"] if hides else [])])
    if compare.CONTENT in differs:
        return Change(path, ChangeKind.CHANGED, label, words)
    if differs or hides:
        return Change(path, ChangeKind.METADATA, label, words)
    return Change(path, ChangeKind.IDENTICAL, label, "")


def _hides(level: _Level, name: bytes) -> bool:
    """Whether nothing of the same directory on lower branches shows."""
    held = look(level.fd, name, True, level.overlay)
    if held.fd >= 0:
        os.close(held.fd)
    return held.end is not None
