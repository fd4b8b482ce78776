"""Carrying objects from one branch down to the one below it: what mvdown and sync are made of.

Copying and moving are apart, because a copy on the lower branch is invisible while the upper object covers it:

    transfer   any thread: the copy is made under a temporary name of the lower directory, unless what is
               there already has the same content and attributes
    publish    event loop: the copy gets its name, if the upper object still is what was copied
    durable    any thread: the lower file system is synced (a file on a network or FUSE file system when it is copied)
    uncover    event loop: the upper object goes, if neither it nor the copy has changed since

Whatever happens between the steps, a crash included, the name shows the upper object or an equal lower
one. A temporary name is the only thing that can be left, and the next mount sweeps it. What programs do
through the mount runs on the event loop too, so it falls before a step or after it; what they do directly
on the branches is noticed by the time stamps, and a file that somebody holds open for writing is not moved.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from udbad.branch import compare, copydata, notation, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.branch.origin import Place
from udbad.branch.state import ObjectStamp, is_racy, object_stamp, same_content, stamp
from udbad.errors import estale
from udbad.inodes.handles import backing_id
from udbad.inodes.node import Dir, Node
from udbad.union import copydirs, homes, lookup, resolve
from udbad.union.resolve import Answer
from udbad.union.superblock import Superblock

_PATIENCE: Final = 60
_TICK: Final = 0.05  # seconds

Work = Callable[[], None]
"""What a thread has to do; it raises OSError."""


class Halt:
    """A request to stop, for whoever works in a thread."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked


class Changed(Exception):
    """Somebody changed an object between two steps, or uses it so that it has to stay; the text says how."""


class InUse(Changed):
    """It has to stay as long as somebody uses it so; trying again at once is no use."""


@dataclass(slots=True)
class Copy:
    """One object that is not a directory, on its way down.

    source, target: the branches it is on, and goes to. src_dirfd, dst_dirfd: the two branch directories, owned
    by the caller; name: in both. st: the source as it was copied; tmp: the finished copy, b"" when what is there is as
    good; made: the stamp of the lower object once published.
    """

    source: Branch
    target: Branch
    src_dirfd: int
    dst_dirfd: int
    name: bytes
    st: os.stat_result | None = None
    tmp: bytes = b""
    made: ObjectStamp | None = None


def transfer(
    copy: Copy, cancelled: Callable[[], bool] | None = None, progress: Callable[[int], None] | None = None
) -> os.stat_result:
    """Make the copy. Any thread. Raises OSError: ENOENT when the source is gone, ECANCELED; no temporary is left then.

    progress: called with the offset reached in bytes. Returns the status of the source.
    """
    st = copy.st = _stat_when_not_racy(copy)
    if _is_equal(copy):
        return st
    tmp = whiteout.temporary_name(copy.name)
    if not st_mod.S_ISREG(st.st_mode):
        os.close(copydata.copy_special(st, copy.src_dirfd, copy.name, copy.dst_dirfd, tmp, copy.target.copying))
        copy.tmp = tmp
        return st
    src_fd, now = syscalls.open_file_at(copy.src_dirfd, copy.name, os.O_RDONLY)
    try:
        if object_stamp(now) != object_stamp(st):
            raise estale()
        dst_fd = syscalls.create_file_at(copy.dst_dirfd, tmp, os.O_RDWR, 0o600)
        copy.tmp = tmp
        try:
            copydata.copy_contents(src_fd, dst_fd, None, progress, cancelled)
            copydata.copy_metadata(
                st, syscalls.proc_path(src_fd), syscalls.proc_path(dst_fd), copy.target.copying, follow_symlinks=True
            )
            if not copy.target.local:
                os.fsync(dst_fd)  # what is synced later as a whole may be no more than our side of it
        finally:
            os.close(dst_fd)
    except BaseException:
        discard(copy)
        raise
    finally:
        os.close(src_fd)
    return st


def _stat_when_not_racy(copy: Copy) -> os.stat_result:
    """The status of the source, so old that a change from now on shows in it. ESTALE when it changes all the time."""
    for _ in range(_PATIENCE):
        st = syscalls.stat_at(copy.src_dirfd, copy.name)
        if not is_racy(copy.source, st):
            return st
        time.sleep(_TICK)
    raise estale()


def _is_equal(copy: Copy) -> bool:
    try:
        return not compare.differences(copy.src_dirfd, copy.name, copy.dst_dirfd, copy.name)
    except FileNotFoundError:
        return False


def discard(copy: Copy) -> None:
    """Remove the temporary of a copy that is not going to be published; harmless afterwards."""
    if copy.tmp:
        tmp, copy.tmp = copy.tmp, b""
        try:
            syscalls.unlink_at(copy.dst_dirfd, tmp)
        except FileNotFoundError:
            pass


def publish(copy: Copy) -> tuple[int, bytes] | None:
    """Give the copy its name; returns a directory that was there, out of sight by now, for the caller to remove.

    Raises Changed when the source is not what was copied, OSError; the temporary is gone then.
    """
    assert copy.st is not None
    try:
        if object_stamp(_stat(copy.src_dirfd, copy.name)) != object_stamp(copy.st):
            raise Changed("changed while it was copied")
        old = None
        if copy.tmp:
            old = displace_directory(copy.dst_dirfd, copy.name)
            syscalls.rename_at(copy.dst_dirfd, copy.tmp, copy.dst_dirfd, copy.name)
            copy.tmp = b""
        # Only now: together with the upper object, NAME hides all that the whiteout did.
        whiteout.remove(copy.dst_dirfd, copy.name)
        copy.made = object_stamp(syscalls.stat_at(copy.dst_dirfd, copy.name))
        return old
    finally:
        discard(copy)


def _stat(dirfd: int, name: bytes) -> os.stat_result:
    try:
        return syscalls.stat_at(dirfd, name)
    except FileNotFoundError:
        raise Changed("removed meanwhile") from None


def displace_directory(dirfd: int, name: bytes) -> tuple[int, bytes] | None:
    """Take a directory that nobody sees out of the way of its name: (dirfd, temporary name), None without one."""
    try:
        if not st_mod.S_ISDIR(syscalls.stat_at(dirfd, name).st_mode):
            return None
    except FileNotFoundError:
        return None
    tmp = whiteout.temporary_name(name)
    syscalls.rename_at(dirfd, name, dirfd, tmp)
    return dirfd, tmp


# -- the upper object goes ----------------------------------------------------------------------------


def uncover(sb: Superblock, parent: Dir | None, copy: Copy, target: Branch) -> None:
    """Remove the upper object, so that its published copy shows. For an object with one name.

    parent: the directory in the union, None when the branch directories are hidden there by something above.
    Raises Changed, and then everything is as before; OSError.
    """
    uncover_names(sb, [(parent, copy)], target)


def uncover_names(sb: Superblock, names: Sequence[tuple[Dir | None, Copy]], target: Branch) -> None:
    """`uncover` for all names of one file at once, so that the file stays one. Their copies are links to one file."""
    first = names[0][1]
    assert first.st is not None
    for _, copy in names:
        _check(copy)
    if homes.is_copied(sb, Place(first.src_dirfd, first.name, first.st), first.source):
        raise InUse("leads to a pseudo-link on a branch above, as long as it is here")
    node = _known(sb, (first.st.st_dev, first.st.st_ino))
    if node is not None:
        if node.busy is not None:
            raise InUse("is being copied up")
        if any(handle.writable for handle in node.handles or ()):
            raise InUse("is open for writing")
        if backing_id(node):
            raise InUse("is open, and the kernel uses it where it is (io=passthrough)")
    rest = [copy for _, copy in names]
    fd = -1
    try:
        if st_mod.S_ISREG(first.st.st_mode):
            if node is not None and node.handles:
                fd, _ = syscalls.open_file_at(first.dst_dirfd, first.name, os.O_RDONLY)
            _hide(first)  # whoever opens a file directly from now on gets the lower one
            del rest[0]
        for copy in rest:
            _remove(copy)
        st = syscalls.stat_at(first.dst_dirfd, first.name)
        places = [(parent, copy.name) for parent, copy in names if parent is not None]
        _settle(sb, node, places, first.st, st, target, fd)
    finally:
        if fd >= 0:
            os.close(fd)


def _check(copy: Copy) -> None:
    assert copy.st is not None
    if object_stamp(_stat(copy.src_dirfd, copy.name)) != object_stamp(copy.st):
        raise Changed("changed after it was copied")
    if object_stamp(_stat(copy.dst_dirfd, copy.name)) != copy.made:
        raise Changed("the copy was changed directly")


def _known(sb: Superblock, identity: tuple[int, int]) -> Node | None:
    node = sb.table.find(sb.inomap.number(*identity))
    return node if node is not None and node.identity == identity and not node.dead else None


def _hide(copy: Copy) -> None:
    """Put the upper file under a temporary name, which makes the copy show, and see that nobody writes to it.

    After the renaming nobody can open it any more, so what is asked now stays true.
    """
    assert copy.st is not None
    before = os.fstat(copy.src_dirfd)
    whiteout.remove(copy.src_dirfd, copy.name)  # beside the object it hides nothing; without it, the copy
    tmp = whiteout.temporary_name(copy.name)
    syscalls.rename_at(copy.src_dirfd, copy.name, copy.src_dirfd, tmp)
    try:
        now = syscalls.stat_at(copy.src_dirfd, tmp)
        if not same_content(stamp(now), stamp(copy.st)):
            raise Changed("changed after it was copied")
        if syscalls.is_being_written(copy.src_dirfd, tmp):
            raise InUse("is open for writing")
    except BaseException:
        syscalls.rename_at(copy.src_dirfd, tmp, copy.src_dirfd, copy.name, syscalls.RENAME_NOREPLACE)
        syscalls.restore_times(copy.src_dirfd, before)
        raise
    syscalls.unlink_at(copy.src_dirfd, tmp)
    syscalls.restore_times(copy.src_dirfd, before)


def _remove(copy: Copy) -> None:
    before = os.fstat(copy.src_dirfd)
    whiteout.remove(copy.src_dirfd, copy.name)
    syscalls.unlink_at(copy.src_dirfd, copy.name)
    syscalls.restore_times(copy.src_dirfd, before)


def _settle(
    sb: Superblock, node: Node | None, names: Iterable[tuple[Dir, bytes]], old: os.stat_result, new: os.stat_result,
    branch: Branch, fd: int,
) -> None:  # fmt: skip
    """The lower copy shows: from now on the node's data is there, under the number it always had.

    fd: a descriptor of it, where the node has open files.
    """
    number = sb.inomap.number(old.st_dev, old.st_ino)
    other = _known(sb, (new.st_dev, new.st_ino))
    sb.inomap.drop(old.st_dev, old.st_ino)
    if other is None:
        sb.inomap.alias(new.st_dev, new.st_ino, number)
    for parent, name in names:
        if parent.view is not None:
            update_view(sb, parent, name)
        if other is not None and node is not None:
            # The copy is a further name of a file that is known already: who asks next is led to that one, who has
            # the old one open keeps it.
            sb.changes.lost(node, parent, name)
        sb.changes.behind(parent, True)
    if node is None or other is not None:
        return
    sb.move_data(node, branch, new, fd)
    sb.changes.behind(node)


# -- directories and whiteouts ------------------------------------------------------------------------


def uncover_directory(
    sb: Superblock, parent: Dir | None, src_dirfd: int, dst_dirfd: int, name: bytes, ignore: frozenset[str]
) -> bool:
    """Remove an upper directory in which nothing is left, so that the lower one alone shows; False when something is.

    The lower one gets its attributes. ignore: attributes of the target branch. Raises OSError.
    """
    before = os.fstat(src_dirfd)
    fd = syscalls.open_dir_at(src_dirfd, name)
    try:
        if not copydirs.is_empty(fd):
            return False
        lower = syscalls.open_dir_at(dst_dirfd, name)
        try:
            st = os.fstat(fd)
            copydata.copy_metadata(st, syscalls.proc_path(fd), syscalls.proc_path(lower), ignore, follow_symlinks=True)
            new = os.fstat(lower)
        finally:
            os.close(lower)
        try:
            syscalls.rmdir_at(src_dirfd, name)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            return False  # a direct change was faster
        syscalls.restore_times(src_dirfd, before)
    finally:
        os.close(fd)
    number = sb.inomap.number(st.st_dev, st.st_ino)
    node = _known(sb, (st.st_dev, st.st_ino))
    sb.inomap.drop(st.st_dev, st.st_ino)
    sb.inomap.alias(new.st_dev, new.st_ino, number)
    if parent is not None:
        lookup.update(sb, parent, name, resolve.resolve(sb, parent, name))
        sb.changes.behind(parent, True)
        if node is not None:
            sb.changes.behind(node, True)
    return True


def update_view(sb: Superblock, parent: Dir, name: bytes) -> None:
    """As lookup.update, for a name that is no directory and whose node is brought up to date otherwise."""
    found = resolve.resolve(sb, parent, name)
    lookup.remember(parent, name, found)
    if found.answer is Answer.FOUND:
        resolve.discard(sb, parent, name, found)


def release(sb: Superblock, parts: Sequence[bytes]) -> None:
    """Let go of a directory that was looked up here and that the kernel does not know."""
    node: Node | None = sb.root
    for part in parts:
        node = node.children.get(part) if type(node) is Dir else None
    if node is not None:
        sb.table.forget(node.id, 0)


def uncover_whiteout(src: Branch, src_dirfd: int, name: bytes) -> None:
    """Remove an upper whiteout below which nothing is left to hide."""
    before = os.fstat(src_dirfd)
    notation.of(src).uncover(src_dirfd, name)
    syscalls.restore_times(src_dirfd, before)


def visible(sb: Superblock, parts: Sequence[bytes], src: Branch, src_fd: int, dst: Branch, dst_fd: int) -> Dir | None:
    """The directory of the union at a path, as far as these two branch directories are merged in it.

    None when something above hides them. Raises Changed when they are not what is merged there.
    """
    node = find(sb, parts)
    if type(node) is not Dir:
        return None
    if not node.trusted:
        lookup.refresh(sb, node)
    upper, lower = node.layer(src.index), node.layer(dst.index)
    if upper is None and lower is None:
        return None
    for layer, fd in ((upper, src_fd), (lower, dst_fd)):
        st = os.fstat(fd)
        if layer is None or layer.identity != (st.st_dev, st.st_ino):
            raise Changed("the directory was changed meanwhile")
    return node


def find(sb: Superblock, parts: Sequence[bytes]) -> Node | None:
    """The node of a path; None where the union has none."""
    node: Node = sb.root
    for part in parts:
        if type(node) is not Dir:
            return None
        found = lookup.lookup(sb, node, part)
        if found is None:
            return None
        node = found[0]
    return node
