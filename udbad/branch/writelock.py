"""One writer for a branch: an exclusive flock(2) on a directory in its root, for as long as somebody writes to it.

Two mounts that write to one branch would sweep each other's temporary names, take each other's mark of an
unclean end away and copy up over one another. Paths do not show that two mounts share a directory (links, bind
mounts, another mount namespace), and no list of mounts knows those of another run directory. The lock belongs
to an inode of the branch, and it ends with the process that holds it, however that ends.

Whoever can open something can lock it, so it is not the branch's root, which others may read: it is `.wh..wh.orph`,
which aufs has in every writable branch with mode 0700 (`.wh..wh.over` in the notation of overlayfs, where it goes at
the end). Who owns the branch's root can put something of his own in
its place, but his lock on that keeps nobody out: what others can open is replaced. (Ours he cannot bring to another
branch: to move a directory takes permission to write to it, vfs_rename() in fs/namei.c.)

A file system without such locks on directories (NFS: EBADF) is used without one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Final

from udbad.branch import syscalls, whiteout
from udbad.branch.branches import Branch, BranchSet
from udbad.branch.spec import shown
from udbad.errors import ExitCode, UserError

log = logging.getLogger(__name__)

PATIENCE: Final = 3.0
"""Seconds to wait for the mount process that wrote last: `umount` returns before that has ended."""
_PAUSE: Final = 0.02
_SHARED: Final = "is written to by another mount{holder}; two mounts may not write to one branch"

_Identity = tuple[int, int]


class WriteLocks:
    """What one process has locked, by the identity of the directory."""

    def __init__(self) -> None:
        self._fds: dict[_Identity, int] = {}
        self._kept: dict[_Identity, int] = {}

    def take(self, branches: Iterable[Branch], patience: float = PATIENCE) -> None:
        """Lock all that are writable; those locked already stay so. All or none.

        patience: seconds to wait for somebody else's lock, for all branches together. Raises UserError (BRANCH)
        that names the branch and who writes to it.
        """
        end = time.monotonic() + patience
        taken: list[_Identity] = []
        try:
            for branch in branches:
                identity = _identity(branch.root_fd)
                if branch.writable and identity not in self._fds:
                    directory = whiteout.OVERLAY_DIR if branch.overlay else whiteout.ORPHAN_DIR
                    self._fds[identity] = lock(branch.root_fd, branch.path, _SHARED, end, directory)
                    taken.append(identity)
        except BaseException:
            for identity in taken:
                self._release(identity)
            raise

    def take_over(self, held: Iterable[tuple[int, int, int]], branches: BranchSet) -> None:
        """Have the locks of a process that has ended: of each the identity of the branch's root, and a descriptor of
        the same open file (-1: there are no such locks there), owned from here on. Those of branches that do not answer
        are left to the end of the process: releasing one may wait."""
        away = {branch.dev for branch in branches.branches if branch.offline}
        for dev, ino, fd in held:
            (self._kept if dev in away else self._fds)[dev, ino] = fd

    def held(self) -> list[tuple[int, int, int]]:
        """As for `take_over`."""
        return [(*identity, fd) for identity, fd in (self._fds | self._kept).items()]

    def abandon(self, devices: Collection[int]) -> None:
        """Say nothing to the next process of locks on devices (st_dev) that do not answer: they end with the keeper."""
        self._kept = {identity: fd for identity, fd in self._kept.items() if identity[0] not in devices}

    def keep(self, branches: Iterable[Branch]) -> None:
        """Release all but those of the writable ones among `branches`."""
        wanted = {_identity(branch.root_fd) for branch in branches if branch.writable}
        for identity in self._fds.keys() - wanted:
            self._release(identity)

    def close(self) -> None:
        """Release all."""
        self.keep(())

    def _release(self, identity: _Identity) -> None:
        fd = self._fds.pop(identity)
        if fd >= 0:
            os.close(fd)


def lock(root_fd: int, path: bytes, refusal: str, end: float = 0.0, directory: bytes | None = None) -> int:
    """A descriptor that holds the lock of a branch until it is closed; -1 where there are no such locks.

    root_fd: the root of the branch, which gets the directory that is locked. directory: its name, None: by the notation
    of the branch. end: time.monotonic() until which to
    wait. Raises UserError (BRANCH) when somebody else has it: "branch", the path, and `refusal`, with `{holder}` for
    the process.
    """
    made = False
    if directory is None:
        directory = lock_directory(root_fd)
    try:
        while True:
            made = _make(root_fd, directory) or made
            try:
                fd = syscalls.open_listing_at(root_fd, directory)
            except FileNotFoundError:
                continue  # the mount that had it has ended just now
            try:
                locked = _try_lock(fd)
                if not _is_private(os.fstat(fd)) and _replace(root_fd, directory, fd):
                    log.info("branch %s: %s could be opened by others; replaced", shown(path), shown(directory))
                    continue
                if locked and _is_there(root_fd, directory, fd):
                    held, fd = fd, -1
                    return held
                if not locked and time.monotonic() >= end:
                    text = refusal.format(holder=_holder(fd))
                    raise UserError(f"branch {shown(path)} {text}", ExitCode.BRANCH)
            finally:
                if fd >= 0:
                    os.close(fd)
            time.sleep(_PAUSE)
    except OSError as error:
        # Not this module's to judge: a directory that cannot even be opened shows when it is written to.
        log.debug("branch %s cannot be locked: %s", shown(path), error.strerror)
        if made:
            with suppress(OSError):
                syscalls.rmdir_at(root_fd, directory)
        return -1


def lock_directory(root_fd: int) -> bytes:
    """What is to be locked in a branch, by the notation in which a mount writes to it now."""
    overlay = syscalls.exists_at(root_fd, whiteout.OVERLAY_DIR)
    return whiteout.OVERLAY_DIR if overlay else whiteout.ORPHAN_DIR


def _is_there(root_fd: int, directory: bytes, fd: int) -> bool:
    """Whether what was locked is still what others lock: who has the lock may replace it, and may remove it."""
    try:
        return os.path.samestat(os.fstat(fd), syscalls.stat_at(root_fd, directory))
    except FileNotFoundError:
        return False


def _make(root_fd: int, directory: bytes) -> bool:
    """Whether the directory to be locked had to be made."""
    try:
        syscalls.mkdir_at(root_fd, directory, 0o700)
    except FileExistsError:
        return False
    return True


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_private(st: os.stat_result) -> bool:
    """Whether nobody but us and root can open a directory, and so lock it."""
    return st.st_uid in (0, os.geteuid()) and not st.st_mode & 0o066


def _replace(root_fd: int, directory: bytes, bad_fd: int) -> bool:
    """Put a directory that only we can open in the place of one that others can; False where that is not possible.

    Two mounts may do that at the same time: who finds that it has replaced another one's good directory puts it back.
    """
    # A temporary name as in branch/whiteout.py: what is left under it is invisible, and swept.
    name = directory + b"." + os.urandom(6).hex().encode()
    syscalls.mkdir_at(root_fd, name, 0o700)
    try:
        if not _is_private(syscalls.stat_at(root_fd, name)):  # a file system that keeps no owners
            return False
        syscalls.rename_at(root_fd, name, root_fd, directory, syscalls.RENAME_EXCHANGE)
        if not os.path.samestat(os.fstat(bad_fd), syscalls.stat_at(root_fd, name)):
            syscalls.rename_at(root_fd, name, root_fd, directory, syscalls.RENAME_EXCHANGE)
        return True
    finally:
        with suppress(OSError):  # not empty
            syscalls.rmdir_at(root_fd, name)


def _identity(fd: int) -> _Identity:
    st = os.fstat(fd)
    return st.st_dev, st.st_ino


def _holder(fd: int) -> str:
    """` (process 123)` where /proc/locks shows it: not for another pid namespace, and not on btrfs."""
    st = os.fstat(fd)
    place = f"{os.major(st.st_dev):02x}:{os.minor(st.st_dev):02x}:{st.st_ino}"
    try:
        with open("/proc/locks") as file:
            for line in file:
                _, kind, _, _, pid, where, *_ = line.split()
                if kind == "FLOCK" and where == place and int(pid) > 0:
                    return f" (process {pid})"
    except (OSError, ValueError):  # a line of another form, such as that of somebody who waits
        return ""
    return ""
