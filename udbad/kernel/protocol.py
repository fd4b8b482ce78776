"""The parts of the FUSE wire format that udbad speaks itself (linux/fuse.h, protocol 7.x).

INIT asks for what a union needs, as DONT_MASK (the umask is ignored under a default ACL), HANDLE_KILLPRIV_V2 (one
request less per write) and SETXATTR_EXT (setting an ACL clears setgid). Notifications tell the kernel what to forget.
Pure packing and unpacking, no I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

_IN_HEADER = struct.Struct("<IIQQIIIHH")
_OUT_HEADER = struct.Struct("<IiQ")
_INIT_IN = struct.Struct("<IIII")
_FLAGS2 = struct.Struct("<I")
_INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")
_INVAL_INODE = struct.Struct("<Qqq")
_INVAL_ENTRY = struct.Struct("<QII")

OPCODE_INIT = 26
MAX_REQUEST = 1 << 20
"""Bytes of data in one READ or WRITE: 256 pages, as much as any kernel takes without fs.fuse.max_pages_limit."""

_ASYNC_READ = 1 << 0
_ATOMIC_O_TRUNC = 1 << 3
_BIG_WRITES = 1 << 5
_DONT_MASK = 1 << 6
_HAS_IOCTL_DIR = 1 << 11
_AUTO_INVAL_DATA = 1 << 12
_DO_READDIRPLUS = 1 << 13
_READDIRPLUS_AUTO = 1 << 14
_ASYNC_DIO = 1 << 15
_NO_OPEN_SUPPORT = 1 << 17
_PARALLEL_DIROPS = 1 << 18
_HANDLE_KILLPRIV = 1 << 19
_POSIX_ACL = 1 << 20
_ABORT_ERROR = 1 << 21
_MAX_PAGES = 1 << 22
_CACHE_SYMLINKS = 1 << 23
_NO_OPENDIR_SUPPORT = 1 << 24
_HANDLE_KILLPRIV_V2 = 1 << 28
_SETXATTR_EXT = 1 << 29
_INIT_EXT = 1 << 30
_PASSTHROUGH = 1 << 37 - 32
_ALLOW_IDMAP = 1 << 40 - 32
"""Of flags2."""

_WANTED = (
    _ASYNC_READ | _ATOMIC_O_TRUNC | _BIG_WRITES | _DONT_MASK | _AUTO_INVAL_DATA | _DO_READDIRPLUS | _READDIRPLUS_AUTO
    | _ASYNC_DIO | _PARALLEL_DIROPS | _ABORT_ERROR | _MAX_PAGES | _SETXATTR_EXT
)  # fmt: skip

_MAX_MINOR = 45
"""The newest protocol that wire.py was compared with. What came since 7.23 and changes the form of a request or an
answer comes with a flag only (SETXATTR_EXT, SECURITY_CTX and CREATE_SUPP_GROUP, ALLOW_IDMAP), or is an opcode of its
own, which is answered ENOSYS."""
_STACKING = 1
"""How many file systems lie below us, branches that the kernel uses itself not counted: with one, an overlayfs on top
of us is still possible, but none below (FILESYSTEM_MAX_STACK_DEPTH is 2)."""

_LINKS_MINOR = 43
"""The protocol minor from which a kept target of a symbolic link is never cut to the length of another one that has got
its inode number (Linux 6.15)."""

NOTIFY_INVAL_INODE = 2
NOTIFY_INVAL_ENTRY = 3
NOTIFY_RESEND = 7
NOTIFY_INC_EPOCH = 8

EXPIRE_ONLY = 1
EPOCH_MINOR = 44
"""The protocol minor from which the kernel knows NOTIFY_INC_EPOCH (Linux 6.16)."""


class InitRequest:
    """A FUSE_INIT request: what the kernel offers."""

    def __init__(self, raw: bytes) -> None:
        fields = _IN_HEADER.unpack_from(raw)
        if fields[1] != OPCODE_INIT:
            raise ValueError(f"first FUSE request has opcode {fields[1]}, not INIT")
        self.unique: int = fields[2]
        self.major, self.minor, self.max_readahead, self.flags = _INIT_IN.unpack_from(raw, _IN_HEADER.size)
        self.setxattr_ext = self.flags & _SETXATTR_EXT != 0
        """Whether SETXATTR has the longer form (Linux 5.13)."""
        flags2 = _FLAGS2.unpack_from(raw, _IN_HEADER.size + _INIT_IN.size)[0] if self.flags & _INIT_EXT else 0
        self.passthrough = flags2 & _PASSTHROUGH != 0
        """Whether files can be given to the kernel (Linux 6.9)."""
        self.allow_idmap = flags2 & _ALLOW_IDMAP != 0
        """Whether mounts of it may have ids of their own (Linux 6.12); with default_permissions only."""
        self.no_open = self.flags & _NO_OPEN_SUPPORT != 0 and self.flags & _NO_OPENDIR_SUPPORT != 0
        """Whether the kernel can open files and directories by itself, when OPEN and OPENDIR are answered with ENOSYS
        (Linux 3.15 and 5.1)."""

    def reply(self, acl: bool, passthrough: bool = False, no_open: bool = False, allow_idmap: bool = False) -> bytes:
        """Our answer; acl: let the kernel enforce POSIX ACLs. passthrough, no_open: files will be given to the kernel,
        or opened by it; allow_idmap: who creates something has the id that his mount gives him, and who does anything
        else is not told. The kernel must have offered them."""
        wanted = _WANTED | (_POSIX_ACL if acl else 0)
        wanted |= _HANDLE_KILLPRIV_V2 if self.flags & _HANDLE_KILLPRIV_V2 else _HANDLE_KILLPRIV
        if self.minor >= _LINKS_MINOR:
            wanted |= _CACHE_SYMLINKS
        if no_open:
            wanted &= ~_ATOMIC_O_TRUNC  # else the kernel would take an open(2) of its own to have emptied the file
        flags2, depth = 0, 0
        if passthrough:
            wanted |= _INIT_EXT
            flags2, depth = _PASSTHROUGH, _STACKING
        if allow_idmap:
            wanted |= _INIT_EXT
            flags2 |= _ALLOW_IDMAP
        body = _INIT_OUT.pack(
            7, min(self.minor, _MAX_MINOR), self.max_readahead, self.flags & wanted,
            64, 48,  # max_background, congestion_threshold
            MAX_REQUEST, 1, MAX_REQUEST // 4096, 0, flags2, depth, 0,
        )  # fmt: skip
        return _OUT_HEADER.pack(_OUT_HEADER.size + len(body), 0, self.unique) + body


def _notify(code: int, body: bytes) -> bytes:
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(body), code, 0) + body


def inval_attributes(node: int) -> bytes:
    """Forget a node's attributes and ACLs only (offset -1); never blocks on pages."""
    return _notify(NOTIFY_INVAL_INODE, _INVAL_INODE.pack(node, -1, 0))


def inval_data(node: int) -> bytes:
    """Forget attributes and all cached pages of a node."""
    return _notify(NOTIFY_INVAL_INODE, _INVAL_INODE.pack(node, 0, 0))


def inval_entry(parent: int, name: bytes, flags: int = 0) -> bytes:
    """Forget a name; EXPIRE_ONLY (7.38) has it revalidated without detaching what is mounted on it."""
    return _notify(NOTIFY_INVAL_ENTRY, _INVAL_ENTRY.pack(parent, len(name), flags) + name + b"\0")


def inc_epoch() -> bytes:
    """Have every cached name looked up again (7.44)."""
    return _notify(NOTIFY_INC_EPOCH, b"")


def resend() -> bytes:
    """Send again, before anything else, what was read and not answered, with bit 63 of `unique` set (Linux 6.9)."""
    return _notify(NOTIFY_RESEND, b"")


NOTIFICATIONS: Final[dict[str, Callable[[int, bytes], bytes]]] = {
    "entry": inval_entry,
    "expire": lambda node, name: inval_entry(node, name, EXPIRE_ONLY),
    "attributes": lambda node, name: inval_attributes(node),
    "data": lambda node, name: inval_data(node),
    "epoch": lambda node, name: inc_epoch(),
}
"""What the kernel can be told to forget, by kind: node id and name to the message."""
