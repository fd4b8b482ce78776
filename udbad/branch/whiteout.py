"""Whiteouts, opaque marks and temporary names on a branch: the on-disk notation of aufs (semantics 1).

Everything here works on one branch directory, given by descriptor. A whiteout `.wh.NAME` hides NAME
on lower branches only; NAME beside it on the same branch stays visible, so that every crash between
the steps of a mutation leaves the old or the new state.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import secrets
import stat as st_mod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from udbad.branch import syscalls
from udbad.branch.branches import Branch
from udbad.errors import ABSENT, eio, os_error

PREFIX = b".wh."
BASE = b".wh..wh.aufs"
PLINK_DIR = b".wh..wh.plnk"
ORPHAN_DIR = b".wh..wh.orph"
OPAQUE = b".wh..wh..opq"
RESERVED = b".wh..wh."
MAX_NAME = 242
"""Bytes of a name that can be given: 255 less the room that `.wh..wh.NAME.xxxx` needs, as aufs has it (semantics 1).

Longer ones that are on a branch are shown. They can be read, changed and removed; not where that takes a whiteout of
more than 255 bytes, which is ENAMETOOLONG.
"""
NAME_MAX = 255
"""Bytes of a name that any file system may have (limits.h)."""
TEMPORARY = re.compile(rb"\.wh\.\.wh\..+\.(?:[0-9a-fA-F]{4}|[0-9a-f]{12})", re.DOTALL)
"""A temporary name: one of ours, or one of aufs and of earlier versions, which had four digits."""

_TEMPORARY_ROOM = 255 - len(RESERVED) - 1 - 12

_stat = syscalls.stat_at
_ISREG = st_mod.S_ISREG


def check_new_name(name: bytes) -> None:
    """Refuse names that no object of the union may be given: EPERM for .wh.*, ENAMETOOLONG above 242 bytes."""
    if len(name) > MAX_NAME:
        raise os_error(errno.ENAMETOOLONG)
    check_not_reserved(name)


def check_not_reserved(name: bytes) -> None:
    """Raises EPERM for .wh.*."""
    if name.startswith(PREFIX):
        raise os_error(errno.EPERM)


def present(dirfd: int, name: bytes) -> bool:
    """Whether this branch directory has a whiteout for `name`; EIO when it is not a regular file."""
    try:
        st = _stat(dirfd, PREFIX + name)
    except OSError as error:
        if error.errno in ABSENT:
            return False
        raise
    if not _ISREG(st.st_mode):
        raise eio()
    return True


def opaque(dirfd: int) -> bool:
    """Whether this branch directory hides everything that same-named lower ones contain."""
    try:
        _stat(dirfd, OPAQUE)
    except FileNotFoundError:
        return False
    return True


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


@dataclass(frozen=True, slots=True)
class Names:
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


def create(branch: Branch, dirfd: int, name: bytes) -> bool:
    """Make the whiteout for `name`; False when it is there already.

    A hard link to the branch's base file where possible: it costs no inode (semantics 6.2).
    """
    return _mark(branch, dirfd, PREFIX + name)


def make_opaque(branch: Branch, dirfd: int) -> None:
    """Write the opaque mark into a branch directory."""
    _mark(branch, dirfd, OPAQUE)


def _mark(branch: Branch, dirfd: int, mark: bytes) -> bool:
    if "nolwh" not in branch.attrs:
        try:
            syscalls.link_at(branch.root_fd, BASE, dirfd, mark)
        except FileExistsError:
            return False
        except OSError as error:
            # No base file (somebody removed it), too many links on it, or another subvolume: any
            # empty file does as well.
            if error.errno not in (errno.ENOENT, errno.EMLINK, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP):
                raise
        else:
            return True
    try:
        os.close(syscalls.create_file_at(dirfd, mark, os.O_WRONLY, 0o444))
    except FileExistsError:
        return False
    return True


def remove(dirfd: int, name: bytes) -> bool:
    """Remove the whiteout for `name`; False when there was none."""
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
        self.own = secrets.token_hex(3).encode()
        self.numbers = itertools.count(secrets.randbits(24))


_digits = _Digits()


def is_ours(name: bytes) -> bool:
    """Whether a temporary name is one that this process has made, and may be using."""
    return name[-12:-6] == _digits.own


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
