"""The mark on a branch that is written to: what a mount did not leave in order, the next one sweeps (sweep.py)."""

from __future__ import annotations

import errno
import logging
import os
import stat as st_mod
from contextlib import suppress
from typing import Final

from udbad.branch import syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.branch.spec import shown
from udbad.errors import ExitCode, UserError

log = logging.getLogger(__name__)

DIRTY_MARK: Final = whiteout.RESERVED + b"udbad"
"""Exists in the root of a writable branch from mount to clean unmount; the prefix hides it."""


def begin_writing(branch: Branch, durable: bool = False) -> bool:
    """Mark a branch dirty; True when it was so already, and is to be swept. durable: whoever has marked it has waited
    until that was on the disk.

    Raises UserError (BRANCH): the mark cannot be made, or its name is taken by something else.
    """
    try:
        _check_notation(branch)
        left = was_dirty(branch.root_fd)
        if not (left and durable):
            mark_dirty(branch.root_fd)
    except OSError as error:
        text = f"branch {shown(branch.path)} cannot be made writable: {error.strerror}"
        raise UserError(text, ExitCode.BRANCH) from None
    return left


def end_writing(branch: Branch) -> None:
    """Mark a branch clean. One that cannot be, read-only by now for instance, is swept by the next mount: one line."""
    try:
        mark_clean(branch.root_fd)
        if branch.overlay:
            # The last thing: without it, what else is there would be taken for that of a branch of aufs.
            with suppress(FileNotFoundError):
                syscalls.rmdir_at(branch.root_fd, whiteout.OVERLAY_DIR)
    except OSError as error:
        log.warning("branch %s: %s cannot be removed: %s", shown(branch.path), os.fsdecode(DIRTY_MARK), error.strerror)


def _check_notation(branch: Branch) -> None:
    """Two mounts may have come at the same time, and agree on one thing only, that nobody has a lock: each has made
    what it locks before it looks here. Raises UserError (BRANCH)."""
    if branch.overlay != syscalls.exists_at(branch.root_fd, whiteout.OVERLAY_DIR) and branch.writable:
        text = f"branch {shown(branch.path)} is written to by another mount, in another notation of whiteouts"
        raise UserError(text, ExitCode.BRANCH)


def mark_dirty(root_fd: int) -> None:
    """Note durably that the branch is being written to; to be called before the first change.

    Raises OSError; EEXIST when the mark's name is taken by something that is no regular file.
    """
    try:
        fd = syscalls.create_file_at(root_fd, DIRTY_MARK, os.O_WRONLY, 0o444)
    except FileExistsError as error:
        # Left by a mount that was killed, perhaps before it was durable; or not ours: mark_clean could not remove it.
        if not st_mod.S_ISREG(syscalls.stat_at(root_fd, DIRTY_MARK).st_mode):
            error.strerror = f"{os.fsdecode(DIRTY_MARK)} exists and is not a regular file"
            raise
    else:
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    _sync_directory(root_fd)


def was_dirty(root_fd: int) -> bool:
    """Whether the last mount that wrote to this branch did not end with `mark_clean`."""
    return syscalls.exists_at(root_fd, DIRTY_MARK)


def mark_clean(root_fd: int) -> None:
    """Take the mark of `mark_dirty` away, durably; no mark is fine. To be called after the last change."""
    try:
        syscalls.unlink_at(root_fd, DIRTY_MARK)
    except FileNotFoundError:
        return
    _sync_directory(root_fd)


def _sync_directory(dirfd: int) -> None:
    fd = syscalls.open_listing(dirfd)
    try:
        os.fsync(fd)
    except OSError as error:
        # fsync(2): EINVAL where the file system has no such thing for directories.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)
