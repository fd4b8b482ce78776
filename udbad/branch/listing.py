"""What is done once for a directory of a branch, when it is read or watched: getdents64(2), inotify_add_watch(2)."""

from __future__ import annotations

import ctypes
import os
import stat as st_mod
import sys

from udbad import compiled
from udbad.branch import syscalls

_AS_BYTES = (sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())  # os.fsencode() asks each time

Kind = tuple[int, int, int]
"""What a directory says of a name in it: st_dev (its own), inode number, S_IFMT bits."""


def read(fd: int, dev: int) -> tuple[list[bytes], list[Kind]]:
    """All names of a directory that is open for reading, `.` and `..` left out, and what it says of each.

    dev: its st_dev. The type is 0 of what a file system does not say it of, and has gone meanwhile. Raises OSError.
    """
    names: list[bytes] = []
    kinds: list[Kind] = []
    with os.scandir(fd) as entries:
        for entry in entries:
            name = entry.name.encode(*_AS_BYTES)
            names.append(name)
            kinds.append((dev, entry.inode(), _type(fd, name, entry)))
    return names, kinds


def _type(fd: int, name: bytes, entry: os.DirEntry[str]) -> int:
    """No system call for what most are."""
    if entry.is_file(follow_symlinks=False):
        return st_mod.S_IFREG
    if entry.is_dir(follow_symlinks=False):
        return st_mod.S_IFDIR
    return type_of(fd, name)


def type_of(fd: int, name: bytes) -> int:
    """S_IFMT bits of what has a name in a directory; 0 where nothing has it any more."""
    try:
        return st_mod.S_IFMT(syscalls.stat_at(fd, name).st_mode)
    except OSError:
        return 0


_libc = ctypes.CDLL(None, use_errno=True)


def watch(inotify: int, fd: int, mask: int) -> int:
    """Have an inotify instance watch what the descriptor `fd`, an O_PATH one perhaps, is of: its watch descriptor.

    Raises OSError.
    """
    number: int = _libc.inotify_add_watch(inotify, syscalls.proc_path(fd), ctypes.c_uint32(mask))
    if number < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return number


def unwatch(inotify: int, number: int) -> None:
    """inotify_rm_watch(2). Raises OSError, EINVAL for a watch that the kernel has dropped already."""
    if _libc.inotify_rm_watch(inotify, number) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if not compiled.why_not():
    from udbad.branch.clisting import read, watch  # noqa: F401  # the same, as calls of the C library
