"""udba=reval: every access asks the branches, so an access that starts after a direct change sees it.

The kernel keeps no name, no negative name and no attribute; cached pages are dropped when size or mtime
differ at the next access (FUSE_AUTO_INVAL_DATA). Every operation on a directory resolves it from the
root down first, so that a process sitting in a directory sees what appears above it, too. Stricter
than aufs, whose reval misses cached negatives and new upper copies (semantics 8.2).

What is known of a directory is used while its watches say nothing (coherence/silence.py). Where it has none, or they
have told of a change, while the times of its branch directories are the same, if time stamps are exact
(union/times.py); elsewhere every name is probed for on every branch.
"""

from __future__ import annotations

import os

from udbad.branch.branches import Branch
from udbad.coherence.base import Coherence, CoherenceStatistics, KernelNotifier
from udbad.coherence.inotify import watch_limit
from udbad.coherence.silence import Silence
from udbad.inodes.node import Dir, Node
from udbad.inodes.table import Census
from udbad.union.superblock import Superblock


class RevalCoherence(Coherence):
    name = "reval"
    by_times = True

    def __init__(self, sb: Superblock, notifier: KernelNotifier) -> None:
        super().__init__(sb, notifier)
        self._silence: Silence | None = None

    def start(self) -> None:
        self._silence = silence = Silence(self.sb)
        self.catch_up = silence.catch_up  # type: ignore[method-assign]  # without a step in between: for each request
        self.listen = silence.listen  # type: ignore[method-assign]
        super().start()

    def stop(self) -> None:
        super().stop()
        if self._silence is not None:
            self._silence.close()
            self._silence = None

    def adopt(self, node: Dir, changed: bool) -> None:
        self.judge(node, False)

    def opened_behind(self, node: Node, st: os.stat_result) -> None:
        pass  # the kernel keeps no attributes

    def dropped(self, node: Node) -> None:
        if self._silence is not None:
            self._silence.forget(node)

    def shrink(self) -> None:
        if self._silence is not None:
            self._silence.shrink()

    def own_event(self, node: Dir, branch: Branch, name: bytes, event: int) -> None:
        if self._silence is not None:
            self._silence.expect(node, branch, name, event)

    def moved_in(self, node: Dir, name: bytes) -> None:
        pass  # out of another one that was never trusted

    def statistics(self, census: Census | None = None) -> CoherenceStatistics:
        watches = 0 if self._silence is None else len(self._silence)
        return CoherenceStatistics(self.name, watches=watches, watch_limit=watch_limit())
