"""Removing objects: unlink and rmdir (semantics 6.3 and 6.4).

The whiteout is written before the object goes: what a crash leaves is the old state (the object beside
its whiteout stays visible) or the new one. Lower copies are never touched.
"""

from __future__ import annotations

import errno
import logging
import os

from udbad.branch import notation, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.errors import enoent, erofs, os_error
from udbad.inodes.inomap import Identity
from udbad.inodes.node import Dir, Node
from udbad.inodes.slot import U64
from udbad.union import copydirs, lookup, plink, readdir, resolve
from udbad.union.resolve import FOUND, Found
from udbad.union.superblock import Superblock

log = logging.getLogger(__name__)

_NOT_SIMPLE = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR})
"""rmdir(2) of a directory that holds something, marks perhaps; stat(2) and rmdir(2) of one that others have taken away.
"""

_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})
"""rename(2) of a directory to a name that something else has."""


def _check(sb: Superblock, parent: Dir, name: bytes) -> None:
    """Whether a name may be changed, in a directory that is up to date then. Raises as `find`."""
    whiteout.check_not_reserved(name)
    if sb.options.read_only:
        raise erofs()
    if parent.dead:
        raise enoent()
    if not parent.trusted:
        lookup.refresh(sb, parent)
    resolve.check_changeable(parent)


def find(sb: Superblock, parent: Dir, name: bytes) -> Found:
    """What a name that is going to change stands for. Raises ENOENT, EROFS, EPERM (.wh.*); as `check_changeable`."""
    _check(sb, parent, name)
    return _find(sb, parent, name)


def _find(sb: Superblock, parent: Dir, name: bytes) -> Found:
    """`find` of a name that was checked."""
    found = resolve.resolve(sb, parent, name)
    if found.answer is FOUND:
        return found
    lookup.update(sb, parent, name, found)
    raise enoent()


def covered_below(sb: Superblock, parent: Dir, name: bytes, branch: Branch) -> bool:
    """Whether removing `name` from `branch` would let a lower object appear."""
    if branch.index >= parent.layers[-1].branch.index:
        return False
    if lookup.UNCLEAR < lookup.only_on(sb, parent, name) <= branch.index:
        return False
    found = resolve.resolve(sb, parent, name, below=branch.index)
    if found.answer is not FOUND:
        return False
    resolve.discard(sb, parent, name, found)
    layer = parent.layer(branch.index)
    return layer is None or not branch.whable or not whiteout.hides(branch, sb.layer_fd(parent, layer), name)


def choose(sb: Superblock, parent: Dir, found: Found) -> Branch:
    """The branch a removal happens on: the object's own, else where a whiteout can hide it. Raises EROFS."""
    if found.branch.writable:
        return found.branch
    return copydirs.target_branch(sb, parent, found.branch.index)


def unlink(sb: Superblock, parent: Dir, name: bytes) -> None:
    found = find(sb, parent, name)
    if found.layers is not None:
        resolve.discard(sb, parent, name, found)
        raise os_error(errno.EISDIR)
    top = found.branch
    branch = choose(sb, parent, found)
    dirfd = copydirs.ensure_dir(sb, parent, branch)
    if found.st.st_ino in sb.plinks:
        lookup.intern(sb, parent, name, found)  # whether a pseudo-link has lost a name cannot be seen afterwards
    whited = branch is not top or covered_below(sb, parent, name, branch)
    st, was_lower = found.st, branch is not top
    if sb.slot is not None:
        sb.slot.intend(5, st.st_dev, st.st_ino, st.st_ctime_ns & U64, st.st_nlink, was_lower)
    made = whited and notation.of(branch).hide(branch, dirfd, name, branch is top)
    unlinked = False
    if branch is top:
        try:
            syscalls.unlink_at(dirfd, name)
        except FileNotFoundError:
            pass  # somebody was faster, directly on the branch
        except BaseException:
            if made:
                whiteout.remove(dirfd, name)
            raise
        else:
            unlinked = True
        if made:
            settle_on(branch, dirfd, name)
    node = parent.children.get(name)
    if node is None:
        node = sb.table.find(sb.inomap.number(st.st_dev, st.st_ino))
    unlinked_from(sb, parent, name, node, st, was_lower, branch if unlinked else None, made)


def unlinked_from(
    sb: Superblock, parent: Dir, name: bytes, node: Node | None, st: os.stat_result, was_lower: bool,
    branch: Branch | None, whited: bool,
) -> None:  # fmt: skip
    """A name is gone that was one of the file with status `st`, of which number, device and links count. node: if it is
    known. was_lower: as in `lost_link`. branch, whited: as in `Changes.removed`."""
    sb.changes.removed(parent, name, node, branch, whited)
    if node is not None:
        lost_link(sb, node, st, was_lower)
    elif st.st_nlink <= 1 and not was_lower:
        sb.inomap.drop(st.st_dev, st.st_ino)


def lost_link(sb: Superblock, node: Node, st: os.stat_result, was_lower: bool) -> None:
    """A name was removed from `node`, of the object with status `st`. was_lower: it is there still, and whited out."""
    if node.plink is not None:
        last = plink.name_removed(sb, node, st)
    else:
        if was_lower:
            node.nlink_extra -= 1  # the lower file keeps its link, the union has lost a name
        last = st.st_nlink <= 1
    sb.changes.unlinked(node, last)


def rmdir(sb: Superblock, parent: Dir, name: bytes) -> None:
    _check(sb, parent, name)
    if _remove_simple(sb, parent, name):
        return
    found = _find(sb, parent, name)
    if found.layers is None:
        raise os_error(errno.ENOTDIR)
    node, _ = lookup.intern(sb, parent, name, found)
    assert type(node) is Dir
    if not readdir.is_empty(sb, node):
        raise os_error(errno.ENOTEMPTY)
    top = node.branch
    branch = choose(sb, parent, found)
    dirfd = copydirs.ensure_dir(sb, parent, branch)
    whited = branch is not top or covered_below(sb, parent, name, branch)
    if sb.slot is not None:
        sb.slot.intend(2, node.dev, node.ino)
    made = whited and notation.of(branch).hide(branch, dirfd, name, branch is top)
    if branch is top:
        try:
            _remove_branch_dir(sb, branch, dirfd, name)
        except BaseException:
            if made:
                whiteout.remove(dirfd, name)
            raise
        if made:
            settle_on(branch, dirfd, name)
    sb.changes.removed(parent, name, node, None, made)


def _remove_simple(sb: Superblock, parent: Dir, name: bytes) -> bool:
    """Remove a directory that only one branch has, a writable one, and that has no name or mark in it; False where it
    is another, or there is more to it. The branch is asked once, and says itself whether it is empty."""
    node = parent.children.get(name)
    if type(node) is not Dir or not node.trusted or node.offline or len(node.layers) > 1:
        return False
    branch = node.branch
    if not branch.writable or lookup.only_on(sb, parent, name) != branch.index:
        return False
    dirfd = sb.branch_fd(parent, branch)
    try:
        st = syscalls.stat_at(dirfd, name)
        if (st.st_dev, st.st_ino) != node.identity:
            return False
        if sb.slot is not None:
            sb.slot.intend(2, node.dev, node.ino)
        syscalls.rmdir_at(dirfd, name)
    except OSError as error:
        if error.errno in _NOT_SIMPLE:
            return False
        raise
    sb.changes.removed(parent, name, node, branch)
    return True


def settle_on(branch: Branch, dirfd: int, name: bytes) -> None:
    """What is left to do of a whiteout whose name is gone: it hides as it is, so that nobody need be told."""
    try:
        notation.of(branch).settle(branch, dirfd, name)
    except OSError as error:
        log.warning("the whiteout of %r stays as it is: %s", name, error.strerror)


def settle(sb: Superblock, parent: Dir, name: bytes) -> None:
    """The same on every branch, where a process was killed before it came to that."""
    for layer in parent.layers:
        if layer.branch.writable and not layer.branch.offline:
            settle_on(layer.branch, sb.layer_fd(parent, layer), name)


def _remove_branch_dir(sb: Superblock, branch: Branch, dirfd: int, name: bytes) -> None:
    """Remove a logically empty branch directory: out of sight first, then its marks (semantics 6.4).

    With more than `dirwh` marks only the first step is done here, the rest in the background. One without any mark,
    which is most of them, goes at once.
    """
    try:
        syscalls.rmdir_at(dirfd, name)
        return
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    tmp = whiteout.temporary_name(name)
    try:
        syscalls.rename_at(dirfd, name, dirfd, tmp)
    except FileNotFoundError:
        return
    try:
        if count_marks(branch, dirfd, tmp) > sb.options.dirwh:
            sb.trash.append((branch, os.dup(dirfd), tmp))
            return
    except BaseException:
        _put_back(dirfd, tmp, name)
        raise
    try:
        purge(branch, dirfd, tmp)
        syscalls.rmdir_at(dirfd, tmp)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            _put_back(dirfd, tmp, name)
            raise
        # Without some of its marks it would show again what they hid: it is removed, and this is left to the sweep.
        log.warning("cannot remove %r: %s", tmp, error.strerror)


def restore(sb: Superblock, parent: Dir, name: bytes, identity: Identity) -> bool:
    """Whether a directory that is out of sight holds something, which was put into it directly while a process that was
    killed was about to remove it; then it has its name again. Else the sweep has the rest to do. A whiteout stays
    beside it, as it may have been there before: it hides no more than the marks in the directory do."""
    for layer in parent.layers:
        branch = layer.branch
        if not branch.writable or branch.offline:
            continue
        dirfd = sb.layer_fd(parent, layer)
        for tmp in filter(whiteout.is_temporary, _names(dirfd)):
            st = syscalls.stat_at(dirfd, tmp)
            if (st.st_dev, st.st_ino) != identity:
                continue
            try:
                count_marks(branch, dirfd, tmp)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
                _put_back(dirfd, tmp, name)
                return True
    return False


def _put_back(dirfd: int, tmp: bytes, name: bytes) -> None:
    """Give a directory its name back: something was put into it directly, so it is not empty, and stays.

    By whoever had come to it before it went out of sight. If somebody else has made another object of its name by now,
    it gets a further one: under its temporary name the sweep would remove what was put into it.
    """
    try:
        syscalls.rename_at(dirfd, tmp, dirfd, name)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        beside = tmp.removeprefix(whiteout.RESERVED)
        copydirs.publish(dirfd, tmp, dirfd, beside)
        log.warning(
            "something was put into %r while it was removed; there is another one now, and it is %r", name, beside
        )


def empty_trash(trash: list[tuple[Branch, int, bytes]]) -> None:
    """Finish removals that were put off; any thread. What cannot be removed is left for the next sweep."""
    for branch, dirfd, tmp in trash:
        try:
            purge(branch, dirfd, tmp)
            syscalls.rmdir_at(dirfd, tmp)
        except FileNotFoundError:
            pass  # the directory that it was in has been removed meanwhile, and it was one of the marks in there
        except OSError as error:
            log.warning("cannot remove %r: %s", tmp, error.strerror)
        finally:
            os.close(dirfd)


def _names(dirfd: int) -> list[bytes]:
    listing = syscalls.open_listing(dirfd)
    try:
        return [os.fsencode(text) for text in os.listdir(listing)]
    finally:
        os.close(listing)


def _marks(branch: Branch, child: int) -> list[bytes]:
    """Names in a branch directory that holds nothing but marks. Raises ENOTEMPTY for another name."""
    marks = _names(child)
    for mark in marks:
        if not (mark.startswith(whiteout.PREFIX) or (branch.overlay and whiteout.is_device_at(child, mark))):
            raise os_error(errno.ENOTEMPTY)
    return marks


def count_marks(branch: Branch, dirfd: int, name: bytes) -> int:
    """How many whiteouts and marks a branch directory holds. Raises ENOTEMPTY when there is something else."""
    child = syscalls.open_dir_at(dirfd, name)
    try:
        return len(_marks(branch, child))
    finally:
        os.close(child)


def purge(branch: Branch, dirfd: int, name: bytes) -> None:
    """Remove all whiteouts and marks in a branch directory. Raises ENOTEMPTY when there is something else."""
    try:
        child = syscalls.open_dir_at(dirfd, name)
    except FileNotFoundError:
        return
    try:
        for mark in _marks(branch, child):
            _remove_mark(branch, child, mark)
    finally:
        os.close(child)


def _remove_mark(branch: Branch, dirfd: int, mark: bytes) -> None:
    try:
        syscalls.unlink_at(dirfd, mark)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        # A temporary directory that a crash left, or that the background is about to remove.
        purge(branch, dirfd, mark)
        try:
            syscalls.rmdir_at(dirfd, mark)
        except FileNotFoundError:
            pass
