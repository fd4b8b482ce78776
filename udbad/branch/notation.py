"""How whiteouts and opaque marks are written: the notation of aufs, or that of overlayfs.

In both of them `.wh.NAME` is a whiteout, beside which NAME stays visible; so every change of the namespace is made in
one way, whatever a crash leaves of it: the whiteout before NAME goes, NAME before the whiteout does. With aufs that is
all. In the notation of overlayfs a device 0/0 in the place of NAME is what is left in the end, and `.wh.NAME` what is
under way:

    hide      before NAME goes: `.wh.NAME` beside it; where it is on a lower branch only, the device at once
    settle    after it has gone: the device in the place of `.wh.NAME`
    lift      before NAME is made: `.wh.NAME` in the place of the device
    whiteout.remove   afterwards

Where the file system refuses devices, `.wh.NAME` stays, which fuse-overlayfs reads as well (overlayfs does not).
`settle` is also what ends a change that was not gone through with, and what the sweep does with whatever a crash has
left: it puts the whiteout into its last form, whatever has become of NAME.

Which notation a branch is written in says `Branch.overlay`: of the writable ones, what the mount's option says.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from abc import ABC, abstractmethod
from typing import Final

from udbad.branch import listing, redirect, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.errors import ABSENT

_NO_DEVICE: Final = frozenset({errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""mknod(2) of a device 0/0 where there may be none. Since Linux 5.8 it takes no capability (vfs_mknod())."""
_NO_ATTRIBUTE: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP})
_TRACES: Final = (b"trusted.overlay.", b"user.overlay.", b"user.fuseoverlayfs.")
"""Attributes that overlayfs and fuse-overlayfs give a layer's directories."""
_WRITTEN: Final = whiteout.OVERLAY_OPAQUE[:2]
"""The mark of an opaque directory, the first one that may be set: overlayfs reads the second one with `userxattr`, as
it is mounted in a user namespace; fuse-overlayfs reads both (is_directory_opaque() in its main.c)."""
_DEVICE: Final = st_mod.S_IFCHR >> 12


class Notation(ABC):
    """The marks of one branch directory, given by descriptor."""

    @abstractmethod
    def hide(self, branch: Branch, dirfd: int, name: bytes, beside: bool) -> bool:
        """Hide `name` on lower branches; False when it is hidden already. beside: this one has it, and it is removed
        next; then `settle` is due."""

    @abstractmethod
    def settle(self, branch: Branch, dirfd: int, name: bytes) -> None:
        """Put the whiteout of `name`, if there is one, into its last form; beside the name none is needed."""

    @abstractmethod
    def lift(self, branch: Branch, dirfd: int, name: bytes) -> bool:
        """Whether `name`, which this branch does not have, is hidden; if so by `.wh.NAME`, so that it can be made."""

    @abstractmethod
    def uncover(self, dirfd: int, name: bytes) -> None:
        """Remove the whiteout of `name`, in whatever form it has."""

    @abstractmethod
    def make_opaque(self, branch: Branch, dirfd: int) -> None:
        """Hide everything that same-named directories on lower branches contain."""

    @abstractmethod
    def clear_opaque(self, dirfd: int) -> None:
        """Undo `make_opaque`; nothing if it is not."""


class _Aufs(Notation):
    def hide(self, branch: Branch, dirfd: int, name: bytes, beside: bool) -> bool:
        return _mark(branch, dirfd, whiteout.PREFIX + name)

    def settle(self, branch: Branch, dirfd: int, name: bytes) -> None:
        pass

    def lift(self, branch: Branch, dirfd: int, name: bytes) -> bool:
        return whiteout.present(dirfd, name)

    def uncover(self, dirfd: int, name: bytes) -> None:
        whiteout.remove(dirfd, name)

    def make_opaque(self, branch: Branch, dirfd: int) -> None:
        _mark(branch, dirfd, whiteout.OPAQUE)

    def clear_opaque(self, dirfd: int) -> None:
        _unlink(dirfd, whiteout.OPAQUE)


class _Overlay(Notation):
    def hide(self, branch: Branch, dirfd: int, name: bytes, beside: bool) -> bool:
        made = None if beside else _make_device(dirfd, name)
        if made:
            return True
        if made is None and whiteout.is_device_at(dirfd, name):
            return False
        return _make_file(dirfd, whiteout.PREFIX + name)

    def settle(self, branch: Branch, dirfd: int, name: bytes) -> None:
        if not whiteout.present(dirfd, name):
            return
        made = _make_device(dirfd, name)
        if made is False:
            return
        if made is None:
            mode = syscalls.mode_at(dirfd, name)
            if st_mod.S_ISDIR(mode):
                # Made in the place of a whiteout, it may lack its mark; one that was to be removed shows nothing below.
                # A redirect counts before a whiteout beside it does, and was written before that.
                fd = syscalls.open_dir_at(dirfd, name)
                try:
                    if not syscalls.has_xattr(syscalls.proc_path(fd), redirect.key()):
                        self.make_opaque(branch, fd)
                finally:
                    os.close(fd)
        whiteout.remove(dirfd, name)

    def lift(self, branch: Branch, dirfd: int, name: bytes) -> bool:
        if not whiteout.is_device_at(dirfd, name):
            return whiteout.present(dirfd, name)
        _make_file(dirfd, whiteout.PREFIX + name)
        syscalls.unlink_at(dirfd, name)
        return True

    def uncover(self, dirfd: int, name: bytes) -> None:
        whiteout.remove(dirfd, name)
        if whiteout.is_device_at(dirfd, name):
            syscalls.unlink_at(dirfd, name)

    def make_opaque(self, branch: Branch, dirfd: int) -> None:
        for key in _WRITTEN:
            try:
                syscalls.setxattr(syscalls.proc_path(dirfd), key, whiteout.OPAQUE_VALUE)
            except OSError as error:
                if error.errno not in _NO_ATTRIBUTE:
                    raise
            else:
                return
        _make_file(dirfd, whiteout.OPAQUE)

    def clear_opaque(self, dirfd: int) -> None:
        for key in whiteout.OVERLAY_OPAQUE:
            try:
                syscalls.removexattr(syscalls.proc_path(dirfd), key)
            except OSError as error:
                if error.errno not in (errno.ENODATA, *_NO_ATTRIBUTE):
                    raise
        _unlink(dirfd, whiteout.OPAQUE)


AUFS: Final[Notation] = _Aufs()
OVERLAY: Final[Notation] = _Overlay()


def of(branch: Branch) -> Notation:
    """The notation that a branch is written in."""
    return OVERLAY if branch.overlay else AUFS


def is_overlay(root_fd: int) -> bool:
    """Whether the root of a branch, which is to be written to, shows that overlayfs or the like has written to it.

    A root that shows nothing is taken for one of aufs: to know better would take a walk through all of the branch.
    """
    if syscalls.exists_at(root_fd, whiteout.OVERLAY_DIR):
        return True
    if not whiteout.unmarked(root_fd):
        return False
    try:
        if any(key.startswith(_TRACES) for key in syscalls.listxattr(syscalls.proc_path(root_fd))):
            return True
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    fd = syscalls.open_listing(root_fd)
    try:
        names, _, types = listing.read(fd)
    finally:
        os.close(fd)
    devices = (name for name, kind in zip(names, types, strict=True) if kind == _DEVICE)
    return any(whiteout.is_device_at(root_fd, name) for name in devices)


def _make_device(dirfd: int, name: bytes) -> bool | None:
    """True: made; None: something has the name; False: there may be none here."""
    try:
        syscalls.mknod_at(dirfd, name, st_mod.S_IFCHR, 0)
    except FileExistsError:
        return None
    except OSError as error:
        if error.errno not in _NO_DEVICE:
            raise
        return False
    return True


def _mark(branch: Branch, dirfd: int, mark: bytes) -> bool:
    """A hard link to the branch's base file where possible: it costs no inode (semantics 6.2)."""
    if "nolwh" not in branch.attrs:
        try:
            syscalls.link_at(branch.root_fd, whiteout.BASE, dirfd, mark)
        except FileExistsError:
            return False
        except OSError as error:
            # No base file (somebody removed it), too many links on it, or another subvolume: any
            # empty file does as well.
            if error.errno not in (errno.ENOENT, errno.EMLINK, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP):
                raise
        else:
            return True
    return _make_file(dirfd, mark)


def _make_file(dirfd: int, mark: bytes) -> bool:
    try:
        os.close(syscalls.create_file_at(dirfd, mark, os.O_WRONLY, 0o444))
    except FileExistsError:
        return False
    return True


def _unlink(dirfd: int, name: bytes) -> None:
    try:
        syscalls.unlink_at(dirfd, name)
    except OSError as error:
        if error.errno not in ABSENT:
            raise
