"""Whether names on lower branches may lead to the home of a pseudo-link that has no other name on its own branch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing

from udbad.branch import origin, whiteout
from udbad.branch.layers import look
from udbad.branch.origin import Origin, Place
from udbad.branch.spec import printable
from udbad.branch.walk import descend, join, objects_in, stat_or_none, walk


def shown_by(
    root_fd: int, homes: Sequence[tuple[bytes, os.stat_result]], lower_fds: Sequence[int]
) -> dict[bytes, str]:  # fmt: skip
    """Homes that some name on a lower branch may lead to, and in words why. In doubt one does.

    homes: name in .wh..wh.plnk and status of each. What cannot be read may lead to any.
    """
    wanted: dict[int, list[tuple[bytes, os.stat_result, Origin]]] = {}
    for name, st in homes:
        said = origin.parse(name)
        if said is not None:
            wanted.setdefault(said.ino, []).append((name, st, said))
    shown: dict[bytes, str] = {}

    def doubt(path: bytes, error: OSError) -> None:
        for home, _ in homes:
            shown.setdefault(home, f"perhaps: {printable(path)} of a lower branch: {error.strerror}")

    def look(dirfd: int, path: bytes, name: bytes, ino: int) -> None:
        for home, home_st, said in wanted.get(ino, ()):
            st = stat_or_none(dirfd, name)
            if st is not None and not origin.cannot_be(said, home_st, Place(dirfd, name, st)):
                shown[home] = f"shown by {printable(path)} of a lower branch"

    for lower_fd in lower_fds:
        for name, st in objects_in(lower_fd, whiteout.PLINK_DIR, doubt):  # a home that was copied up again
            dirfd = descend(lower_fd, [whiteout.PLINK_DIR])
            try:
                look(dirfd, join(whiteout.PLINK_DIR, name), name, st.st_ino)
            finally:
                os.close(dirfd)
        with closing(walk(lower_fd, doubt)) as directories:
            for directory, fd, entries in directories:
                for name, entry in entries.items():
                    path = join(directory, name)
                    try:
                        if entry.inode() in wanted and not _covered(root_fd, path):
                            look(fd, path, name, entry.inode())
                    except OSError as error:
                        doubt(path, error)
    return shown


def _covered(root_fd: int, path: bytes) -> bool:
    """Whether the branch itself has something at this path of a lower branch, or hides what is there."""
    names = path.split(b"/")
    fd = os.dup(root_fd)
    try:
        for name in names:
            held = look(fd, name)
            if held.fd >= 0:
                os.close(fd)
                fd = held.fd
            if held.st is None or held.end is not None or held.fd < 0:
                return held.st is not None or held.whiteout
    finally:
        os.close(fd)
    return True
