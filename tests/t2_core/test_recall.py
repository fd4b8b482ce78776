"""A union whose process is gone is rebuilt from its record: the kernel goes on with the node ids and handles it has.

"Killed" is a union that is dropped as it is between two operations, its descriptors left to a keeper, which here is the
process itself.
"""

from __future__ import annotations

import fcntl
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.t2_core.test_trust import MODES, Chance, World, make
from udbad.branch.branches import BranchSpec
from udbad.branch.credentials import Credentials
from udbad.inodes.record import Record
from udbad.inodes.table import Dir
from udbad.types import Perm
from udbad.union import homes, recall
from udbad.union.fs import UnionFs
from udbad.union.superblock import Superblock

# -- what is to be the same ---------------------------------------------------------------------


def said(fs: UnionFs) -> dict[str, Any]:
    """All that a successor has to know."""
    table, handles = fs.table, fs.handles
    nodes: dict[int, Any] = {}
    for node in table.nodes.values():
        nodes[node.id] = [
            node.kind, node.branch.id, node.identity, node.dead, node.nlookup, node.orphan_fd >= 0,
            sorted((parent.id, name) for parent, name in node.names()),
            None if node.plink is None else (node.plink.name, node.plink.pending, node.plink.counted),
            [handle.fh for handle in node.handles or ()],
        ]  # fmt: skip
        if type(node) is Dir:
            children = {name: child.id for name, child in node.children.items() if known(child)}
            nodes[node.id] += [[layer.identity for layer in node.layers], node.listings, node.room, children]
        else:
            nodes[node.id] += [node.nlink_extra]
    files = {
        fh: (handle.node.id, handle.flags, handle.uid, handle.gid, handle.pid, handle.group, handle.writable)
        for fh, handle in handles.files.items()
    }
    opened = {fh: fcntl.fcntl(handle.fd, fcntl.F_GETFL) for fh, handle in handles.files.items()}
    directories = {
        fh: (handle.node.id, handle.pid, handle.cached, handle.base, handle.names)
        for fh, handle in handles.dirs.items()
    }
    numbers = {identity: fs.sb.inomap.entry(identity) for identity in fs.sb.inomap.entries()}
    return {
        "nodes": {number: what for number, what in nodes.items() if known(table.nodes[number])},
        "files": files,
        "opened": opened,
        "directories": directories,
        "numbers": (fs.sb.inomap.state(), numbers),
        "next handle": handles.next,
    }


def known(node: Any) -> bool:
    """Whether the kernel knows a node, or something below it."""
    if type(node) is Dir and any(known(child) for child in node.children.values()):
        return True
    return node.nlookup > 0 or bool(node.handles)


def compare(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what in before:
        if isinstance(before[what], dict):
            for key in before[what].keys() | after[what].keys():
                assert after[what].get(key) == before[what].get(key), (what, key)
        assert after[what] == before[what], what


def bury(fs: UnionFs) -> None:
    """The keeper lets go of everything, once a successor has taken it."""
    for handle in fs.handles.files.values():
        os.close(handle.fd)
    for node in fs.table.nodes.values():
        if type(node) is Dir and node is not fs.sb.root:
            fs.table.close_layers(node)
        elif node.orphan_fd >= 0:
            os.close(node.orphan_fd)
    fs.walks.close()
    homes.close(fs.sb)


# -- at random ------------------------------------------------------------------------------------


class Mortal(World):
    """A union that is killed now and then, and goes on."""

    def __init__(self, directory: Path, mode: str, epochs: bool, specs: Sequence[BranchSpec]) -> None:
        super().__init__(directory, mode, epochs, specs)
        self.record = Record.create()
        recall.keep(self.fs, self.record)
        self.recalled = 0

    def die(self) -> None:
        if self.record.changed:
            self.record.flush()  # as the answer to the last request has waited for
        before, old, mode = said(self.fs), self.fs, self.coherence
        self.sb = Superblock(self.branches, old.sb.options, max_fds=1000)
        self.fs = UnionFs(self.sb, Credentials())
        found = Record.attach(os.dup(self.record.fd))
        recall.recall(self.fs, found, os.dup)
        compare(before, said(self.fs))
        found.close()
        self.record.close()
        mode.stop()
        bury(old)
        self.record = Record.create()
        recall.keep(self.fs, self.record)
        self.start(mode.name)
        self.coherence.recalled()
        files = self.fs.handles.files
        self.handles = [files[handle.fh] for handle in self.handles]
        self.recalled += len(before["nodes"])

    def check(self) -> None:
        nodes = self.fs.table.nodes
        for node in nodes.values():
            if not node.dead and node is not self.sb.root and not node.names():
                # Open, and its last name that is known was removed, when another one was not known any more.
                self.kernel.attributes_of.pop(node.id, None)
        super().check()

    def close(self) -> None:
        super().close()
        self.record.close()


@contextmanager
def mortal(directory: Path, mode: str, epochs: bool) -> Iterator[tuple[Mortal, list[Path]]]:
    paths = [directory / f"b{number}" for number in range(3)]
    for number, path in enumerate(paths):
        path.mkdir(parents=True)
        make(path, number)
    (directory / "mnt").mkdir()
    umask = os.umask(0o022)
    perms = (Perm.RW, Perm.RO, Perm.RO)
    world = Mortal(
        directory, mode, epochs, [BranchSpec(os.fsencode(p), perm) for p, perm in zip(paths, perms, strict=True)]
    )
    try:
        yield world, paths
    finally:
        world.close()
        os.umask(umask)


SEEDS = range(3)
STEPS = 50


@pytest.mark.parametrize("epochs", [True, False], ids=["epochs", "no epochs"])
@pytest.mark.parametrize("mode", list(MODES))
def test_the_kernel_goes_on_with_what_it_has(
    tmp_path: Path, mode: str, epochs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR", "udbad.union.view")  # a name beside its whiteout
    done: Counter[str] = Counter()
    recalled = compared = 0
    for seed in SEEDS:
        with mortal(tmp_path / str(seed), mode, epochs) as (world, paths):
            chance = Chance(world, paths, seed, direct=bool(seed % 3))
            rng = random.Random(seed)
            for _ in range(STEPS):
                chance.step()
                chance.step()
                world.coherence.drain()
                world.check()
                if world.promises():
                    compared += world.check_truth()
                if rng.random() < 0.2:
                    world.die()
                    world.check()
                    assert not world.kernel.entries, "what it remembers was of before"
            done += chance.done
            recalled += world.recalled
    assert recalled > 200, done
    assert compared > 100, done
