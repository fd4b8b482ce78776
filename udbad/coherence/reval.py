"""udba=reval: every access asks the branches, so an access that starts after a direct change sees it.

The kernel keeps no name, no negative name and no attribute; cached pages are dropped when size or mtime
differ at the next access (FUSE_AUTO_INVAL_DATA). Every operation on a directory resolves it from the
root down first, so that a process sitting in a directory sees what appears above it, too. Stricter
than aufs, whose reval misses cached negatives and new upper copies (semantics 8.2).

Where time stamps are exact (union/times.py), what is known of a directory is used while the times of its branch
directories are the same; elsewhere every name is probed for on every branch.
"""

from __future__ import annotations

import os

from udbad.coherence.base import Coherence
from udbad.inodes.table import Dir, Node


class RevalCoherence(Coherence):
    name = "reval"
    by_times = True

    def adopt(self, node: Dir, changed: bool) -> None:
        self.judge(node, False)

    def opened_behind(self, node: Node, st: os.stat_result) -> None:
        pass  # the kernel keeps no attributes

    def moved_in(self, node: Dir, name: bytes) -> None:
        pass  # out of another one that was never trusted
