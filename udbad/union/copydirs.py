"""Directories of a branch on the way to what is copied or made there (semantics 6.8 and 7.2): made with the
attributes of their top copies, under a temporary name first, so that nobody sees one half made.

Also which branch that is, and how what was made under a temporary name gets its own.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod

from udbad.branch import copydata, notation, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.branch.policy import CopyUpPolicy, CreatePolicy, Facts
from udbad.errors import ABSENT, erofs, estale, os_error
from udbad.inodes.node import Dir, Layer
from udbad.union import lookup, resolve
from udbad.union.superblock import Superblock


def facts(sb: Superblock, parent: Dir, name_top: int | None, whited: int | None, is_dir: bool, max_age: float) -> Facts:
    """What a policy may know about a name in `parent`."""
    return Facts(
        sb.branches.writable,
        [layer.branch.index for layer in parent.layers],
        parent.layers[0].branch.index,
        name_top,
        whited,
        parent.opaque,
        parent.floor,
        sb.free_reader(max_age),
        is_dir,
    )


def target_branch(sb: Superblock, parent: Dir, source: int) -> Branch:
    """The branch that receives a copy of an object whose top copy is on `source`. Raises EROFS."""
    if sb.options.read_only:
        raise erofs()
    policy = sb.options.copyup
    if policy.parent_decides:
        top: Branch = parent.layers[0].branch
        if top.index < source and top.index <= parent.floor and top.writable and not top.offline:
            return top
    return selected(sb, policy, facts(sb, parent, source, None, False, 0), parent)


def selected(sb: Superblock, policy: CreatePolicy | CopyUpPolicy, known: Facts, parent: Dir) -> Branch:
    """The branch that a policy takes for something in `parent`, or one above where that cannot be made there.

    Raises EROFS; EIO where one that does not answer might have done.
    """
    try:
        branch = sb.branches[policy.select(known)]
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        raise sb.branches.refusal() from None
    if parent.layer(branch.index) is not None:
        return branch
    for one in reversed(sb.branches.branches[: branch.index + 1]):
        if one.writable and _has_room(sb, parent, one):
            return one
    return branch  # whatever is there instead is met when the directory is made


def _has_room(sb: Superblock, node: Dir, branch: Branch) -> bool:
    """Whether a directory is on a branch or can be made there. What is not shown, because an upper branch has a
    directory of that name, may have its place."""
    name = b""
    while (layer := node.layer(branch.index)) is None:
        if node.parent is None:
            return False
        name, node = node.name, node.parent
    if not name:
        return True
    try:
        return st_mod.S_ISDIR(syscalls.stat_at(sb.layer_fd(node, layer), name).st_mode)
    except OSError as error:
        if error.errno not in ABSENT:
            raise
        return True


def ensure_dir(sb: Superblock, node: Dir, branch: Branch) -> int:
    """The directory's descriptor on `branch`, making it and its parents there when missing.

    A directory made below its top copy is made opaque and its whiteout removed when it was whited out there
    ("copy-down", semantics 7.2). Parents' times are put back. Raises OSError; ENOENT when the
    directory is gone.
    """
    chain: list[Dir] = []
    current = node
    while True:
        layer = current.layer(branch.index)
        if layer is not None:
            fd = sb.layer_fd(current, layer)
            break
        if current.parent is None or current.dead:
            raise estale()
        chain.append(current)
        current = current.parent
    for child in reversed(chain):
        try:
            fd = _copy_dir(sb, child, branch, fd)
        except FileExistsError:
            fd = _made_directly(sb, child, branch)
    return fd


def ensure_dir_beside(sb: Superblock, node: Dir, branch: Branch) -> int:
    """`ensure_dir` for a name that an object is to get on the branch it is on. Raises EXDEV where that cannot be, and
    whoever asked copies."""
    try:
        return ensure_dir(sb, node, branch)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        raise os_error(errno.EXDEV) from None


def _made_directly(sb: Superblock, node: Dir, branch: Branch) -> int:
    """The descriptor of a directory on `branch` that somebody was faster to make, and that our layers lack.

    Raises ESTALE when the name stands for something else than this directory by now, EROFS when it cannot be there.
    """
    parent = node.parent
    assert parent is not None
    parent.doubt(node.name)
    found = resolve.found_again(sb, parent, node)
    if found is None:
        raise estale()
    lookup.adopt(sb, node, found, parent.floor)
    if node.layer(branch.index) is None:
        raise erofs()  # what has its place on this branch is no directory, and not shown
    return sb.branch_fd(node, branch)


def _copy_dir(sb: Superblock, node: Dir, branch: Branch, parent_fd: int) -> int:
    """Make one directory on `branch` with the attributes of its top copy, under its own name at last."""
    top = node.layers[0]
    src_fd = sb.layer_fd(node, top)
    st = os.fstat(src_fd)
    before = os.fstat(parent_fd)
    marks = notation.of(branch)
    whited = whiteout.hides(branch, parent_fd, node.name)
    tmp = whiteout.temporary_name(node.name)
    syscalls.mkdir_at(parent_fd, tmp, 0o700)
    try:
        fd = syscalls.open_dir_at(parent_fd, tmp)
        try:
            if not is_empty(fd):
                # Who may write to its parent has put another one there, with what somebody else keeps in it. That
                # must not get the owner and mode of what is copied.
                raise estale()
            if whited:
                marks.make_opaque(branch, fd)
            copydata.copy_metadata(
                st, syscalls.proc_path(src_fd), syscalls.proc_path(fd), branch.copying, follow_symlinks=True
            )
            made = os.fstat(fd)
            if whited:
                marks.lift(branch, parent_fd, node.name)
            publish(parent_fd, tmp, parent_fd, node.name)
        except BaseException:
            os.close(fd)
            raise
    except BaseException:
        _remove_tmp_dir(parent_fd, tmp)
        if whited:
            marks.settle(branch, parent_fd, node.name)
        raise
    # It has its name, and whatever fails from here on, the next to need it must know.
    layer = Layer(branch, made.st_dev, made.st_ino, made.st_nlink, fd)
    position = sum(other.branch.index < branch.index for other in node.layers)
    layers = [*node.layers[:position], layer, *node.layers[position:]]
    sb.table.open_fds += 1
    sb.table.note_fds(node)
    node.layers = layers
    node.quiet = False  # the new one is not watched
    if position == 0:
        node.branch, node.dev, node.ino = branch, made.st_dev, made.st_ino
        sb.inomap.alias(made.st_dev, made.st_ino, node.id)
    sb.table.changed(node)
    try:
        if whited:
            whiteout.remove(parent_fd, node.name)
        restore_times(parent_fd, (before.st_atime_ns, before.st_mtime_ns))
    finally:
        assert node.parent is not None
        sb.changes.directory_copied_up(node, node.parent)
    return fd


def is_empty(fd: int) -> bool:
    """Whether a branch directory has no name at all. Raises OSError."""
    listing = syscalls.open_listing(fd)
    try:
        with os.scandir(listing) as entries:
            return next(entries, None) is None
    finally:
        os.close(listing)


def _remove_tmp_dir(parent_fd: int, tmp: bytes) -> None:
    try:
        fd = syscalls.open_dir_at(parent_fd, tmp)
    except OSError:
        pass  # as just before (no descriptor is free): then nothing was put into it yet
    else:
        try:
            syscalls.unlink_at(fd, whiteout.OPAQUE)
        except FileNotFoundError:
            pass
        finally:
            os.close(fd)
    try:
        syscalls.rmdir_at(parent_fd, tmp)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.ENOTDIR):  # somebody has exchanged it
            raise


def publish(src_dirfd: int, tmp: bytes, dst_dirfd: int, name: bytes) -> None:
    """Give the finished temporary its name, over nothing: EEXIST when somebody was faster."""
    try:
        syscalls.rename_at(src_dirfd, tmp, dst_dirfd, name, syscalls.RENAME_NOREPLACE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems without renameat2 flags
            raise
        if syscalls.exists_at(dst_dirfd, name):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        syscalls.rename_at(src_dirfd, tmp, dst_dirfd, name)


def restore_times(dirfd: int, times: tuple[int, int]) -> None:
    syscalls.utime_at(dirfd, b".", *times)
