"""Which branches a name of the union is made of (semantics 4.2): the rule, for whoever looks at branches at leisure.

resolve.resolve and view.scan apply it where each system call counts, asking no more than they need; a property test
holds them to what stands here.
"""

from __future__ import annotations

import os
import stat as st_mod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from udbad.branch import syscalls, whiteout
from udbad.errors import ABSENT, NO_DIRECTORY


class Part(Enum):
    """What the copy on one branch is for the union."""

    TOP = "top"
    """The object: its attributes and its data are the name's."""
    MERGED = "merged"
    """A directory below a directory: its names show, too."""
    SKIPPED = "skipped"
    """Something else below a directory; it does not end the search."""
    COVERED = "covered"
    """Out of range: something above has ended the search."""
    NOTHING = "nothing"
    """There is none."""


class End(Enum):
    """Why nothing below a branch counts."""

    OBJECT = "object"
    """What is no directory is not merged with anything."""
    OPAQUE = "opaque"
    WHITEOUT = "whiteout"


@dataclass(slots=True)
class Held:
    """What a branch has under one name. Marks are those that count there (Branch.whable).

    fd: of a directory, to be closed by whoever asked; -1 otherwise.
    """

    st: os.stat_result | None = None
    whiteout: bool = False
    opaque: bool = False
    fd: int = -1

    @property
    def end(self) -> End | None:
        """What ends the search at this branch, if a search comes here and finds a directory above or nothing."""
        if self.opaque:
            return End.OPAQUE
        return End.WHITEOUT if self.whiteout else None


def look(dirfd: int, name: bytes, marks: bool = True, overlay: bool = False) -> Held:
    """What a branch directory has under a name. marks: whether whiteouts and opaque marks count; overlay: those of
    overlayfs, too. Raises OSError.

    What is replaced between two calls is not there.
    """
    held = Held()
    try:
        st = syscalls.stat_at(dirfd, name)
        if st_mod.S_ISDIR(st.st_mode):
            held.fd = syscalls.open_dir_at(dirfd, name)
        if overlay and whiteout.is_device(st):
            held.whiteout = True
            return held
        held.st = st
    except NO_DIRECTORY:
        pass
    except OSError as error:
        if error.errno not in ABSENT:
            raise
    try:
        held.whiteout = marks and whiteout.present(dirfd, name)
        held.opaque = marks and held.fd >= 0 and whiteout.opaque(held.fd, overlay)
    except BaseException:
        if held.fd >= 0:
            os.close(held.fd)
        raise
    return held


def merge(branches: Iterable[Held]) -> Iterator[tuple[Part, End | None]]:
    """The rule. branches: what each has under the name, top first, those in range of the directory it is in.

    Yields for each branch what its copy is, and what ends the search there, if anything does.
    """
    top = False
    ended = False
    for held in branches:
        if ended:
            yield (Part.NOTHING if held.st is None else Part.COVERED), None
            continue
        directory = held.st is not None and st_mod.S_ISDIR(held.st.st_mode)
        if held.st is None:
            part = Part.NOTHING
        elif top:
            part = Part.MERGED if directory else Part.SKIPPED
        else:
            part, top = Part.TOP, True
        end = End.OBJECT if part is Part.TOP and not directory else held.end
        ended = end is not None
        yield part, end
