"""Whiteouts, opaque marks and temporary names on a branch: the on-disk notation of aufs, and how to read that of
overlayfs (semantics 1).

Everything here works on one branch directory, given by descriptor. A whiteout `.wh.NAME` hides NAME
on lower branches only; NAME beside it on the same branch stays visible, so that every crash between
the steps of a mutation leaves the old or the new state.

In layers of overlayfs a character device 0/0 in the place of NAME is its whiteout, and a directory is opaque by an
extended attribute. That notation counts on branches where `Branch.overlay` says so, beside that of aufs, and is told
apart in this module only; notation.py writes either.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat as st_mod
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from udbad.branch import listing, syscalls
from udbad.branch.branches import Branch
from udbad.branch.syscalls import mode_at
from udbad.errors import ABSENT, eio, os_error

PREFIX = b".wh."
BASE = b".wh..wh.aufs"
PLINK_DIR = b".wh..wh.plnk"
ORPHAN_DIR = b".wh..wh.orph"
OPAQUE = b".wh..wh..opq"
RESERVED = b".wh..wh."
OVERLAY_DIR = b".wh..wh.over"
"""In place of the orphan directory in a branch that is written to in the notation of overlayfs, from mount to unmount:
whatever else a crash leaves there, that branch is none of aufs."""
MAX_NAME = 242
"""Bytes of a name that can be given: 255 less the room that `.wh..wh.NAME.xxxx` needs, as aufs has it (semantics 1).

Longer ones that are on a branch are shown. They can be read, changed and removed; not where that takes a whiteout of
more than 255 bytes, which is ENAMETOOLONG.
"""
NAME_MAX = 255
"""Bytes of a name that any file system may have (limits.h)."""
_TEMPORARY = rb"(?s)\.wh\.\.wh\..+\.(?:[0-9a-fA-F]{4}|[0-9a-f]{12})"

_TEMPORARY_ROOM = 255 - len(RESERVED) - 1 - 12

OVERLAY_OPAQUE = (b"trusted.overlay.opaque", b"user.overlay.opaque", b"user.fuseoverlayfs.opaque")
"""Attributes by which overlayfs (mounted by root, or with userxattr) and fuse-overlayfs mark an opaque directory."""
OPAQUE_VALUE = b"y"
"""Another one, "x", says that it may hold whiteouts that are no devices (Linux 6.8); not that it is opaque."""
_OURS = (BASE, PLINK_DIR, ORPHAN_DIR, RESERVED + b"udbad")

Descriptor = int
_stat = syscalls.stat_at
_S_IFMT, _S_IFCHR, _S_IFREG = 0o170000, st_mod.S_IFCHR, st_mod.S_IFREG
_DEVICE, _REGULAR = st_mod.S_IFCHR >> 12, st_mod.S_IFREG >> 12


def subject(name: bytes) -> bytes | None:
    """What a name in a branch directory is about: the name that a whiteout hides, b"" for the directory itself, of
    which an opaque mark is, None for one of our own."""
    if not name.startswith(PREFIX):
        return name
    if name.startswith(RESERVED):
        return b"" if name == OPAQUE else None
    return name[len(PREFIX) :]


def check_new_name(name: bytes) -> None:
    """Refuse names that no object of the union may be given: EPERM for .wh.*, ENAMETOOLONG above 242 bytes."""
    if len(name) > MAX_NAME:
        raise os_error(errno.ENAMETOOLONG)
    check_not_reserved(name)


def check_not_reserved(name: bytes) -> None:
    """Raises EPERM for .wh.*."""
    if name.startswith(PREFIX):
        raise os_error(errno.EPERM)


def present(dirfd: Descriptor, name: bytes) -> bool:
    """Whether this branch directory has a whiteout for `name`; EIO when it is not a regular file."""
    mode = mode_at(dirfd, PREFIX + name)
    if mode and mode & _S_IFMT != _S_IFREG:
        raise eio()
    return mode != 0


def opaque(dirfd: Descriptor, overlay: bool = False) -> bool:
    """Whether this branch directory hides everything that same-named lower ones contain.

    overlay: `Branch.overlay`.
    """
    return mode_at(dirfd, OPAQUE) != 0 or (overlay and overlay_opaque(dirfd))


# -- the notation of overlayfs ------------------------------------------------------------------


def unmarked(root_fd: int) -> bool:
    """Whether the root of a branch has nothing of what aufs, and we, put into a branch that is written to as aufs
    does."""
    return syscalls.exists_at(root_fd, OVERLAY_DIR) or not any(syscalls.exists_at(root_fd, name) for name in _OURS)


def is_device(st: os.stat_result) -> bool:
    """Whether an object is a whiteout of overlayfs (ovl_is_whiteout() in fs/overlayfs/util.c), where those count."""
    return st.st_mode & _S_IFMT == _S_IFCHR and not st.st_rdev


def is_device_at(dirfd: int, name: bytes) -> bool:
    """The same of a name, which may be nothing's."""
    try:
        return is_device(_stat(dirfd, name))
    except OSError as error:
        if error.errno in ABSENT:
            return False
        raise


def overlay_opaque(dirfd: int) -> bool:
    """Whether overlayfs, or fuse-overlayfs, has marked a branch directory as opaque."""
    path = syscalls.proc_path(dirfd)
    try:
        marks = [key for key in syscalls.listxattr(path) if key in OVERLAY_OPAQUE]
        return any(syscalls.getxattr(path, key) == OPAQUE_VALUE for key in marks)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENODATA):
            return False
        raise


def hides(branch: Branch, dirfd: int, name: bytes) -> bool:
    """Whether a directory of a branch, one whose whiteouts count, has a whiteout for `name` in any notation."""
    if present(dirfd, name):
        return True
    return branch.overlay and is_device_at(dirfd, name)


def hides_alone(branch: Branch, dirfd: int, name: bytes) -> bool:
    """Whether it has one, and not the name itself as well, which would be shown beside it."""
    try:
        st = _stat(dirfd, name)
    except OSError as error:
        if error.errno in ABSENT:
            return present(dirfd, name)
        raise
    return branch.overlay and is_device(st)


def as_aufs(dirfd: int, name: bytes, kind: int) -> tuple[bytes, int]:
    """What is in a branch directory on which marks of overlayfs count, as it would be in the notation of aufs; kind: as
    listing.read has it."""
    if kind == _DEVICE and is_device_at(dirfd, name):  # if it is gone, whoever asks for the name finds out
        return PREFIX + name, _REGULAR
    return name, kind


def names_in(dirfd: int, overlay: bool) -> list[bytes]:
    """All names in a branch directory, in the notation of aufs. overlay: whether marks of overlayfs count in it."""
    fd = syscalls.open_listing(dirfd)
    try:
        names, _, types = listing.read(fd)
        if overlay:
            names = [as_aufs(fd, name, kind)[0] for name, kind in zip(names, types, strict=True)]
    except FileNotFoundError:
        return []  # removed meanwhile: getdents(2) says so, and readdir(3) that it is empty
    finally:
        os.close(fd)
    return names


# -- names --------------------------------------------------------------------------------------


class Meaning(Enum):
    """What a name says in this notation, which that of OCI layers is, too."""

    OBJECT = "object"
    WHITEOUT = "whiteout"
    """Of the name behind the prefix."""
    OPAQUE = "opaque"
    """Of the directory it is in."""
    INTERNAL = "internal"
    """Ours and aufs' own: nothing of the union."""


def meaning(name: bytes) -> tuple[Meaning, bytes]:
    """What a name says, and of a whiteout the name that it hides, which may be one that nothing can have."""
    if not name.startswith(PREFIX):
        return Meaning.OBJECT, name
    if name == OPAQUE:
        return Meaning.OPAQUE, b""
    if name.startswith(RESERVED):
        return Meaning.INTERNAL, b""
    return Meaning.WHITEOUT, name[len(PREFIX) :]


class Names(NamedTuple):
    """What a branch directory says, each in order: names of objects, names that are hidden below; opaque: all are."""

    objects: tuple[bytes, ...]
    hidden: tuple[bytes, ...]
    opaque: bool


def told_apart(names: Iterable[bytes]) -> Names:
    """The entries of a branch directory by what they mean."""
    found: dict[Meaning, list[bytes]] = {kind: [] for kind in Meaning}
    for one in sorted(names):
        kind, name = meaning(one)
        found[kind].append(name)
    return Names(tuple(found[Meaning.OBJECT]), tuple(found[Meaning.WHITEOUT]), bool(found[Meaning.OPAQUE]))


def remove(dirfd: int, name: bytes) -> bool:
    """Remove the whiteout `.wh.NAME`; False when there was none."""
    try:
        syscalls.unlink_at(dirfd, PREFIX + name)
    except OSError as error:
        if error.errno in ABSENT:
            return False
        raise
    return True


class _Digits:
    """The twelve digits of this process's temporary names: six that are its own, and a number."""

    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.own = os.urandom(3).hex().encode()
        self.numbers = itertools.count(int.from_bytes(os.urandom(3)))


_digits = _Digits()


def is_ours(name: bytes) -> bool:
    """Whether a temporary name is one that this process has made, and may be using."""
    return name[-12:-6] == _digits.own


def is_temporary(name: bytes) -> bool:
    """Whether that is a temporary name: one of ours, or one of aufs and of earlier versions, which had four digits."""
    return re.fullmatch(_TEMPORARY, name) is not None


def temporary_name(name: bytes) -> bytes:
    """`.wh..wh.NAME.xxxxxxxxxxxx`: invisible in the union, swept by the next mount if a crash leaves it.

    The digits are so many that no name comes twice, whatever else is in the directory. A NAME that leaves no
    room for them is cut; it is there for people to read only.
    """
    if len(name) > _TEMPORARY_ROOM:
        # Some file systems take UTF-8 only, so not within a character; what is none is cut anywhere.
        ends = range(_TEMPORARY_ROOM, _TEMPORARY_ROOM - 4, -1)
        name = name[: next((end for end in ends if name[end] & 0xC0 != 0x80), _TEMPORARY_ROOM)]
    return b"%s%s.%s%06x" % (RESERVED, name, _digits.own, next(_digits.numbers) & 0xFFFFFF)
