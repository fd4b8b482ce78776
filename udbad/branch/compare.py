"""Whether two branch objects are the same file: type, content and attributes, each by (directory descriptor, name).

Reads only, and does not touch access times where that is allowed. Any thread.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from typing import Final

from udbad.branch import copydata, syscalls
from udbad.errors import estale

_CHUNK: Final = 1 << 20  # bytes

TYPE: Final = "type"
CONTENT: Final = "content"
"""The bytes of a file, the target of a symlink, the numbers of a device."""
MODE: Final = "mode"
OWNER: Final = "owner"
XATTR: Final = "xattr"
"""Extended attributes, ACLs and capabilities included; without those that a copy-up leaves behind."""
TIME: Final = "time"
"""mtime; nobody has a promise about the others."""


def differences(dirfd: int, name: bytes, other_dirfd: int, other_name: bytes) -> frozenset[str]:
    """In what two objects differ: of TYPE, CONTENT, MODE, OWNER, XATTR, TIME; nothing: one can take the other's place.

    With TYPE nothing else is compared. Of directories only the attributes are, and not the time, which
    says something about their names. Raises OSError: ESTALE when one is replaced meanwhile.
    """
    st = syscalls.stat_at(dirfd, name)
    other = syscalls.stat_at(other_dirfd, other_name)
    if st_mod.S_IFMT(st.st_mode) != st_mod.S_IFMT(other.st_mode):
        return frozenset({TYPE})
    found = set()
    if st_mod.S_IMODE(st.st_mode) != st_mod.S_IMODE(other.st_mode):
        found.add(MODE)
    if (st.st_uid, st.st_gid) != (other.st_uid, other.st_gid):
        found.add(OWNER)
    if not st_mod.S_ISDIR(st.st_mode) and st.st_mtime_ns != other.st_mtime_ns:
        found.add(TIME)
    if _xattrs(dirfd, name) != _xattrs(other_dirfd, other_name):
        found.add(XATTR)
    if st_mod.S_ISLNK(st.st_mode):
        if syscalls.readlink_at(dirfd, name) != syscalls.readlink_at(other_dirfd, other_name):
            found.add(CONTENT)
    elif st_mod.S_ISREG(st.st_mode):
        if st.st_size != other.st_size or not _same_content(dirfd, name, st, other_dirfd, other_name, other):
            found.add(CONTENT)
    elif (st_mod.S_ISCHR(st.st_mode) or st_mod.S_ISBLK(st.st_mode)) and st.st_rdev != other.st_rdev:
        found.add(CONTENT)
    return frozenset(found)


def _xattrs(dirfd: int, name: bytes) -> dict[str, bytes]:
    path = syscalls.xattr_path(dirfd, name)
    return {
        key: os.getxattr(path, key, follow_symlinks=False) for key in copydata.copied_names(path, follow_symlinks=False)
    }


def _open(dirfd: int, name: bytes, st: os.stat_result) -> int:
    try:
        fd, now = syscalls.open_file_at(dirfd, name, os.O_RDONLY | os.O_NOATIME)
    except PermissionError:  # somebody else's file, and we are not root
        fd, now = syscalls.open_file_at(dirfd, name, os.O_RDONLY)
    if (now.st_dev, now.st_ino) != (st.st_dev, st.st_ino):
        os.close(fd)
        raise estale()
    return fd


def _same_content(
    dirfd: int, name: bytes, st: os.stat_result, other_dirfd: int, other_name: bytes, other: os.stat_result
) -> bool:
    if (st.st_dev, st.st_ino) == (other.st_dev, other.st_ino) or not st.st_size:
        return True
    fd = _open(dirfd, name, st)
    try:
        other_fd = _open(other_dirfd, other_name, other)
        try:
            return same_bytes(fd, other_fd, st.st_size)
        finally:
            os.close(other_fd)
    finally:
        os.close(fd)


def same_bytes(fd: int, other: int, size: int) -> bool:
    """Whether the first `size` bytes of two files are the same. `fd`: a file of at least that size; the offsets of both
    descriptors move. False when the other one is shorter. Raises OSError."""
    offset = 0
    while offset < size:
        # What is a hole in both need not be read.
        offset = max(offset, min(_next_data(fd, offset, size), _next_data(other, offset, size)))
        mine = os.pread(fd, _CHUNK, offset)
        theirs = os.pread(other, len(mine), offset)
        if mine[: len(theirs)] != theirs or (mine and not theirs):
            return False
        if not theirs:
            break
        offset += len(theirs)
    return True


def _next_data(fd: int, offset: int, size: int) -> int:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        return size if error.errno == errno.ENXIO else offset
