"""A path walk that the kernel repeats finds its objects held, as a native one has them held all along.

Between LOOKUP and the request that follows, a name may be replaced directly. Natively the walk has a reference on what
it found and goes on with that; here nothing may lead to it any more, which is ESTALE. The kernel then walks the path
once more, asking for every name (LOOKUP_REVAL, retry_estale()), and a second ESTALE would be the program's. So what
a process finds shortly after it met ESTALE is held by a descriptor for HOLD_SECONDS. Not so directories, which have
descriptors anyway: of one that is gone ESTALE is the answer. Costs nothing while nobody meets ESTALE. Event loop only.
"""

from __future__ import annotations

import os
import stat as st_mod
from time import monotonic
from typing import Final

from udbad.branch import syscalls
from udbad.inodes.node import Dir, Node
from udbad.union import lookup
from udbad.union.superblock import Superblock, is_object

Attributes = tuple[Node, os.stat_result]

HOLD_SECONDS: Final = 1.0
_MOST: Final = 256
"""Objects held, and processes remembered, at a time; the oldest make room."""


class HeldWalks:
    """Who walks a path again, and what was found on the way."""

    def __init__(self, sb: Superblock) -> None:
        self._sb = sb
        self.callers: dict[int, float] = {}
        """Process (thread) id that met ESTALE, to the time.monotonic() until which it walks again."""

    def stale(self, pid: int) -> None:
        """A process is told ESTALE. pid 0: the kernel; it walks no path."""
        if pid:
            self.callers.pop(pid, None)
            if len(self.callers) >= _MOST:
                del self.callers[next(iter(self.callers))]
            self.callers[pid] = monotonic() + HOLD_SECONDS

    def hold(self, pid: int, parent: Dir, name: bytes, found: Attributes) -> Attributes | None:
        """What is held of a name that somebody has looked up, if that is a process that walks again.

        Another object than `found` when the name was given to one since; None when it has to be looked up once more.
        """
        node = found[0]
        now = monotonic()
        if self.callers.get(pid, 0.0) <= now:
            return found
        until = now + HOLD_SECONDS
        if type(node) is Dir:
            return found
        held = self._sb.held
        if node in held:
            held[node] = held.pop(node)[0], until  # the newest one again
        if node in held or node.orphan_fd >= 0 or node.handles:
            return found
        if len(held) >= _MOST:
            self._sb.let_go(next(iter(held)))
        try:
            fd = syscalls.pin_at(*self._sb.locate(node))
        except OSError:
            return None
        try:
            st = syscalls.fstat(fd)
            if not is_object(node, st):
                if node.plink is not None or st_mod.S_ISDIR(st.st_mode):
                    return None
                node, st = found = lookup.intern_file(self._sb, parent, name, node.branch, st)
                if node in held or node.plink is not None:
                    return found
            held[node], fd = (fd, until), -1
            return found
        finally:
            if fd >= 0:
                os.close(fd)

    def expire(self) -> bool:
        """Let go of what was held long enough; True when there is nothing left."""
        now = monotonic()
        held = self._sb.held
        for node in [node for node, (_, until) in held.items() if until <= now]:
            self._sb.let_go(node)
        for pid in [pid for pid, until in self.callers.items() if until <= now]:
            del self.callers[pid]
        return not held and not self.callers

    def close(self) -> None:
        """Let go of everything, at the end of the mount."""
        for node in list(self._sb.held):
            self._sb.let_go(node)
