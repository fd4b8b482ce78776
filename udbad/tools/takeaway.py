"""The second half of moving a branch down: taking away what is equal on the lower branch by now (see syncdown.py).

What was merged down waits here until there is enough to be worth a sync of the lower file system. Then each
name is looked at once more, on the event loop, and goes from the upper branch if nobody has changed it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Final

from udbad.branch import datacalls, syscalls, walk, whiteout
from udbad.branch.branches import Branch
from udbad.branch.state import ObjectStamp, object_stamp, same_content, stamp
from udbad.errors import REPLACED, os_error
from udbad.inodes.node import Dir
from udbad.tools import carry
from udbad.tools.carry import Changed, Copy, Halt, InUse, Work
from udbad.union import remove
from udbad.union.superblock import Superblock

PENDING: Final = 2000
"""Names that wait for the lower file system to be synced, so that this is done once for all of them."""
VANISHED: Final = REPLACED | {errno.EAGAIN}
"""What is raised when an object was removed or replaced between two looks at it, or somebody has a lease on it."""
_KEPT: Final = frozenset({errno.EPERM, errno.EACCES, errno.EBUSY})  # it is immutable, or something is mounted there
_STRIDE: Final = 16  # names taken away before others may run
_MAX_LEFT: Final = 1000

Parts = tuple[bytes, ...]
"""The names on the way from the root of a branch."""
Steps = Generator[Work | None, None, None]
"""Runs on the event loop up to each yield, which has a thread do something first (None: lets others run)."""


@dataclass(slots=True)
class Progress:
    """How far a sync is. names, size (bytes): of the upper branch, counted at the beginning.

    synced, synced_size: names that are equal on the lower branch, and bytes of them; moved: names that are gone from
    the upper one. current: path at which it is. left: paths that have to stay, and why.
    """

    names: int = 0
    size: int = 0
    synced: int = 0
    synced_size: int = 0
    moved: int = 0
    current: bytes = b""
    left: dict[bytes, str] = field(default_factory=dict)


@dataclass(slots=True)
class File:
    """A published copy whose upper object is to go: one name, or all names of one file.

    st: the upper object as it was copied. made: stamp of the lower one; of several names only the identity counts.
    """

    names: list[tuple[Parts, bytes]]
    st: os.stat_result
    made: ObjectStamp


@dataclass(slots=True)
class Whiteout:
    """A whiteout that was applied to the lower branch. name: what it hides."""

    parts: Parts
    name: bytes


@dataclass(slots=True)
class Directory:
    """An upper directory that may be empty when its turn comes."""

    parts: Parts
    name: bytes


class TakeAway:
    """What waits to be taken away. again: whether a new pass over the upper branch could do more.

    sync_fd: of the lower file system (datacalls.syncing), for as long as something may wait.
    """

    def __init__(self, sb: Superblock, src: Branch, dst: Branch, progress: Progress, halt: Halt) -> None:
        self.sb = sb
        self.src = src
        self.dst = dst
        self.progress = progress
        self.halt = halt
        self.again = False
        self.sync_fd = -1
        self._pending: list[File | Whiteout | Directory] = []
        self._late: list[Directory] = []

    def begin(self) -> None:
        """A new pass over the upper branch."""
        self.again = False
        self.progress.left.clear()
        self._late.clear()

    def add(self, item: File | Whiteout | Directory) -> None:
        """Merged down. A directory comes after all that is in it."""
        self._pending.append(item)

    def leave(self, parts: Parts, name: bytes, reason: str, again: bool = True) -> None:
        """A name has to stay on the upper branch. again: the reason may be gone soon."""
        self.again = self.again or again
        if len(self.progress.left) < _MAX_LEFT:
            self.progress.left[b"/".join((*parts, name))] = reason

    def run_when_many(self) -> Steps:
        if len(self._pending) >= PENDING:
            yield from self._run()

    def finish(self) -> Steps:
        """Everything that waits; then once more the directories in which something was left."""
        yield from self._run()
        self._pending += self._late  # deepest first, as they came
        yield from self._run()

    def _run(self) -> Steps:
        pending, self._pending = self._pending, []
        if not pending:
            return
        yield lambda: datacalls.sync_fs(self.sync_fd)
        # After this, and after each None: directories may have been moved, so each is reached from the root again.
        for position, item in enumerate(pending):
            if position % _STRIDE == 0:
                if self.halt.asked:
                    raise os_error(errno.ECANCELED)
                yield None
            self._take(item)
        for parts in sorted({_parts(item) for item in pending}, key=len, reverse=True):
            carry.release(self.sb, parts)

    def _take(self, item: File | Whiteout | Directory) -> None:
        names = item.names if isinstance(item, File) else [(item.parts, item.name)]
        self.progress.current = b"/".join((*names[0][0], names[0][1]))
        try:
            if isinstance(item, File):
                self._take_file(item)
                self.progress.moved += len(item.names)
            elif isinstance(item, Whiteout):
                self._take_whiteout(item)
                self.progress.moved += 1
            elif self._take_directory(item):
                self.progress.moved += 1
            else:
                self._late.append(item)
        except Changed as change:
            for parts, name in names:
                self.leave(parts, name, str(change), not isinstance(change, InUse))
        except OSError as error:
            if error.errno in _KEPT:
                for parts, name in names:
                    self.leave(parts, name, os.strerror(error.errno or 0), again=False)
            elif error.errno not in VANISHED:
                raise
            # else removed or moved through the mount: there is nothing to do, or the next pass finds it.

    def _open(self, parts: Parts) -> tuple[int, int]:
        src_fd = walk.descend(self.src.root_fd, list(parts))
        try:
            return src_fd, walk.descend(self.dst.root_fd, list(parts))
        except BaseException:
            os.close(src_fd)
            raise

    def _take_file(self, item: File) -> None:
        fds: list[int] = []
        try:
            names: list[tuple[Dir | None, Copy]] = []
            for parts, name in item.names:
                src_fd, dst_fd = self._open(parts)
                fds += [src_fd, dst_fd]
                parent = carry.visible(self.sb, parts, self.src, src_fd, self.dst, dst_fd)
                copy = Copy(self.src, self.dst, src_fd, dst_fd, name, item.st, b"", item.made)
                if len(item.names) > 1:
                    copy.made = _linked(dst_fd, name, item)
                names.append((parent, copy))
            carry.uncover_names(self.sb, names, self.dst)
        finally:
            for fd in fds:
                os.close(fd)

    def _take_whiteout(self, item: Whiteout) -> None:
        src_fd, dst_fd = self._open(item.parts)
        try:
            if not whiteout.hides_alone(self.src, src_fd, item.name):
                return
            there = syscalls.exists_at(dst_fd, item.name) and not whiteout.hides_alone(self.dst, dst_fd, item.name)
            if there or must_carry(self.sb, self.src, self.dst, item.parts, src_fd, dst_fd, item.name):
                raise Changed("the lower branch was changed directly")
            carry.uncover_whiteout(self.src, src_fd, item.name)
        finally:
            os.close(src_fd)
            os.close(dst_fd)

    def _take_directory(self, item: Directory) -> bool:
        src_fd, dst_fd = self._open(item.parts)
        try:
            parent = carry.visible(self.sb, item.parts, self.src, src_fd, self.dst, dst_fd)
            return carry.uncover_directory(self.sb, parent, src_fd, dst_fd, item.name, self.dst.copying)
        finally:
            os.close(src_fd)
            os.close(dst_fd)


def _parts(item: File | Whiteout | Directory) -> Parts:
    return item.names[0][0] if isinstance(item, File) else item.parts


def _linked(dirfd: int, name: bytes, item: File) -> ObjectStamp:
    """The stamp of a lower file with several names; linking them has changed its ctime. Raises Changed."""
    now = syscalls.stat_at(dirfd, name)
    same = (now.st_dev, now.st_ino) == item.made[:2]
    if not same or not same_content(stamp(now), stamp(item.st)):
        raise Changed("the copy was changed directly")
    return object_stamp(now)


def must_carry(sb: Superblock, src: Branch, dst: Branch, parts: Parts, src_fd: int, dst_fd: int, name: bytes) -> bool:
    """Whether something below `dst` would appear were the upper whiteout gone, so that `dst` needs one, too."""
    try:
        node = carry.visible(sb, parts, src, src_fd, dst, dst_fd)
    except Changed:
        node = None
    if node is None:  # not to be seen now; what was hidden must be so also when it can be
        return dst.index < len(sb.branches) - 1 and not whiteout.hides(dst, dst_fd, name)
    return remove.covered_below(sb, node, name, dst)
