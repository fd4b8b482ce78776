"""rename(2) over branches (semantics 6.6): NOREPLACE, EXCHANGE, and directories that have parts on lower branches.

These stay where they are: the part that moves gets a redirect, which says where that is (union/redirects.py). Where
none may be written (option `dirren`) the rename is EXDEV, and tools copy.
All preparations keep the visible state as it was; the one renameat2 on the target branch is the
moment of change; removing DST's whiteout afterwards changes nothing visible either, because the new
object hides what the whiteout hid.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import ExitStack, suppress

from udbad.branch import notation, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.errors import eio, enoent, os_error
from udbad.inodes.node import Dir, Node
from udbad.types import Trigger
from udbad.union import copydirs, lookup, readdir, redirects, remove, resolve
from udbad.union.resolve import FOUND, Found, Missing
from udbad.union.superblock import NeedCopyUp, Superblock

log = logging.getLogger(__name__)

Descriptor = int
Position = int
_NOREPLACE, _EXCHANGE = syscalls.RENAME_NOREPLACE, syscalls.RENAME_EXCHANGE
_KNOWN = _NOREPLACE | _EXCHANGE


def rename(sb: Superblock, src_dir: Dir, src: bytes, dst_dir: Dir, dst: bytes, flags: int) -> None:
    """Raises NeedCopyUp for a file that has to come up first; the caller then starts again.

    Errors: EINVAL (RENAME_WHITEOUT), EEXIST, ENOENT, EXDEV, ENOTEMPTY, ENOTDIR, EISDIR, EROFS,
    ENAMETOOLONG.
    """
    if flags & ~_KNOWN or flags == _KNOWN:
        raise os_error(errno.EINVAL)
    whiteout.check_new_name(dst)
    source = remove.find(sb, src_dir, src)
    known = src_dir.children.get(src), dst_dir.children.get(dst)
    src_node, _ = lookup.intern(sb, src_dir, src, source)
    if dst_dir.dead:
        raise enoent()
    if not dst_dir.trusted:
        lookup.refresh(sb, dst_dir)
    resolve.check_changeable(dst_dir)
    nowhere = lookup.only_on(sb, dst_dir, dst) == lookup.NOWHERE
    found = resolve.CLEAR if nowhere else resolve.resolve(sb, dst_dir, dst)
    dst_node = None
    if found.answer is FOUND:
        dst_node, _ = lookup.intern(sb, dst_dir, dst, found)
        if flags & _NOREPLACE:
            raise os_error(errno.EEXIST)
    if flags & _EXCHANGE:
        if found.answer is not FOUND or dst_node is None:
            raise enoent()
        _exchange(sb, src_dir, src, source, src_node, dst_dir, dst, found, dst_node)
        if known[1] not in (None, dst_node):
            sb.changes.mistaken(src_dir, src, known[1])
        if known[0] not in (None, src_node):
            sb.changes.mistaken(dst_dir, dst, known[0])
        return
    _check_types(sb, src_node, dst_node)
    if src_node is dst_node:
        sb.changes.updated(dst_dir, dst, None, False, True)
        return  # two names of one file: rename(2) does nothing
    limit = dst_dir.floor
    if found.answer is FOUND:
        limit = min(limit, found.branch.index)
    elif found.whited is not None:
        limit = min(limit, found.whited)
    branch = _target(sb, src_dir, src, source, src_node, limit)
    bare = found.answer is not FOUND and found.excludes_whiteout(dst_dir, branch)
    replace = not flags & _NOREPLACE
    _move(sb, src_dir, src, src_node, dst_dir, dst, dst_node, found, branch, bare, replace)
    if known[0] not in (None, src_node) or not src_node.nlookup:
        # Replaced directly just before. The kernel has moved what it knew under the old name.
        sb.changes.mistaken(dst_dir, dst)


def _check_types(sb: Superblock, src: Node, dst: Node | None) -> None:
    if dst is None:
        return
    if type(src) is Dir:
        if type(dst) is not Dir:
            raise os_error(errno.ENOTDIR)
        if not readdir.is_empty(sb, dst):
            raise os_error(errno.ENOTEMPTY)
    elif type(dst) is Dir:
        raise os_error(errno.EISDIR)


def _target(sb: Superblock, parent: Dir, name: bytes, found: Found, node: Node, limit: Position) -> Branch:
    """The branch on which the rename happens: the source's own, or, if that is not writable or lies below
    `limit` (where the new name would be hidden), one above that it is copied to."""
    branch = found.branch
    if branch.writable and branch.index <= limit:
        if (
            type(node) is Dir
            and not redirects.may_write(sb, branch)
            and not redirects.leads_on(sb, node, branch)
            and not readdir.lower_hidden(sb, node, branch.index)
        ):
            raise os_error(errno.EXDEV)
        return branch
    if type(node) is Dir:
        known = copydirs.facts(sb, parent, min(branch.index, limit + 1), None, True, 0)
        target = copydirs.selected(sb, sb.options.copyup, known, parent)
        if not redirects.may_write(sb, target) and not readdir.is_empty(sb, node):
            raise os_error(errno.EXDEV)
        copydirs.ensure_dir(sb, node, target)
        return target
    raise NeedCopyUp(node, Trigger.RENAME, None, (parent, name), limit=limit)


def _keep_below(sb: Superblock, node: Dir, branch: Branch) -> tuple[bool, bool]:
    """Have a directory that is about to move keep what it has below `branch`: whether a redirect says where that is,
    and whether it was written now. Raises EXDEV where none can be, and something would be left behind."""
    if node.offline:
        raise eio()
    if all(layer.branch.index <= branch.index for layer in node.layers):
        return False, False
    if not redirects.may_write(sb, branch):
        return redirects.leads_on(sb, node, branch), False
    try:
        return True, redirects.write(sb, node, branch)
    except OSError as error:
        if error.errno != errno.EXDEV or not readdir.lower_hidden(sb, node, branch.index):
            raise
        return False, False


def _move(
    sb: Superblock, src_dir: Dir, src: bytes, src_node: Node, dst_dir: Dir, dst: bytes,
    dst_node: Node | None, found: Found | Missing, branch: Branch, bare: bool, replace: bool,
) -> None:  # fmt: skip
    """bare: nothing has the new name in any layer, and no whiteout on `branch` hides it, as far as is known. replace:
    what has got it directly meanwhile is replaced, as what was there before."""
    src_fd = copydirs.ensure_dir(sb, src_dir, branch)
    dst_fd = copydirs.ensure_dir_beside(sb, dst_dir, branch)
    marks = notation.of(branch)
    had_whiteout = not bare and whiteout.hides(branch, dst_fd, dst)
    lower_dst = not bare and not had_whiteout and remove.covered_below(sb, dst_dir, dst, branch)
    old = found.st if found.answer is FOUND else None
    redirected = written = False
    if type(src_node) is Dir:
        redirected, written = _keep_below(sb, src_node, branch)
        record = sb.table.record
        if record is not None and src_node in record.changed:
            # Of a part that it has got just now, whoever finds it under the new name must know.
            with suppress(OSError):  # that is said after the operation
                record.flush()
    if sb.slot is not None:
        if old is None:
            sb.slot.intend(6, branch.index, src_node.dev, src_node.ino)
        else:
            sb.slot.intend(6, branch.index, src_node.dev, src_node.ino, old.st_dev, old.st_ino, old.st_nlink)
    hidden = remove.covered_below(sb, src_dir, src, branch) and marks.hide(branch, src_fd, src, beside=True)
    marked = False
    try:
        if type(src_node) is Dir:
            if not redirected and (had_whiteout or lower_dst or sb.options.opaque_always):
                marked = _make_opaque(sb, src_node, branch)
            if found.answer is FOUND and found.branch is branch:
                # Only an empty directory can be replaced: hide what its marks hid, then take them out. The
                # whiteout stays also when the rename fails, as the marks do not come back.
                if lower_dst and marks.hide(branch, dst_fd, dst, beside=True):
                    had_whiteout = True
                remove.purge(branch, dst_fd, dst)
        if had_whiteout:
            marks.lift(branch, dst_fd, dst)
        if replace:
            syscalls.rename_at(src_fd, src, dst_fd, dst)
        else:
            copydirs.publish(src_fd, src, dst_fd, dst)
    except BaseException:
        dst_dir.doubt(dst)
        if marked:
            _unmark(sb, src_node, branch)
        if hidden:
            whiteout.remove(src_fd, src)
        if written and type(src_node) is Dir:  # after the whiteout beside it, which would count again
            redirects.take_back(sb, src_node, branch)
        if had_whiteout:
            marks.settle(branch, dst_fd, dst)
        raise
    # The rename is done and cannot be taken back: what follows only tidies up.
    if not bare:
        dst_dir.note_stacked(dst)
    if had_whiteout:
        try:
            whiteout.remove(dst_fd, dst)
        except OSError as error:
            log.warning("the whiteout beside the renamed %r stays: %s", dst, error.strerror)
    if hidden:
        remove.settle_on(branch, src_fd, src)
    if found.answer is FOUND and dst_node is not None:
        _replaced(sb, dst_dir, dst, dst_node, found.st, found.branch is not branch)
    _moved(sb, src_node, src_dir, src, dst_dir, dst, branch, dst_fd)


def _replaced(sb: Superblock, parent: Dir, name: bytes, node: Node, st: os.stat_result, was_lower: bool) -> None:
    """A name was taken from `node`, of the object with status `st`, by another object."""
    sb.changes.replaced(parent, name, node)
    if type(node) is not Dir:
        remove.lost_link(sb, node, st, was_lower)


def finish(
    sb: Superblock, src_dir: Dir, src: bytes, src_node: Node | None, dst_dir: Dir, dst: bytes, branch: Branch,
    old: os.stat_result | None,
) -> None:  # fmt: skip
    """What is left of a rename where a process was killed that had done it, on `branch`. src_node: what had the old
    name, None if that is not known. old: status of what had the new one, as in remove.unlinked_from."""
    dst_fd = sb.branch_fd(dst_dir, branch)
    whiteout.remove(dst_fd, dst)
    remove.settle(sb, src_dir, src)
    dst_dir.note_stacked(dst)
    src_dir.note_stacked(src)
    dst_node = dst_dir.children.get(dst)
    if old is not None and dst_node is not None and dst_node is not src_node:
        _replaced(sb, dst_dir, dst, dst_node, old, dst_node.branch is not branch)
    if src_node is None:
        _update(sb, src_dir, src, moved=False)
        _update(sb, dst_dir, dst, moved=True)
    else:
        _moved(sb, src_node, src_dir, src, dst_dir, dst, branch, dst_fd)


def finish_exchange(sb: Superblock, src_dir: Dir, src: bytes, dst_dir: Dir, dst: bytes) -> None:
    """The same of an exchange."""
    src_node, dst_node = src_dir.children.get(src), dst_dir.children.get(dst)
    if src_node is not None and dst_node is not None:
        sb.changes.exchanged(src_node, src_dir, src, dst_node, dst_dir, dst)
    _update(sb, src_dir, src, moved=True)
    _update(sb, dst_dir, dst, moved=True)


def _make_opaque(sb: Superblock, node: Node, branch: Branch) -> bool:
    """Mark a directory that is about to move, while it is under its old name: what is below it there is
    whited out already, so the mark changes nothing visible yet. False when it had a mark."""
    assert type(node) is Dir
    fd = sb.branch_fd(node, branch)
    if whiteout.opaque(fd, branch.overlay):
        return False
    notation.of(branch).make_opaque(branch, fd)
    return True


def _unmark(sb: Superblock, node: Node, branch: Branch) -> None:
    assert type(node) is Dir
    notation.of(branch).clear_opaque(sb.branch_fd(node, branch))


def _moved(
    sb: Superblock, node: Node, src_dir: Dir, src: bytes, dst_dir: Dir, dst: bytes, branch: Branch, dst_fd: Descriptor
) -> None:
    """Bring nodes and views up to date after the branch was changed."""
    sb.changes.moved(node, src_dir, src, dst_dir, dst, branch)
    if type(node) is Dir:
        _update(sb, src_dir, src, moved=False)
        _update(sb, dst_dir, dst, moved=True)
        return
    try:
        st = syscalls.stat_at(dst_fd, dst)
    except FileNotFoundError:
        st = None
    if st is not None and (st.st_dev, st.st_ino) == node.identity:
        st = lookup.update(sb, dst_dir, dst, Found(node.kind, branch, st, None))
        sb.changes.updated(dst_dir, dst, st, False, True)
    else:
        _update(sb, dst_dir, dst, moved=True)  # taken away or replaced directly, just now


def _update(sb: Superblock, parent: Dir, name: bytes, moved: bool) -> None:
    """Resolve a name again and put the result into node, table and view."""
    st = lookup.update(sb, parent, name, resolve.resolve(sb, parent, name))
    sb.changes.updated(parent, name, st, True, moved)


def _exchange(
    sb: Superblock, src_dir: Dir, src: bytes, source: Found, src_node: Node,
    dst_dir: Dir, dst: bytes, found: Found, dst_node: Node,
) -> None:  # fmt: skip
    """RENAME_EXCHANGE: both on one branch, no whiteouts; each directory opaque where the other had lower parts."""
    limit = min(src_dir.floor, dst_dir.floor, source.branch.index, found.branch.index)
    branch = _target(sb, src_dir, src, source, src_node, limit)
    other = _target(sb, dst_dir, dst, found, dst_node, branch.index)
    if other is not branch:
        # Both move to the upper one of the two.
        branch = _target(sb, src_dir, src, lookup_again(sb, src_dir, src), src_node, other.index)
    src_fd = copydirs.ensure_dir(sb, src_dir, branch)
    dst_fd = copydirs.ensure_dir_beside(sb, dst_dir, branch)
    with ExitStack() as undo:
        for node, parent, name in ((src_node, dst_dir, dst), (dst_node, src_dir, src)):
            if type(node) is not Dir:
                continue
            redirected, written = _keep_below(sb, node, branch)
            if written:
                undo.callback(redirects.take_back, sb, node, branch)
            if redirected or not remove.covered_below(sb, parent, name, branch):
                continue
            if _make_opaque(sb, node, branch):
                undo.callback(_unmark, sb, node, branch)
        if sb.slot is not None:
            sb.slot.intend(5, branch.index, src_node.dev, src_node.ino, dst_node.dev, dst_node.ino)
        syscalls.rename_at(src_fd, src, dst_fd, dst, _EXCHANGE)
        undo.pop_all()
    sb.changes.exchanged(src_node, src_dir, src, dst_node, dst_dir, dst)
    _update(sb, src_dir, src, moved=True)
    _update(sb, dst_dir, dst, moved=True)


def lookup_again(sb: Superblock, parent: Dir, name: bytes) -> Found:
    """Resolve a name that is known to exist. Raises ENOENT when it does not any more."""
    found = resolve.resolve(sb, parent, name)
    if found.answer is not FOUND:
        raise enoent()
    lookup.intern(sb, parent, name, found)
    return found
