"""fanotify(7) on whole file systems: what is changed where, by file handles, and who did it.

One mark tells of everything on a file system; which of it is ours is looked up here, in a table of handles
(name_to_handle_at(2)), before an object is made of any event.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping
from typing import Any, Final

from udbad import compiled
from udbad.branch import syscalls

CREATE: Final = 0x100
DELETE: Final = 0x200
MOVED_FROM: Final = 0x40
MOVED_TO: Final = 0x80
MODIFY: Final = 0x2
CLOSE_WRITE: Final = 0x8
ATTRIB: Final = 0x4
DELETE_SELF: Final = 0x400
MOVE_SELF: Final = 0x800
Q_OVERFLOW: Final = 0x4000
_ONDIR: Final = 0x4000_0000

_EVERYTHING: Final = (
    CREATE | DELETE | MOVED_FROM | MOVED_TO | MODIFY | CLOSE_WRITE | ATTRIB | DELETE_SELF | MOVE_SELF | _ONDIR
)

_INIT: Final = 0x1 | 0x2 | 0x10 | 0x200 | 0x400 | 0x800 | 0x1000
"""FAN_CLOEXEC, FAN_NONBLOCK, FAN_UNLIMITED_QUEUE; FAN_REPORT_FID, _DIR_FID, _NAME, _TARGET_FID."""
_MARK_ADD, _MARK_FILESYSTEM = 0x1, 0x100
_AT_EMPTY_PATH: Final = 0x1000
_MAX_HANDLE: Final = 128
"""MAX_HANDLE_SZ."""

_EVENT = struct.Struct("=IBBHQii")
"""struct fanotify_event_metadata: length, version, reserved, length of itself, mask, descriptor, pid."""
_INFO = struct.Struct("=BBH")
"""struct fanotify_event_info_header: type, padding, length; a file system id and a struct file_handle follow."""
_HANDLE = struct.Struct("=Ii")
_FID, _DFID_NAME, _DFID = 1, 2, 3

MOST_BYTES: Final = _EVENT.size + 2 * (_INFO.size + 8 + _HANDLE.size + _MAX_HANDLE) + 256
"""Of an event, with its directory, its name and its own handle."""

_libc = ctypes.CDLL(None, use_errno=True)

Event = tuple[bytes, int, bytes, int]
"""The handle that is known, the mask, the name in it, b"" for itself, and the process, 0 where it has none here."""


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def open_group() -> int:
    """A descriptor of which events are read, without blocking. Raises OSError: EPERM without CAP_SYS_ADMIN in the
    first user namespace, EINVAL before Linux 5.17, ENOSYS."""
    return _checked(_libc.fanotify_init(_INIT, os.O_RDONLY))


def mark(group: int, fd: int) -> None:
    """Be told of all that changes on the file system of `fd`, an O_PATH descriptor perhaps.

    Raises OSError: EOPNOTSUPP where it has no file handles, ENODEV where it has no id, EXDEV in a subvolume of btrfs.
    """
    flags, mask, path = _MARK_ADD | _MARK_FILESYSTEM, ctypes.c_uint64(_EVERYTHING), syscalls.proc_path(fd)
    _checked(_libc.fanotify_mark(group, flags, mask, -100, path))


def file_system_id(fd: int) -> bytes:
    """The id that events have of the file system of `fd` (f_fsid of statfs(2))."""
    buffer = ctypes.create_string_buffer(256)
    _checked(_libc.fstatfs(fd, buffer))
    return buffer.raw[_FSID_AT : _FSID_AT + 8]


_FSID_AT: Final = 7 * ctypes.sizeof(ctypes.c_long)
"""f_type, f_bsize, f_blocks, f_bfree, f_bavail, f_files, f_ffree; all of them words where `long` has 64 bits."""


def handle_of(fd: int, fsid: bytes) -> bytes:
    """What events call the object behind `fd`, an O_PATH descriptor perhaps, on the file system with this id.

    Raises OSError: EOPNOTSUPP where it has no file handles.
    """
    buffer = ctypes.create_string_buffer(_HANDLE.size + _MAX_HANDLE)
    _HANDLE.pack_into(buffer, 0, _MAX_HANDLE, 0)
    _checked(_libc.name_to_handle_at(fd, b"", buffer, ctypes.byref(ctypes.c_int()), _AT_EMPTY_PATH))
    return fsid + buffer.raw[: _HANDLE.size + _HANDLE.unpack_from(buffer)[0]]


def events(data: bytes, known: Mapping[bytes, Any]) -> tuple[int, list[Event]]:
    """What read(2) has brought: how many events, and those of them that concern handles in `known`, or have the bit
    Q_OVERFLOW, for which the handle is b"". One event may concern a directory and the file in it."""
    count, found = 0, []
    at = 0
    while at < len(data):
        length, _, _, size, mask, _, pid = _EVENT.unpack_from(data, at)
        end = at + length
        info = at + size
        if mask & Q_OVERFLOW:
            found.append((b"", mask, b"", pid))
        while info < end:
            kind, _, info_size = _INFO.unpack_from(data, info)
            handle = info + _INFO.size
            after = handle + 8 + _HANDLE.size + _HANDLE.unpack_from(data, handle + 8)[0]
            key = data[handle:after]
            if key in known:
                name = data[after : info + info_size].split(b"\0", 1)[0] if kind == _DFID_NAME else b""
                found.append((key, mask, b"" if name == b"." else name, pid))
            info += info_size
        count += 1
        at = end
    return count, found


if not compiled.why_not():
    from udbad.branch.clisting import fan_events as events  # noqa: F401  # the same, in C
