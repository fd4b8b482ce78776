"""Rewriting a branch from one notation of whiteouts to the other, offline.

Each step leaves a branch that shows the same tree: what is there of both notations counts as long as `.wh..wh.over` is
in the root, which is made first and goes last. Each may be done twice. So whatever kills this, the next run goes on.
Directories keep owner and times. What would not mean the same in the other notation is found before that.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from typing import Final

from udbad.branch import notation, redirect, syscalls, whiteout, writelock
from udbad.branch.branches import Branch
from udbad.branch.dirtymark import was_dirty
from udbad.branch.spec import printable
from udbad.branch.walk import Entries, give_up, join, objects_in, open_branch, walk
from udbad.errors import ExitCode, UserError, os_error
from udbad.types import Perm

NOTATIONS: Final = ("aufs", "overlay")
_LONGEST: Final = whiteout.NAME_MAX - len(whiteout.PREFIX)
_IN_USE: Final = "is written to by a mount{holder}; unmount it first"


def convert(path: bytes, source: str, target: str, report: Callable[[int, int], None]) -> int:
    """Rewrite the branch at `path`; returns how many marks were.

    source, target: of NOTATIONS, different. report: told how many directories are done, and how many there are.
    Raises UserError: BRANCH for what is no directory, in use, dirty, or in the other notation; REFUSED for what the
    other notation cannot say. OSError: what has been done by then is right, and the next call goes on.
    """
    overlay = target == "overlay"
    root_fd = open_branch(path)
    with ExitStack() as stack:
        stack.callback(os.close, root_fd)
        if was_dirty(root_fd):
            raise _refused(path, "was not unmounted cleanly, or is mounted now: mount and unmount it first")
        if not overlay and not whiteout.unmarked(root_fd):
            raise _refused(path, "is in the notation of aufs already")
        begun = syscalls.exists_at(root_fd, whiteout.OVERLAY_DIR)
        end = time.monotonic() + writelock.PATIENCE
        if syscalls.exists_at(root_fd, whiteout.ORPHAN_DIR):
            _hold(stack, writelock.lock(root_fd, path, _IN_USE, end, whiteout.ORPHAN_DIR))
        before = os.fstat(root_fd)
        count = _checked(root_fd, path, overlay, begun)
        _hold(stack, writelock.lock(root_fd, path, _IN_USE, end, whiteout.OVERLAY_DIR))
        branch = Branch(
            0, 0, path, Perm.RW, frozenset(), None,
            root_fd=root_fd, anchor_fd=-1, dev=0, fs_type="", writes_overlay=overlay,
        )  # fmt: skip
        done = marks = 0
        if not overlay:
            with suppress(FileExistsError):
                os.close(syscalls.create_file_at(root_fd, whiteout.BASE, os.O_WRONLY, 0o444))
        with closing(walk(root_fd, give_up)) as directories:
            for _, fd, entries in directories:
                times = os.fstat(fd)
                made = _to_overlay(branch, fd, entries) if overlay else _to_aufs(branch, fd, entries)
                if made:
                    syscalls.restore_times(fd, times)
                marks += made
                done += 1
                report(done, count)
        if overlay:
            _remove_administrative(root_fd)
        syscalls.rmdir_at(root_fd, whiteout.OVERLAY_DIR)
        syscalls.restore_times(root_fd, before)
    return marks


def _refused(path: bytes, text: str) -> UserError:
    return UserError(f"branch {printable(path)} {text}", ExitCode.BRANCH)


def _hold(stack: ExitStack, fd: int) -> None:
    if fd >= 0:
        stack.callback(os.close, fd)


def _checked(root_fd: int, path: bytes, overlay: bool, begun: bool) -> int:
    """How many directories there are. begun: a run was, so that there are marks of both. Raises UserError (REFUSED)."""

    def refuse(name: bytes, text: str) -> UserError:
        return UserError(f"{printable(join(path, name))}: {text}", ExitCode.REFUSED)

    for name, st in objects_in(root_fd, whiteout.PLINK_DIR, give_up) if overlay else ():
        if st.st_nlink == 1 and not whiteout.is_temporary(name):
            place = join(whiteout.PLINK_DIR, name)
            raise refuse(place, "names on lower branches show it, which overlayfs has no word for: copy them up first")
    count = 0
    with closing(walk(root_fd, give_up)) as directories:
        for directory, fd, entries in directories:
            count += 1
            for name, entry in entries.items():
                if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False):
                    continue
                if not whiteout.is_device_at(fd, name):
                    continue
                if overlay and not begun:
                    raise refuse(join(directory, name), "a device 0/0, which would be a whiteout")
                if len(name) > _LONGEST:
                    raise refuse(join(directory, name), f"its whiteout would have more than {whiteout.NAME_MAX} bytes")
    return count


def _to_overlay(branch: Branch, dirfd: int, entries: Entries) -> int:
    made = 0
    for name in entries:
        kind, hidden = whiteout.meaning(name)
        if kind is whiteout.Meaning.WHITEOUT:
            notation.OVERLAY.settle(branch, dirfd, hidden)
            made += 1
        elif kind is whiteout.Meaning.OPAQUE:
            notation.OVERLAY.make_opaque(branch, dirfd)
            if whiteout.overlay_opaque(dirfd):  # else the file is all that there can be
                syscalls.unlink_at(dirfd, name)
            made += 1
    return made


def _to_aufs(branch: Branch, dirfd: int, entries: Entries) -> int:
    made = 0
    if whiteout.overlay_opaque(dirfd):
        notation.AUFS.make_opaque(branch, dirfd)
        for key in whiteout.OVERLAY_OPAQUE:
            try:
                syscalls.removexattr(syscalls.proc_path(dirfd), key)
            except OSError as error:
                if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                    raise
        made += 1
    if syscalls.has_xattr(syscalls.proc_path(dirfd), redirect.key()):
        with suppress(FileExistsError):
            os.close(syscalls.create_file_at(branch.root_fd, redirect.MARK, os.O_WRONLY, 0o444))
    for name, entry in entries.items():
        if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False):
            continue
        if whiteout.is_device_at(dirfd, name):
            notation.AUFS.hide(branch, dirfd, name, beside=True)
            syscalls.unlink_at(dirfd, name)
            made += 1
    return made


def _remove_administrative(root_fd: int) -> None:
    """What aufs keeps in a root, and overlayfs would show. Of pseudo-links none is the only name of a file."""
    for directory in (whiteout.PLINK_DIR, whiteout.ORPHAN_DIR):
        try:
            fd = syscalls.open_dir_at(root_fd, directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            listing = syscalls.open_listing(fd)
            try:
                names = os.listdir(listing)
            finally:
                os.close(listing)
            for name in map(os.fsencode, names):
                if st_mod.S_ISDIR(syscalls.mode_at(fd, name)):
                    raise os_error(errno.ENOTEMPTY)
                syscalls.unlink_at(fd, name)
        finally:
            os.close(fd)
        syscalls.rmdir_at(root_fd, directory)
    for mark in (whiteout.BASE, redirect.MARK):
        with suppress(FileNotFoundError):
            syscalls.unlink_at(root_fd, mark)
