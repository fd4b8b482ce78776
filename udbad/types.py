"""Plain value types shared by every layer.

Nothing here does I/O or knows about FUSE. Names and paths are bytes everywhere below the
command line.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple, NewType

Fh = NewType("Fh", int)

ROOT_ID: Final = 1
"""FUSE_ROOT_ID (linux/fuse.h)."""

MOVED_FROM, MOVED_TO, MADE, REMOVED = 0x40, 0x80, 0x100, 0x200
"""What one system call did to one name in one branch directory; inotify's numbers for the event (inotify(7))."""
OF_DIRECTORY = 0x40000000
"""Added to that: the name of a directory (IN_ISDIR)."""


class Caller(NamedTuple):
    """Who asks: ids and umask of the calling process, pid for messages (0: the kernel itself).

    A tuple, because one is made for most requests and a frozen dataclass takes four times as long.
    """

    uid: int
    gid: int
    pid: int = 0
    umask: int = 0o022


ROOT_CALLER = Caller(0, 0, 0, 0)


class Perm(Enum):
    """Permission of a branch (aufs(5), semantics 3)."""

    RW = "rw"
    """Written to; the default of the first branch."""
    RO = "ro"
    """Never written to by udbad, access times included (Linux 5.12), but others may change it; the default of the
    others."""
    RR = "rr"
    """Can never change (squashfs, iso9660, cramfs, romfs, erofs: taken by default): nothing of it is watched or
    checked."""


class Trigger(Enum):
    """What made a copy-up necessary; a metric label, so the set stays small."""

    WRITE = "write"
    TRUNCATE = "truncate"
    ATTR = "attr"
    XATTR = "xattr"
    RENAME = "rename"
    LINK = "link"
    OPEN = "open"


class CopyMethod(Enum):
    """How the bytes of a copy-up travelled."""

    REFLINK = "reflink"
    COPY_FILE_RANGE = "copy_file_range"
    COPY = "copy"
    NONE = "none"
