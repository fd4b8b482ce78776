"""Requests and replies in the form that the kernel has them (linux/fuse.h, protocol 7.x).

Numbers, structs and the packing of answers; edge/table.py says which operation takes what. No I/O. Times in
nanoseconds, time-outs in seconds.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from udbad import compiled
from udbad.inodes.node import Node
from udbad.union.readdir import Name, Run

REQUEST = struct.Struct("<IIQQIII")
"""Of fuse_in_header: length, opcode, unique, node id, uid, gid, pid; then the length of extensions, and padding."""
BODY = 40
"""Bytes of a fuse_in_header: where the request's own struct begins."""
REPLY = struct.Struct("<IiQ")
"""fuse_out_header: length, error, unique."""

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK, MKNOD, MKDIR = 1, 2, 3, 4, 5, 6, 8, 9
UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE = 10, 11, 12, 13, 14, 15, 16, 17, 18
FSYNC, SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH, OPENDIR = 20, 21, 22, 23, 24, 25, 27
READDIR, RELEASEDIR, FSYNCDIR, CREATE, INTERRUPT, DESTROY = 28, 29, 30, 35, 36, 38
BATCH_FORGET, FALLOCATE, READDIRPLUS, RENAME2, LSEEK, COPY_FILE_RANGE = 42, 43, 44, 45, 46, 47
TMPFILE, STATX, COPY_FILE_RANGE_64 = 51, 52, 53

DIRECT_IO, KEEP_CACHE, CACHE_DIR, NO_FLUSH, PASSTHROUGH = 1 << 0, 1 << 1, 1 << 3, 1 << 5, 1 << 7
"""FOPEN_*: flags of the replies to OPEN and OPENDIR. NO_FLUSH is unknown before Linux 5.16, which then asks."""

WORD = struct.Struct("<I")
TWO_WORDS = struct.Struct("<II")
FOUR_WORDS = struct.Struct("<IIII")
QWORD = struct.Struct("<Q")
QWORD_AND_WORD = struct.Struct("<QI4x")
"""RENAME2: directory, flags. FSYNC, FSYNCDIR: handle, FSYNC_DATA_ONLY."""
FSYNC_DATA_ONLY = 1
FORGET_ONE = struct.Struct("<QQ")
READ_IN = struct.Struct("<QQI")
"""READ, WRITE, READDIR: handle, offset, size in bytes."""
SETATTR_IN = struct.Struct("<I4xQQ8xqqqIIII4xII")
"""fuse_setattr_in: valid, handle, size, atime, mtime, ctime (seconds), their nanoseconds, mode, uid, gid."""
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME, SET_FH = 1, 2, 4, 8, 16, 32, 64
SET_ATIME_NOW, SET_MTIME_NOW = 128, 256
"""FATTR_*: what of it is meant."""
SETXATTR_FLAGS = struct.Struct("<I4x")
"""What fuse_setxattr_in has after size and flags where FUSE_SETXATTR_EXT was agreed on."""
ACL_KILL_SGID = 1
"""FUSE_SETXATTR_ACL_KILL_SGID: the caller is not in the file's group, so that an ACL costs the setgid bit."""
FALLOCATE_IN = struct.Struct("<QqqI4x")
"""fuse_fallocate_in: handle, offset, length, mode."""
LSEEK_IN = struct.Struct("<QqI4x")
"""fuse_lseek_in: handle, offset, whence."""
COPY_IN = struct.Struct("<QqQQqQ8x")
"""fuse_copy_file_range_in: handle and offset of the source; node, handle and offset of the target; length."""
MOST_COPIED = 0xFFFFF000
"""Bytes that the answer to COPY_FILE_RANGE can tell of (struct fuse_write_out), in whole pages."""
WRITE_FLAGS_AT = BODY + 32
WRITE_DATA = BODY + 40
OPENED = struct.Struct("<QII")
"""fuse_open_out: handle, flags, backing id."""

STATFS_OUT = struct.Struct("<QQQQQIII28x")
"""fuse_kstatfs: blocks, free, available, files, free files, block size, longest name, fragment size."""
_ATTR_OUT = struct.Struct("<QIIQQQqqqIIIIIIIIII")
_ENTRY_OUT = struct.Struct("<QQQQIIQQQqqqIIIIIIIIII")
_STATX_OUT = struct.Struct("<QI20xII8xIIIH2xQQQ8xqI4xqI4xqI4xqI4xII120x")
"""fuse_statx_out; times in the order atime, btime, ctime, mtime."""
_BASIC_STATS, _BTIME = 0x7FF, 0x800
"""STATX_*: what of it is said."""
_ATIME, _MTIME, _CTIME = 7, 8, 9
"""Of a stat_result: whole seconds. The named ones are fractions, and take longer than all the rest."""
_DIRENT = struct.Struct("<QQII")
ENTRY_SIZE = _ENTRY_OUT.size
DIRENT_SIZE = _DIRENT.size

BILLION = 1_000_000_000


_U32 = (1 << 32) - 1


@lru_cache(64)  # of the few there are
def _seconds(timeout: float) -> tuple[int, int]:
    whole = int(timeout)
    return whole, int((timeout - whole) * BILLION)


def links(node: Node, st: os.stat_result) -> int:
    """st_nlink of a node some of whose names are on other branches, or removed from the union only.

    Direct changes of the branches' link counts are not ours to follow name by name: at least what is there.
    """
    return max(st.st_nlink + node.nlink_extra, 0 if node.dead or not st.st_nlink else 1)


Time = int | Literal["now"] | None
Settable = tuple[int | None, int | None, int | None, int | None, Time, Time, int | None]


def setattr_in(buffer: bytearray) -> Settable:
    """What a SETATTR asks for: mode, uid, gid, size, atime, mtime (ns, or "now"), handle; None for what it does not."""
    valid, fh, length, atime, mtime, _, atime_nsec, mtime_nsec, _, mode, uid, gid = SETATTR_IN.unpack_from(buffer, BODY)
    return (
        mode if valid & SET_MODE else None,
        uid if valid & SET_UID else None,
        gid if valid & SET_GID else None,
        length if valid & SET_SIZE else None,
        _time_in(atime * BILLION + atime_nsec, valid, SET_ATIME, SET_ATIME_NOW),
        _time_in(mtime * BILLION + mtime_nsec, valid, SET_MTIME, SET_MTIME_NOW),
        fh if valid & SET_FH else None,
    )


def _time_in(time: int, valid: int, meant: int, now: int) -> Time:
    return None if not valid & meant else "now" if valid & now else time


def attributes(node: Node, st: os.stat_result, timeout: float) -> bytes:
    """fuse_attr_out."""
    valid, nsec = _seconds(timeout)
    mtime, mtime_nsec = st[_MTIME], st.st_mtime_ns % BILLION
    if node.mtime_offset:
        mtime, mtime_nsec = divmod(st.st_mtime_ns + node.mtime_offset, BILLION)
    return _ATTR_OUT.pack(
        valid, nsec, 0,
        node.id, st.st_size, st.st_blocks, st[_ATIME], mtime, st[_CTIME],
        st.st_atime_ns % BILLION, mtime_nsec, st.st_ctime_ns % BILLION,
        st.st_mode, links(node, st) if node.nlink_extra else st.st_nlink, st.st_uid, st.st_gid,
        st.st_rdev & _U32, st.st_blksize, 0,
    )  # fmt: skip


def statx(node: Node, st: os.stat_result, timeout: float, birth_ns: int) -> bytes:
    """fuse_statx_out. birth_ns: 0 where nobody knows."""
    valid, nsec = _seconds(timeout)
    return _STATX_OUT.pack(
        valid, nsec,
        _BASIC_STATS | (_BTIME if birth_ns else 0), st.st_blksize, links(node, st), st.st_uid, st.st_gid, st.st_mode,
        node.id, st.st_size, st.st_blocks,
        *divmod(st.st_atime_ns, BILLION), *divmod(birth_ns, BILLION), *divmod(st.st_ctime_ns, BILLION),
        *divmod(st.st_mtime_ns + node.mtime_offset, BILLION),
        os.major(st.st_rdev), os.minor(st.st_rdev),
    )  # fmt: skip


def entry(node: Node, st: os.stat_result, entry_timeout: float, attr_timeout: float) -> bytes:
    """fuse_entry_out."""
    entry_valid, entry_nsec = attr_valid, attr_nsec = _seconds(entry_timeout)
    if attr_timeout != entry_timeout:
        attr_valid, attr_nsec = _seconds(attr_timeout)
    mtime, mtime_nsec = st[_MTIME], st.st_mtime_ns % BILLION
    if node.mtime_offset:
        mtime, mtime_nsec = divmod(st.st_mtime_ns + node.mtime_offset, BILLION)
    number = node.id
    return _ENTRY_OUT.pack(
        number, 0, entry_valid, attr_valid, entry_nsec, attr_nsec,
        number, st.st_size, st.st_blocks, st[_ATIME], mtime, st[_CTIME],
        st.st_atime_ns % BILLION, mtime_nsec, st.st_ctime_ns % BILLION,
        st.st_mode, links(node, st) if node.nlink_extra else st.st_nlink, st.st_uid, st.st_gid,
        st.st_rdev & _U32, st.st_blksize, 0,
    )  # fmt: skip


def negative(timeout: float) -> bytes:
    """fuse_entry_out of a name that does not exist: node id 0, and how long that may be remembered."""
    valid, nsec = _seconds(timeout)
    return _ENTRY_OUT.pack(0, 0, valid, 0, nsec, 0, *[0] * 16)


def dirent(number: int, kind: int, name: bytes, after: int) -> bytes:
    """fuse_dirent. kind: S_IFMT bits. after: offset of the entry that follows."""
    size = len(name)
    return _DIRENT.pack(number, after, size, kind >> 12) + name + _PADDING[size & 7]


def dirents(entries: Iterable[Name | Run], room: int) -> bytes:
    """As many fuse_dirents as there are bytes of room for."""
    parts: list[bytes] = []
    for each in entries:
        names: Iterable[Name] = each if isinstance(each, Run) else (each,)
        for name, number, kind, after in names:
            room -= DIRENT_SIZE + (len(name) + 7 & ~7)
            if room < 0:
                return b"".join(parts)
            parts.append(dirent(number, kind, name, after))
    return b"".join(parts)


_PADDING = [b"\0" * (-size & 7) for size in range(8)]
NO_ENTRY = bytes(ENTRY_SIZE)
"""Before "." and ".." of a READDIRPLUS: nothing is looked up by them."""

if not compiled.why_not():
    # The same, as structures of C.
    from udbad.kernel.cwire import attributes, dirent, dirents, entry, negative, setattr_in  # noqa: F401
