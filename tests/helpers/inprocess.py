"""A union with the notify strategy in this process: no kernel, no event loop, and events only when asked for.

The test plays the kernel (`look_up` answers as edge/operations.py answers LOOKUP and keeps count) and decides
when the strategy may read its events (`coherence.drain()`), so every order of the two can be had.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.t2_core.fake_notifier import FakeNotifier, Message
from udbad.branch.accept import open_branches
from udbad.branch.branches import BranchSpec
from udbad.branch.credentials import Credentials
from udbad.branch.policy import parse_copyup, parse_create
from udbad.coherence.notify import NotifyCoherence
from udbad.types import ROOT_ID, Perm
from udbad.union.fs import UnionFs
from udbad.union.superblock import Superblock, UnionOptions


class Union:
    """Attributes: fs, coherence, notifier, and the references that the kernel would hold by node id."""

    def __init__(self, fs: UnionFs, coherence: NotifyCoherence, notifier: FakeNotifier) -> None:
        self.fs = fs
        self.coherence = coherence
        self.notifier = notifier
        self.references: Counter[int] = Counter()

    def look_up(self, parent: int, name: bytes) -> int:
        """Node id, 0 for a name that does not exist; the kernel may keep either for ever."""
        found = self.fs.lookup(parent, name)
        if found is None:
            assert self.coherence.negative_ttl(self.fs.table.directory(parent), name)
            return 0
        node, st = found
        self.coherence.attr_ttl(node, st)
        node.nlookup += 1
        self.references[node.id] += 1
        return node.id

    def list(self, node: int) -> list[bytes]:
        """READDIRPLUS of a whole directory: each entry is a reference."""
        names = []
        handle = self.fs.opendir(node)
        try:
            for name, child, st, _ in self.fs.readdir(handle.fh, 0):
                if name not in (b".", b".."):
                    self.coherence.attr_ttl(child, st)
                    child.nlookup += 1
                    self.references[child.id] += 1
                    names.append(name)
        finally:
            self.fs.releasedir(handle.fh)
        return sorted(names)

    def told(self) -> set[Message]:
        """What the kernel was told since the last time, events that wait included."""
        self.coherence.drain()
        told = set(self.notifier.told)
        self.notifier.told.clear()
        return told


@contextmanager
def notify_union(
    branches: Sequence[tuple[Path, Perm]],
    mount_point: Path,
    epochs: bool = True,
    max_fds: int = 1000,
    watch: str = "auto",
    own: Sequence[str | None] = (),
) -> Iterator[Union]:
    """A union of `branches`, top first; mount_point: a directory on which nothing is mounted; own: `watch` of the
    branches. At the end all is given back, and nothing may be left in the inode table."""
    mount_point.mkdir(exist_ok=True)
    specs = [
        BranchSpec(os.fsencode(path), permission, watch=way)
        for (path, permission), way in zip(branches, own or [None] * len(branches), strict=True)
    ]
    opened = open_branches(specs, False, os.fsencode(mount_point))
    options = UnionOptions(parse_create("tdp"), parse_copyup("tdp"), plink=False, watch=watch)
    sb = Superblock(opened, options, max_fds)
    notifier = FakeNotifier(epochs)
    coherence = NotifyCoherence(sb, notifier)
    coherence.start()
    union = Union(UnionFs(sb, Credentials()), coherence, notifier)
    try:
        yield union
        for number, count in union.references.items():
            union.fs.forget(number, count)
        assert set(sb.table.nodes) == {ROOT_ID}
    finally:
        coherence.stop()
        opened.close()
