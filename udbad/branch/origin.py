"""Which lower file a pseudo-link's home was copied from: the names in .wh..wh.plnk, and how sure they make us.

An inode number says little: when a file is gone its number is given to another one, and a different order of the
branches, another medium or a restored backup has other files under the numbers. A home's name therefore says
what tells two lives of a number apart, so that it is made with the home in one link(2) and goes where a hard link goes:

    NUMBER.INO.BIRTH         birth time in ns (statx(2)): certain, also in another order of file systems
    NUMBER.INO.MTIME-SIZE    where there is no birth time, or one in whole seconds, which all files of an image may
                             share: the same number, on the same file system in order, and it has not been written to
    NUMBER.INO               of earlier versions, and of aufs (whose numbers mean nothing here): see `_may_be`

NUMBER is the inode number in the mount, INO the one on the lower branch; tools of aufs read the first. In doubt a
file is not the one: its name then shows what is there, and never what an unrelated file once had.
"""

from __future__ import annotations

import os
import re
import stat as st_mod
import time
from typing import Final, NamedTuple

from udbad.branch import syscalls

_NAME: Final = rb"(\d{1,20})\.(\d{1,20})(?:\.(\d+|-?\d+-\d+))?"
_SECOND: Final = 10**9
_CLOCK_REALTIME_COARSE: Final = 5  # linux/time.h: what the kernel stamps files with
_TICK: Final = 20_000_000  # ns; two ticks of the slowest kernel


class Origin(NamedTuple):
    """What a home's name says. number: in the mount; ino: on the lower branch; life: the rest, b"" without one."""

    number: int
    ino: int
    life: bytes

    def name(self) -> bytes:
        return b"%d.%d.%s" % (self.number, self.ino, self.life)


class Place(NamedTuple):
    """An object by (directory descriptor, name), b"" for the object behind the descriptor itself; st: its status."""

    dirfd: int
    name: bytes
    st: os.stat_result

    def birth_ns(self) -> int:
        return syscalls.birth_ns(self.dirfd, self.name, self.st.st_ino)


def parse(name: bytes) -> Origin | None:
    """What the name of a home says; None when it is not the name of one."""
    match = re.fullmatch(_NAME, name)
    if match is None:
        return None
    number, ino = int(match[1]), int(match[2])
    if max(number, ino) >= 1 << 64:
        return None
    return Origin(number, ino, match[3] or b"")


def of(source: Place, number: int) -> Origin:
    """For a home that is being made of `source`, a file with this number in the mount.

    Waits for the kernel's clock to tick (20 ms at most) when the file was made in this instant: whoever gets its
    inode number from now on is born later.
    """
    birth = source.birth_ns()
    while 0 <= birth - time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) < _TICK:
        time.sleep(0.001)
    return Origin(number, source.st.st_ino, _life(source, birth))


def _life(place: Place, birth: int) -> bytes:
    if birth > 0 and birth % _SECOND:
        return b"%d" % birth
    return b"%d-%d" % (place.st.st_mtime_ns, place.st.st_size)


def cannot_be(origin: Origin, home: os.stat_result, found: Place) -> bool:
    """Whether it is certain that a home was not copied from this file, in any mount."""
    if found.st.st_ino != origin.ino or st_mod.S_IFMT(found.st.st_mode) != st_mod.S_IFMT(home.st_mode):
        return True
    return origin.life.isdigit() and found.birth_ns() not in (0, int(origin.life))


def is_source(origin: Origin, home: Place, found: Place, in_order: bool) -> bool:
    """Whether the file `found` on a lower branch is the one that `home` was copied from.

    in_order: its number in the mount is the one in the home's name, or it has been recognised in this mount.
    """
    st = found.st
    if st.st_ino != origin.ino or st_mod.S_IFMT(st.st_mode) != st_mod.S_IFMT(home.st.st_mode):
        return False
    if origin.life.isdigit():
        return found.birth_ns() == int(origin.life)
    if not in_order:
        return False
    return origin.life == _life(found, found.birth_ns()) if origin.life else _may_be(home, found)


def _may_be(home: Place, found: Place) -> bool:
    """`is_source` for a name without a life.

    What was born after the copy was made (no birth time: was changed after it) is a later life of the number. A home
    may have come out of a backup, though, and is younger then than any file: if nobody has written to it since,
    it must still look like its source. Without a birth time of the home nothing can be known.
    """
    made = home.birth_ns()
    if found.st.st_nlink < 2 or (found.birth_ns() or found.st.st_ctime_ns) > made:
        return False
    copy = home.st
    return copy.st_mtime_ns >= made or (copy.st_mtime_ns, copy.st_size) == (found.st.st_mtime_ns, found.st.st_size)
