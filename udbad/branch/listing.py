"""What a directory of a branch says, and its watch: getdents64(2), inotify(7)."""

from __future__ import annotations

import ctypes
import os
import stat as st_mod
import struct
import sys
from array import array

from udbad import compiled
from udbad.branch import syscalls

_AS_BYTES = (sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())  # os.fsencode() asks each time


def read(fd: int) -> tuple[list[bytes], array[int], bytearray]:
    """All names of a directory that is open for reading, `.` and `..` left out; the inode number of each; its type.

    That is the S_IFMT bits without the twelve below them (DT_* of getdents64(2)), 0 of what a file system does not say
    it of, and has gone meanwhile. No object for a name but the name itself: there may be very many. Raises OSError.
    """
    names: list[bytes] = []
    numbers = array("Q")
    types = bytearray()
    with os.scandir(fd) as entries:
        for entry in entries:
            name = entry.name.encode(*_AS_BYTES)
            names.append(name)
            numbers.append(entry.inode())
            types.append(_type(fd, name, entry) >> 12)
    return names, numbers, types


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


def inotify() -> int:
    """A new inotify instance: its descriptor, which does not block. Raises OSError (EMFILE)."""
    fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)  # IN_NONBLOCK, IN_CLOEXEC
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


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


EVENT = struct.Struct("iIII")
"""struct inotify_event (inotify(7)): watch descriptor, mask, cookie, length of the name that follows."""


def events(data: bytes) -> list[tuple[int, int, bytes]]:
    """What read(2) has brought from inotify: watch descriptor, mask and name, b"" for what is watched itself."""
    found = []
    at = 0
    while at < len(data):
        number, mask, _, length = EVENT.unpack_from(data, at)
        at += EVENT.size + length
        found.append((number, mask, data[at - length : at].rstrip(b"\0")))
    return found


if not compiled.why_not():
    from udbad.branch.clisting import events, read, watch  # noqa: F401  # the same, as calls of the C library
