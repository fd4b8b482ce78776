"""openat2(2): a path of somebody else's, opened below a directory and nowhere else.

For paths out of an archive, whose author may mean harm. Everywhere else names are single components (syscalls.py).
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

from udbad.branch.syscalls import open_dir_at

_libc: Final = ctypes.CDLL(None, use_errno=True)
_SYS_OPENAT2: Final = 437  # one number on every architecture (linux/unistd.h, generic table)
_RESOLVE: Final = 0x01 | 0x02 | 0x04 | 0x08  # NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, BENEATH (linux/openat2.h)
_O_DIR: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_AT_ONCE: Final = 4000
"""Bytes of a path that one call takes; less than PATH_MAX."""


class _OpenHow(ctypes.Structure):
    """struct open_how (openat2(2))."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_directory(dirfd: int, names: list[bytes]) -> int:
    """A search-only descriptor of the directory that is reached from `dirfd` by these names; none: that one itself.

    Raises OSError: ENOENT, ENOTDIR; ELOOP where a name is a symbolic link, EXDEV where the way leads out of the
    directory or into another mount.
    """
    fd = open_dir_at(dirfd, b".")
    place = 0
    while place < len(names):
        end, size = place, 0
        while end < len(names) and (end == place or size + len(names[end]) < _AT_ONCE):
            size += len(names[end]) + 1
            end += 1
        try:
            further = _openat2(fd, b"/".join(names[place:end]))
        finally:
            os.close(fd)
        fd, place = further, end
    return fd


def _openat2(dirfd: int, path: bytes) -> int:
    how = _OpenHow(_O_DIR, 0, _RESOLVE)
    fd = int(_libc.syscall(_SYS_OPENAT2, dirfd, path, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd
