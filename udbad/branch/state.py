"""Whether a branch object is what it was: the same object, the same state of it, the same content.

Everybody who compares a status with an earlier one does it by this module; what is kept is a stamp. What two
different objects have in common, whichever branches they are on, is for compare.py.
"""

from __future__ import annotations

import os
import stat as st_mod
import struct
from time import time_ns

from udbad import compiled
from udbad.branch.branches import Branch
from udbad.types import Perm

_S_IFDIR = st_mod.S_IFDIR
_S_IFMT = 0o170000
_SECOND_NS = 1_000_000_000
_COARSE_NS = 50_000_000
"""Within this time of a change a second one may leave the same times, where those are a tick of the clock."""
_WHOLE_NS = 2_100_000_000
"""The same where they are whole seconds (ext4 with inodes of 128 bytes), or even ones (vfat)."""

Stamp = bytes
"""ctime and mtime (nanoseconds), size (bytes), links: what tells two states of one object apart. Nobody looks into one
but this module: one may be kept for each inode that the kernel knows, and as compiled it is packed in its own way."""
_pack = struct.Struct("<4Q").pack
_CONTENT = slice(8, 24)
_LINKS_AT = 24
_WORD = (1 << 64) - 1
"""Times after 2262 have more bits, of which these tell enough."""
ObjectStamp = tuple[int, int, Stamp]
"""Device and inode number, and a `Stamp`: what tells two objects apart as well."""


def is_racy(branch: Branch, st: os.stat_result) -> bool:
    """Whether a change after this stat may leave the object the ctime it has ("racily clean", as git calls it)."""
    if st.st_ctime_ns % _SECOND_NS:
        exact = branch.exact_directory_times if st.st_mode & _S_IFMT == _S_IFDIR else branch.exact_times
        return not exact and time_ns() - st.st_ctime_ns <= _COARSE_NS
    return branch.perm is not Perm.RR and time_ns() - st.st_ctime_ns <= _WHOLE_NS


def stamp(st: os.stat_result) -> Stamp:
    """The state that a status shows. ctime changes with everything (inode(7)), the rest says what it was.

    Two stamps that differ are two states. Two that are the same are one, unless the first status `is_racy`.
    """
    return _pack(st.st_ctime_ns & _WORD, st.st_mtime_ns & _WORD, st.st_size, st.st_nlink)


def lasting_stamp(branch: Branch, st: os.stat_result) -> Stamp | None:
    """A stamp that no other state will have; None while there is no such thing, as the status `is_racy`."""
    if is_racy(branch, st):
        return None
    return stamp(st)


def same_content(one: Stamp, other: Stamp) -> bool:
    """Whether two states of one file differ in attributes at most, as far as mtime and size tell."""
    return one[_CONTENT] == other[_CONTENT]


def has_one_name(one: Stamp) -> bool:
    """Whether the object had one link at most."""
    return int.from_bytes(one[_LINKS_AT:], "little") <= 1


def object_stamp(st: os.stat_result) -> ObjectStamp:
    """`stamp` where the name may stand for another object by now."""
    return (st.st_dev, st.st_ino, stamp(st))


if not compiled.why_not():
    from udbad.branch.cstat import (  # noqa: F401  # the same, without an object for each number
        has_one_name,
        lasting_stamp,
        same_content,
        stamp,
    )
