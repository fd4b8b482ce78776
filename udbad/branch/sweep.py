"""Removing what a crash or a tool has left on a branch, trees of any depth too; directories keep their times.

May not follow a symbolic link or leave the branch through "..".
"""

from __future__ import annotations

import logging
import os
import stat as st_mod
from collections.abc import Callable
from contextlib import closing

from udbad.branch import notation, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.branch.spec import printable
from udbad.branch.walk import READ_DIR, Entries, descend, entries_of, join, objects_in, walk
from udbad.errors import GONE

log = logging.getLogger(__name__)


def sweep_temporaries(
    root_fd: int,
    stopped: Callable[[], bool] = lambda: False,
    atomically: Callable[[Callable[[], None]], None] = lambda call: call(),
    branch: Branch | None = None,
) -> int:
    """Remove stale temporary names and the content of the orphan directory; returns how many objects.

    branch: if it is in the notation of overlayfs, whiteouts that are under way there get their last form, too.

    For a writable branch that was not left in order; it may be in use by this process, whose own temporary names
    stay. Costs a walk through the branch, so the caller asks `was_dirty` first. What cannot be read or removed is
    logged and left: it is invisible in the union. stopped: asked after each listing; once it is true, nothing is
    removed any more. atomically: makes a call while this process changes nothing else, since the times of a
    directory are put back, which must not undo those of another change.
    """
    removed = 0

    def on_error(path: bytes, error: OSError) -> None:
        if error.errno not in GONE:  # somebody has moved or removed it
            log.warning("sweep: %s: %s", printable(path), error.strerror)

    def sweep(directory: bytes, dirfd: int, name: bytes) -> int:
        if stopped():
            return 0
        try:
            if st_mod.S_ISDIR(syscalls.stat_at(dirfd, name).st_mode):
                _empty_tree(dirfd, name)
            atomically(lambda: remove(dirfd, name))
        except OSError as error:
            on_error(join(directory, name), error)
            return 0
        return 1

    def settle(branch: Branch, directory: bytes, dirfd: int, name: bytes) -> None:
        kind, hidden = whiteout.meaning(name)
        if kind is not whiteout.Meaning.WHITEOUT or stopped():
            return
        try:
            atomically(lambda: _settle(branch, dirfd, hidden))
        except OSError as error:
            on_error(join(directory, name), error)

    for directory in (whiteout.ORPHAN_DIR, whiteout.PLINK_DIR):
        doomed = [
            name
            for name, _ in objects_in(root_fd, directory, on_error)
            if directory == whiteout.ORPHAN_DIR or _is_stale(name)
        ]
        if doomed:
            fd = descend(root_fd, [directory])
            try:
                removed += sum(sweep(directory, fd, name) for name in doomed)
            finally:
                os.close(fd)
    with closing(walk(root_fd, on_error)) as directories:
        for directory, fd, entries in directories:
            removed += sum(sweep(directory, fd, name) for name in entries if _is_stale(name))
            if branch is not None and branch.overlay:
                for name in entries:
                    settle(branch, directory, fd, name)
            if stopped():
                break
    return removed


def _settle(branch: Branch, dirfd: int, name: bytes) -> None:
    before = os.fstat(dirfd)
    notation.of(branch).settle(branch, dirfd, name)
    syscalls.restore_times(dirfd, before)


def _is_stale(name: bytes) -> bool:
    return whiteout.is_temporary(name) and not whiteout.is_ours(name)


def remove(dirfd: int, name: bytes) -> None:
    """Remove an object, a directory with all it contains, and put the times of `dirfd` back."""
    before = os.fstat(dirfd)
    if st_mod.S_ISDIR(syscalls.stat_at(dirfd, name).st_mode):
        remove_tree(dirfd, name)
    else:
        syscalls.unlink_at(dirfd, name)
    syscalls.restore_times(dirfd, before)


def remove_tree(dirfd: int, name: bytes) -> None:
    """Remove a directory of any depth with two descriptors: subdirectories are first moved to its top.

    A crash in between leaves a smaller tree of the same name, for the next run.
    """
    _empty_tree(dirfd, name)
    syscalls.rmdir_at(dirfd, name)


def _empty_tree(dirfd: int, name: bytes) -> None:
    top = os.open(name, READ_DIR, dir_fd=dirfd)
    try:
        fresh = 0
        while entries := entries_of(top):
            for child in _unlink_files(top, entries):
                fd = os.open(child, READ_DIR, dir_fd=top)
                try:
                    for grandchild in _unlink_files(fd, entries_of(fd)):
                        while syscalls.exists_at(top, b"%d" % fresh):
                            fresh += 1
                        syscalls.rename_at(fd, grandchild, top, b"%d" % fresh)
                finally:
                    os.close(fd)
                syscalls.rmdir_at(top, child)
    finally:
        os.close(top)


def _unlink_files(dirfd: int, entries: Entries) -> list[bytes]:
    """Unlink all that is not a directory; the names of the directories."""
    directories = []
    for name, entry in entries.items():
        if entry.is_dir(follow_symlinks=False):
            directories.append(name)
        else:
            syscalls.unlink_at(dirfd, name)
    return directories
