"""Making objects: create, O_TMPFILE, mkdir, mknod, symlink, link (semantics 6.5 and 6.7).

Order of every one: the name must be free in the merged view, a policy picks the branch, missing parents
are made there, the object is made under its own name with the caller's ids, and only then a whiteout
that hid the name on that branch is removed. A whiteout hides lower branches only, so a crash in
between leaves the new object visible and nothing else changed.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from udbad.branch import datacalls, notation, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.branch.credentials import Credentials
from udbad.errors import enoent, erofs, estale, os_error
from udbad.inodes.node import Dir, Node
from udbad.types import Caller, Trigger
from udbad.union import copydirs, homes, lookup, remove, resolve
from udbad.union.resolve import FOUND, Found, Missing
from udbad.union.superblock import NeedCopyUp, Superblock

P = ParamSpec("P")
T = TypeVar("T")


class Target:
    """Where a new object goes. whited: the branch directory has a whiteout `.wh.NAME` for it now. alone: nothing on any
    branch has that name."""

    __slots__ = ("alone", "branch", "dirfd", "whited")

    def __init__(self, branch: Branch, dirfd: int, whited: bool, alone: bool = False) -> None:
        self.branch = branch
        self.dirfd = dirfd
        self.whited = whited
        self.alone = alone

    def give_up(self, name: bytes) -> None:
        """Nothing is made after all: the whiteout gets back the form that it had."""
        if self.whited:
            remove.settle_on(self.branch, self.dirfd, name)


def prepare(sb: Superblock, parent: Dir, name: bytes, is_dir: bool = False) -> Target:
    """Check the name and choose the branch. Raises EEXIST, EROFS, EPERM (.wh.*), ENAMETOOLONG, ENOENT."""
    missing = check_free(sb, parent, name)
    branch = _choose(sb, parent, missing, is_dir)
    asked = missing.excludes_whiteout(parent, branch)
    dirfd = copydirs.ensure_dir(sb, parent, branch)
    whited = not asked and notation.of(branch).lift(branch, dirfd, name)
    return Target(branch, dirfd, whited, missing is resolve.CLEAR)


def _choose(sb: Superblock, parent: Dir, missing: Missing, is_dir: bool) -> Branch:
    policy = sb.options.create
    if policy.parent_decides:  # most do, and to ask takes longer than to make the file
        top: Branch = parent.layers[0].branch
        limit = parent.floor if missing.whited is None else min(parent.floor, missing.whited)
        if top.writable and not top.offline and top.index <= limit:  # an opaque mark is on no branch above it
            return top
    known = copydirs.facts(sb, parent, None, missing.whited, is_dir, policy.cache_seconds)
    return copydirs.selected(sb, policy, known, parent)


def _check_directory(sb: Superblock, parent: Dir) -> None:
    """Whether anything can be made in a directory, which is up to date then."""
    if sb.options.read_only:
        raise erofs()
    if parent.dead:
        raise enoent()
    if not parent.trusted:
        lookup.refresh(sb, parent)


def check_free(sb: Superblock, parent: Dir, name: bytes) -> Missing:
    """What the search for a name has shown, which must find nothing: EEXIST when the union has it."""
    whiteout.check_new_name(name)
    _check_directory(sb, parent)
    resolve.check_changeable(parent)
    if lookup.only_on(sb, parent, name) == lookup.NOWHERE:
        return resolve.CLEAR
    found = resolve.resolve(sb, parent, name)
    if found.answer is not FOUND:
        return found
    resolve.discard(sb, parent, name, found)
    parent.doubt(name)
    raise os_error(errno.EEXIST)


def _make(
    sb: Superblock, parent: Dir, name: bytes, target: Target, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    if sb.slot is not None:
        sb.slot.intend()  # the name was free: what has it afterwards says the rest
    try:
        return call(*args, **kwargs)
    except BaseException as error:
        if isinstance(error, FileExistsError):
            parent.doubt(name)
        target.give_up(name)
        raise


def _finish(sb: Superblock, parent: Dir, name: bytes, target: Target) -> None:
    if target.whited:
        whiteout.remove(target.dirfd, name)


def _appear(sb: Superblock, parent: Dir, name: bytes, branch: Branch, st: os.stat_result, sent: bool = False) -> Node:
    """The node of an object that was just made; never an old one whose inode number came round again.

    sent: making it has sent one event.
    """
    number = _new_number(sb, st)
    sb.changes.made(parent, name, branch.index, branch if sent else None)
    if name in parent.children or st.st_ino in sb.plinks:
        node, _ = lookup.intern_file(sb, parent, name, branch, st)
    else:
        kind = st_mod.S_IFMT(st.st_mode)
        node = sb.table.add_file(Node(number, kind, branch, st.st_dev, st.st_ino), parent, name)
    sb.changes.updated(parent, name, st)
    return node


def _new_number(sb: Superblock, st: os.stat_result) -> int:
    """Have an object that was just made get a number of its own, whoever had that when the inode was another one."""
    dev, ino = st.st_dev, st.st_ino
    number = sb.inomap.number(dev, ino)
    old = sb.table.find(number)
    if old is None:
        return number
    if old.identity == (dev, ino):
        old.dead = True
        sb.table.changed(old)
    return sb.inomap.fresh(dev, ino)


def create_file(
    sb: Superblock, creds: Credentials, parent: Dir, name: bytes, flags: int, mode: int, caller: Caller
) -> tuple[Node, os.stat_result, int]:
    """open(2) with O_CREAT|O_EXCL; returns node, attributes and the open descriptor."""
    target = prepare(sb, parent, name)
    with creds.creating(caller, mode):
        fd = _make(sb, parent, name, target, syscalls.create_file_at, target.dirfd, name, flags, mode)
    try:
        _finish(sb, parent, name, target)
        st = syscalls.fstat(fd)
        return _appear(sb, parent, name, target.branch, st, sent=True), st, fd
    except BaseException:
        datacalls.close_quietly(fd)
        _undo(target.dirfd, name)
        target.give_up(name)
        raise


def tmpfile(
    sb: Superblock, creds: Credentials, parent: Dir, flags: int, mode: int, caller: Caller
) -> tuple[Node, os.stat_result, int]:
    """open(2) with O_TMPFILE: a file of no name, where one of a name that nothing has would be made.

    Returns node, attributes and the open descriptor, by which alone it is reached until `link` gives it a name. Nothing
    is left of it after a crash. Raises EOPNOTSUPP where the branch's file system has no such files.
    """
    _check_directory(sb, parent)
    branch = _choose(sb, parent, resolve.CLEAR, False)
    dirfd = copydirs.ensure_dir(sb, parent, branch)
    with creds.creating(caller, mode):
        fd = syscalls.open_tmpfile(dirfd, mode, flags)
    try:
        st = syscalls.fstat(fd)
        _new_number(sb, st)
        node = Node(homes.own_number(sb, st), st_mod.S_IFREG, branch, st.st_dev, st.st_ino)
        sb.table.add(node)
    except BaseException:
        datacalls.close_quietly(fd)
        raise
    return node, st, fd


def _undo(dirfd: int, name: bytes) -> None:
    try:
        syscalls.unlink_at(dirfd, name)
    except FileNotFoundError:
        pass


def mknod(
    sb: Superblock, creds: Credentials, parent: Dir, name: bytes, mode: int, rdev: int, caller: Caller
) -> tuple[Node, os.stat_result]:
    target = prepare(sb, parent, name)
    if target.branch.overlay and st_mod.S_ISCHR(mode) and not rdev:
        target.give_up(name)
        raise os_error(errno.EPERM)  # it would be a whiteout (ovl_mknod() in fs/overlayfs/dir.c)
    with creds.creating(caller, mode):
        _make(sb, parent, name, target, syscalls.mknod_at, target.dirfd, name, mode, rdev)
    return _made(sb, parent, name, target, st_mod.S_IFMT(mode))


def symlink(
    sb: Superblock, creds: Credentials, parent: Dir, name: bytes, link_target: bytes, caller: Caller
) -> tuple[Node, os.stat_result]:
    target = prepare(sb, parent, name)
    with creds.creating(caller, 0):
        _make(sb, parent, name, target, syscalls.symlink_at, link_target, target.dirfd, name)
    return _made(sb, parent, name, target, st_mod.S_IFLNK)


def _made(sb: Superblock, parent: Dir, name: bytes, target: Target, kind: int) -> tuple[Node, os.stat_result]:
    """The node of what was just made. EEXIST when it is another object by now, as if that had been there first."""
    try:
        _finish(sb, parent, name, target)
    except BaseException:
        _undo(target.dirfd, name)
        target.give_up(name)
        raise
    try:
        st = syscalls.stat_at(target.dirfd, name)
    except FileNotFoundError:
        st = None
    if st is None or st_mod.S_IFMT(st.st_mode) != kind:
        parent.doubt(name)
        raise os_error(errno.EEXIST)
    return _appear(sb, parent, name, target.branch, st, sent=True), st


def mkdir(
    sb: Superblock, creds: Credentials, parent: Dir, name: bytes, mode: int, caller: Caller
) -> tuple[Dir, os.stat_result]:
    """A directory that replaces a whiteout is made opaque before the whiteout goes (semantics 6.5)."""
    target = prepare(sb, parent, name, is_dir=True)
    with creds.creating(caller, mode):
        _make(sb, parent, name, target, syscalls.mkdir_at, target.dirfd, name, mode)
    return _made_directory(sb, parent, name, target, sent=True)


def _made_directory(
    sb: Superblock, parent: Dir, name: bytes, target: Target, sent: bool = False
) -> tuple[Dir, os.stat_result]:
    """The node of a directory that was just made. sent: making it has sent one event."""
    fd = -1
    marks = notation.of(target.branch)
    found: Found | Missing = resolve.CLEAR
    try:
        if target.whited or sb.options.opaque_always:
            fd = syscalls.open_dir_at(target.dirfd, name)
            marks.make_opaque(target.branch, fd)
        # While it can still be undone: this opens the new directory and what it is merged with.
        if target.alone and fd < 0:
            found = resolve.opened(target.branch, target.dirfd, name)
        else:
            found = resolve.resolve(sb, parent, name)
        if found.answer is not FOUND or found.layers is None:
            raise enoent()
        _finish(sb, parent, name, target)
    except BaseException:
        if found.answer is FOUND:
            resolve.discard(sb, parent, name, found)
        if fd >= 0:
            marks.clear_opaque(fd)
        syscalls.rmdir_at(target.dirfd, name)
        target.give_up(name)
        raise
    finally:
        if fd >= 0:
            os.close(fd)
    top = found.layers[0]
    old = sb.table.find(sb.inomap.number(top.dev, top.ino))
    if old is not None and old is not parent.children.get(name):
        # A directory that has lost its upper part has the number still, and is alive.
        if old.identity == top.identity:
            old.dead = True
            sb.table.changed(old)
        sb.inomap.fresh(top.dev, top.ino)
    hit = tuple(layer.branch.index for layer in found.layers)
    sb.changes.made(parent, name, hit, target.branch if sent else None)
    node, st = lookup.intern(sb, parent, name, found)
    assert type(node) is Dir
    sb.changes.updated(parent, name, None, target.branch is not parent.branch)
    return node, st


def finish(sb: Superblock, parent: Dir, name: bytes, found: Found) -> tuple[Node, os.stat_result]:
    """What is left of making an object where a process was killed that had made it. found: by the name, and ours."""
    dirfd = sb.branch_fd(parent, found.branch)
    target = Target(found.branch, dirfd, whiteout.present(dirfd, name))
    if found.layers is not None:
        resolve.discard(sb, parent, name, found)
        return _made_directory(sb, parent, name, target)
    _finish(sb, parent, name, target)
    sb.changes.made(parent, name, found.branch.index)
    node, st = lookup.intern(sb, parent, name, found)
    sb.changes.updated(parent, name, st)
    return node, st


def finish_link(sb: Superblock, node: Node, parent: Dir, name: bytes) -> os.stat_result:
    """The same of a link, which leads to the node's data."""
    whiteout.remove(sb.branch_fd(parent, node.branch), name)
    if parent.children.get(name) is not node:
        sb.changes.linked(node, parent, name)
    return sb.stat(node)


def link(sb: Superblock, node: Node, parent: Dir, name: bytes) -> os.stat_result:
    """link(2): on the branch of the source's top copy where that is possible (semantics 6.7).

    Raises NeedCopyUp when the source has to be copied first: with pseudo-links only under the new
    name, and then the copy-up is the whole operation.
    """
    whited = check_free(sb, parent, name).whited
    if not node.handles and (node.dead or node.parent is None):
        raise estale()  # the path may lead to another one by now; if not, that is ENOENT
    if node.dead:
        raise enoent()
    branch = node.branch
    limit = parent.floor if whited is None else min(parent.floor, whited)
    if not branch.writable or branch.index > limit:
        if node.parent is None:
            raise os_error(errno.EXDEV)  # it has no name to be copied up by
        if node.plink is not None and node.plink.branch.writable:
            # The home is on a branch that cannot show the new name.
            raise os_error(errno.EXDEV)
        if sb.plink:
            need = NeedCopyUp(node, Trigger.LINK, None, (parent, name), limit)
            need.then = lambda: (node, _finish_link(sb, node, parent, name))
            raise need
        raise NeedCopyUp(node, Trigger.LINK, None, None, limit)
    dirfd = copydirs.ensure_dir_beside(sb, parent, branch)
    fd, owned = sb.open_object(node)
    target = Target(branch, dirfd, notation.of(branch).lift(branch, dirfd, name))
    try:
        if sb.slot is not None:
            sb.slot.intend(2, node.dev, node.ino)
        syscalls.link_fd(fd, dirfd, name)
    except BaseException as error:
        if isinstance(error, FileExistsError):
            parent.doubt(name)
        target.give_up(name)
        raise
    finally:
        if owned:
            os.close(fd)
    try:
        _finish(sb, parent, name, target)
    except BaseException:
        _undo(dirfd, name)
        target.give_up(name)
        raise
    sb.changes.linked(node, parent, name, sent=True)
    return syscalls.stat_at(dirfd, name)


def _finish_link(sb: Superblock, node: Node, parent: Dir, name: bytes) -> os.stat_result:
    """After a copy-up under the new name of a link: the link exists; remove a whiteout that hid the name."""
    whiteout.remove(copydirs.ensure_dir(sb, parent, node.branch), name)
    return sb.stat(node)
