"""Making a union's mount: complete before anybody can see it, and with no gap where a dead one was.

With fsopen(2), fsmount(2) and move_mount(2) the connection and its mount exist before they are anywhere in the
tree, so whatever fails until then leaves nothing behind: closing the descriptor of such a mount ends it.

A dead mount is replaced without an instant in between at which the bare directory shows: a mirror job that lists
the mount point then would take "empty" for the truth. Linux 6.5 can put a mount beneath another
(MOVE_MOUNT_BENEATH): ours goes beneath the dead one, which then is taken off. Older kernels cannot; there the two
calls follow each other as closely as they can. Nothing here asks a mount for anything.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from udbad.branch.mountinfo import FS_TYPE
from udbad.kernel.mounts import unmount_top

_libc: Final = ctypes.CDLL(None, use_errno=True)

# One number on every architecture (linux/unistd.h, generic table).
_SYS_MOVE_MOUNT: Final = 429
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
# linux/mount.h
_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_FSMOUNT_CLOEXEC: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_MOVE_MOUNT_T_SYMLINKS: Final = 0x10
_MOVE_MOUNT_BENEATH: Final = 0x200
_AT_FDCWD: Final = -100
_LONGEST: Final = 255
"""Bytes of a string that fsconfig(2) takes; a name that is longer, which has no other meaning, is cut."""

_ATTRIBUTES: Final = {
    "ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 0x10, "strictatime": 0x20, "nodiratime": 0x80,
}  # fmt: skip
"""Flags of the mount (MOUNT_ATTR_*); relatime is the kernel's default."""
_OF_THE_SUPERBLOCK: Final = frozenset({"ro", "sync", "dirsync", "lazytime"})


def _call(number: int, *arguments: int | bytes | None) -> int:
    words = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def create(source: bytes, options: str, flags: frozenset[str]) -> int:
    """A union's mount that is nowhere yet, as a descriptor; its connection has begun (INIT is waiting).

    options: as for mount(2), KEY=VALUE and words. flags: names of mount flags. Raises OSError.
    """
    context = _call(_SYS_FSOPEN, b"fuse", _FSOPEN_CLOEXEC)
    try:
        _configure(context, source, options, flags)
        return _call(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, sum(_ATTRIBUTES.get(flag, 0) for flag in flags))
    finally:
        os.close(context)


def _configure(context: int, source: bytes, options: str, flags: frozenset[str]) -> None:
    strings = [("source", source[:_LONGEST]), ("subtype", FS_TYPE.partition(b".")[2])]
    words = list(flags & _OF_THE_SUPERBLOCK)
    for word in options.split(","):
        key, equals, value = word.partition("=")
        if equals:
            strings.append((key, value.encode()))
        else:
            words.append(key)
    for key, text in strings:
        _call(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, key.encode(), text, 0)
    for key in words:
        _call(_SYS_FSCONFIG, context, _FSCONFIG_SET_FLAG, key.encode(), None, 0)
    _call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)


def attach(mount: int, path: bytes, dead: int = 0) -> None:
    """Put a mount from `create` on `path`; dead: how many dead unions lie on top there, which it replaces.

    Raises OSError: EBUSY when what lies on top is none of them any more.
    """
    while dead > 1:
        unmount_top(path, lazy=True)
        dead -= 1
    follow = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_SYMLINKS
    if dead:
        try:
            _call(_SYS_MOVE_MOUNT, mount, b"", _AT_FDCWD, path, follow | _MOVE_MOUNT_BENEATH)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Linux before 6.5, or a place where it may not: the bare directory shows for an instant.
        else:
            unmount_top(path, lazy=True)
            return
        unmount_top(path, lazy=True)
    _call(_SYS_MOVE_MOUNT, mount, b"", _AT_FDCWD, path, follow)
