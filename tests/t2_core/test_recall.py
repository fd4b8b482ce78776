"""A union whose process is gone is rebuilt from its record: the kernel goes on with the node ids and handles it has.

"Killed" is a union that is dropped as it is between two operations, its descriptors left to a keeper, which here is the
process itself.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.t2_core.core import STRATEGIES, Core, core
from tests.t2_core.fake_notifier import Message
from tests.t2_core.test_trust import MODES, Chance, World, three_branches
from udbad import compiled
from udbad.branch import syscalls
from udbad.branch.branches import BranchSpec
from udbad.branch.credentials import Credentials
from udbad.coherence.base import Coherence
from udbad.inodes import journal
from udbad.inodes.handles import OpenFile
from udbad.inodes.journal import Negative
from udbad.inodes.node import Dir, Layer, Node
from udbad.inodes.record import Record
from udbad.types import Perm
from udbad.union import homes, recall
from udbad.union.fs import SetAttr, UnionFs
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
            listings = [(first, count, names and list(names)) for first, count, names in node.listings]
            nodes[node.id] += [[layer.identity for layer in node.layers], listings, node.room, children]
        else:
            nodes[node.id] += [node.nlink_extra]
    files = {
        fh: (handle.node.id, handle.flags, handle.uid, handle.gid, handle.pid, handle.group, handle.writable)
        for fh, handle in handles.files.items()
    }
    opened = {fh: fcntl.fcntl(handle.fd, fcntl.F_GETFL) for fh, handle in handles.files.items()}
    directories = {
        fh: (handle.node.id, handle.pid, handle.cached, handle.base, handle.names and list(handle.names))
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
    fs.handles.files.clear()
    for node in fs.table.nodes.values():
        if type(node) is Dir and node is not fs.sb.root:
            fs.table.close_layers(node)
        elif node.orphan_fd >= 0:
            os.close(node.orphan_fd)
            node.orphan_fd = -1
    fs.walks.close()
    homes.close(fs.sb)


def succeed(core: Core, fs: UnionFs, record: Record, bury: Callable[[UnionFs], None]) -> Record:
    """What was recalled, `fs`, is the union of `core` from now on, and its predecessor is buried; the new record."""
    old = core.fs
    old.sb.changes.hooks.stop()  # type: ignore[attr-defined]  # a whole strategy
    fs.table.read_all()
    bury(old)
    record.close()
    record = Record.create()
    recall.keep(fs, record)
    core.fs = fs
    strategy = STRATEGIES[old.sb.changes.hooks.name](fs.sb, core.notifier)  # type: ignore[attr-defined]
    strategy.start()
    strategy.recalled()
    return record


# -- at random ------------------------------------------------------------------------------------


class Mortal(World):
    """A union that is killed now and then, and goes on."""

    def __init__(self, directory: Path, mode: str, epochs: bool, specs: Sequence[BranchSpec]) -> None:
        super().__init__(directory, mode, epochs, specs)
        self.record = Record.create()
        recall.keep(self.fs, self.record)
        self.recalled = self.deaths = self.lazy = 0
        self._dead: list[tuple[UnionFs, Record]] = []

    def die(self) -> None:
        """Every other time all is recalled at once, and compared."""
        if self.record.changed:
            self.record.flush()  # as the answer to the last request has waited for
        before = said(self.fs) if self.sb.table.unread is None else {"nodes": ()}
        mode = self.coherence
        self._dead.append((self.fs, self.record))
        self.sb = Superblock(self.branches, self.sb.options, max_fds=1000)
        self.fs = UnionFs(self.sb, Credentials())
        self.deaths += 1
        with nullcontext() if self.deaths % 3 else patch.object(compiled, "why_not", lambda: "every other time"):
            recalled = recall.recall(self.fs, self.record, (os.dup,))
        if before["nodes"] and self.deaths % 2:
            self.sb.table.read_all()
            compare(before, said(self.fs))
        mode.stop()
        self.record = Record.create()
        recall.keep(self.fs, self.record, recalled)
        self.start(mode.name)
        with patch.object(self.kernel, "everything", wraps=self.kernel.everything) as asked:
            self.coherence.recalled()
        assert asked.call_count == 1, "each time all mount namespaces are looked through"
        files = self.fs.handles.files
        self.handles = [files[handle.fh] for handle in self.handles]
        self.recalled += len(before["nodes"])
        self.bury()

    def bury(self) -> None:
        """Let go of the dead, once nobody can need anything of them."""
        self.lazy += self.sb.table.unread is not None
        if self.sb.table.unread is None:
            for fs, _ in self._dead:
                fs.table.unread = None
            for fs, record in self._dead:
                bury(fs)
                record.close()
            self._dead.clear()

    def check(self) -> None:
        nodes = self.fs.table.nodes
        for node in nodes.values():
            if not node.dead and node is not self.sb.root and not node.names():
                # Open, and its last name that is known was removed, when another one was not known any more.
                self.kernel.attributes_of.pop(node.id, None)
        super().check()

    def close(self) -> None:
        self.sb.table.read_all()
        self.bury()
        super().close()
        self.record.close()


@contextmanager
def mortal(directory: Path, mode: str, epochs: bool) -> Iterator[tuple[Mortal, list[Path]]]:
    paths = three_branches(directory)
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
    recalled = compared = unread = 0
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
                elif rng.random() < 0.1:
                    world.sb.table.read_all()
                    world.bury()
            done += chance.done
            recalled += world.recalled
            unread += world.lazy
    assert bool(unread) == (epochs and not compiled.why_not())
    assert recalled > 200, done
    assert compared > 100, done


# -- one by one -------------------------------------------------------------------------------------


@dataclass
class Lives:
    """A union by direct calls (core.py) that is killed and goes on; `core` is the living one."""

    core: Core
    record: Record
    _dead: list[UnionFs] = field(default_factory=list)

    def die(self, without: Callable[[], object] | None = None) -> None:
        """Killed, and recalled. without: what happens on the branches meanwhile."""
        if self.record.changed:
            self.record.flush()
        core = self.core
        before, old = said(core.fs), core.fs
        sb = Superblock(old.sb.branches, old.sb.options, max_fds=1000)
        homes.load(sb)
        fs = UnionFs(sb, old.creds)
        if without is not None:
            without()
        recall.recall(fs, self.record, (os.dup,))
        fs.table.read_all()
        compare(before, said(fs))
        self.record = succeed(core, fs, self.record, bury)

    def handle(self, handle: OpenFile) -> OpenFile:
        """The one of now."""
        return self.core.fs.handles.file(handle.fh)


@pytest.fixture(params=list(STRATEGIES))
def lives(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lives]:
    (tmp_path / "base/d/s").mkdir(parents=True)
    for name in ("f", "d/f", "d/g"):
        (tmp_path / "base" / name).write_text(name)
    os.link(tmp_path / "base/f", tmp_path / "base/hard")
    with core(tmp_path, udba=request.param) as made:
        record = Record.create()
        recall.keep(made.fs, record)
        lives = Lives(made, record)
        try:
            yield lives
        finally:
            made.fs.sb.changes.hooks.stop()  # type: ignore[attr-defined]  # as above
            bury(made.fs)
            lives.record.close()


def test_the_kernel_is_told_of_every_file(lives: Lives) -> None:
    union = lives.core
    opened, rest = union.open("d/f").node, [union.find(name) for name in ("f", "d/g")]
    for node in rest:
        node.nlookup = 1
    strategy, told = union.fs.sb.changes.hooks, union.notifier.told
    assert isinstance(strategy, Coherence)
    told.clear()
    strategy.recalled()
    assert {Message("epoch"), Message("data", opened.id)} <= set(told)
    assert {Message("attributes", node.id) for node in rest} <= set(told)
    union.fs.sb.kernel_opens = True  # files without a handle may be open, too
    told.clear()
    strategy.recalled()
    assert {Message("data", node.id) for node in (opened, *rest)} <= set(told)


def test_a_number_of_a_node_is_given_to_no_other(lives: Lives) -> None:
    """A process that is killed within a flush has written the node, and not that its number was given."""
    union = lives.core
    before = union.sb.inomap.state()
    number = union.sb.inomap.fresh(1, 1)
    node = Node(number, stat.S_IFREG, union.sb.branches[0], 1, 1)
    union.sb.table.add(node)
    union.sb.table.refer(node)
    union.sb.inomap.restore(before, {})
    lives.record.flush()
    sb = Superblock(union.sb.branches, union.sb.options, max_fds=1000)
    recall.recall(UnionFs(sb, union.fs.creds), lives.record, (os.dup,))
    sb.table.read_all()
    assert number in sb.table.nodes
    assert sb.inomap.fresh(1, 2) == number + 1


def test_what_the_kernel_may_have_open_is_known_before_its_name_goes(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets no handle with io=cached, so whoever is killed after the system call has to have said what it keeps."""
    union = lives.core
    union.fs.keep_files(64)
    union.fs.handles.remove_file(union.create("gone", b"kept").fh)
    node = union.find("gone")
    union.fs.table.refer(node)
    lives.record.flush()
    unlink_at = syscalls.unlink_at
    known: set[int] = set()

    def unlink(dirfd: int, name: bytes) -> None:
        opened = [payload for payload, _ in lives.record.entries() if payload[0] == journal.OPEN_FILE]
        known.update(journal.OPENED.unpack_from(payload)[6] for payload in opened)
        unlink_at(dirfd, name)

    monkeypatch.setattr(syscalls, "unlink_at", unlink)
    union.unlink("gone")
    assert -node.id in known


def test_open_files_are_what_they_were(lives: Lives) -> None:
    union = lives.core
    lower = union.open("d/f", os.O_RDWR)  # read-only underneath, until it is written to
    copied = union.open("d/g", os.O_RDWR | os.O_APPEND)
    union.write(copied, b"+")
    deleted, reader = union.create("gone", b"kept"), union.open("gone")
    union.unlink("gone")
    nameless = union.tmpfile(content=b"nameless")
    last = max(handle.fh for handle in (lower, copied, deleted, reader, nameless))
    for _ in range(2):
        lives.die()
        assert not lives.handle(lower).writable
        assert [union.read(lives.handle(one)) for one in (deleted, reader, nameless)] == [b"kept", b"kept", b"nameless"]
    union.write(lives.handle(deleted), b"K")
    assert union.read(lives.handle(reader)) == b"Kept"
    union.write(lives.handle(lower), b"D")
    assert (union["top"] / "d/f").read_bytes() == b"D/f"
    union.write(lives.handle(copied), b"+", 0)
    assert (union["top"] / "d/g").read_bytes() == b"d/g++", "O_APPEND"
    union.publish(lives.handle(nameless), "named")
    assert union.content("named") == b"nameless"
    assert union.open("named").fh > last
    with pytest.raises(FileNotFoundError):
        union.find("gone")


def test_a_copy_keeps_the_number_of_what_it_was_copied_from(lives: Lives) -> None:
    union = lives.core
    number = union.find("d/f").id
    union.run(lambda: union.fs.setattr(number, SetAttr(mode=0o600), None, union.caller))
    above = union.find("d")
    spare = [union.sb.inomap.fresh(1 << 40, inode) for inode in range(3)]
    lives.die()
    assert union.find("d/f").id == number
    assert union.find("d").id == above.id
    assert union.sb.inomap.fresh(1 << 40, 9) not in spare
    assert union.sb.inomap.number(1 << 40, 1) == spare[1]


def test_the_names_of_a_copied_file_lead_to_its_home(lives: Lives) -> None:
    union = lives.core
    writer = union.open("f", os.O_RDWR)
    union.write(writer, b"new")
    links = union.find("f").nlink_extra
    lives.die()
    assert union.content("hard") == b"new"
    assert union.find("hard").id == union.find("f").id
    assert union.find("f").nlink_extra == links == 0
    union.unlink("f")
    lives.die()
    assert union.content("hard") == b"new"
    union.unlink("hard")
    assert union.find("").id == 1
    assert not list((union["top"] / ".wh..wh.plnk").iterdir()), "the last name takes the home along"


def test_a_current_directory_that_was_removed(lives: Lives) -> None:
    union = lives.core
    made = union.mkdir("new")
    union.rmdir("new")
    moved = union.mkdir("old")
    union.rename("old", "d/young")
    lives.die()
    node, st = union.fs.getattr(made.id)
    assert (node.dead, st.st_ino) == (True, made.ino)
    assert union.fs.lookup(made.id, b"x") is None
    assert union.find("d/young").id == moved.id


def test_a_listing_goes_on_where_it_was(lives: Lives) -> None:
    union = lives.core
    for number in range(20):
        union.create(f"d/n{number}")
    handle = union.run(lambda: union.fs.opendir(union.find("d").id))
    first = list(itertools.islice(union.fs.readdir(handle.fh, 0), 9))
    for name in ("n3", "n17"):
        union.unlink(f"d/{name}")
    union.create("d/later")
    lives.die()
    rest = list(union.fs.readdir(handle.fh, first[-1][3]))
    names = [name for name, *_ in (*first, *rest)]
    assert len(names) == len(set(names))
    assert {b"n%d" % number for number in range(20)} - {b"n3", b"n17"} <= set(names)
    assert b"later" not in names, "it came after the snapshot"
    again = [name for name, *_ in union.fs.readdir(handle.fh, 0)]
    assert b"later" in again
    union.fs.releasedir(handle.fh)


def test_what_changed_meanwhile_is_found(lives: Lives) -> None:
    union = lives.core
    numbers = {name: union.find(name).id for name in ("f", "d", "d/f", "d/g")}

    def meanwhile() -> None:
        (union["base"] / "d/f").unlink()
        (union["base"] / "d").rename(union["base"] / "e")
        (union["top"] / "f").write_text("above")

    lives.die(meanwhile)
    assert union.content("f") == b"above"
    assert not union.exists("d")
    assert sorted(union.names("e")) == ["g", "s"]
    assert union.find("e/g").id == numbers["d/g"]


def test_a_descriptor_of_another_object_is_not_believed(lives: Lives) -> None:
    union = lives.core
    handle = union.open("f")
    lives.record.flush()
    other = os.open(union["base"] / "d/g", os.O_RDONLY)
    with open(union["base"] / "f", "rb") as kept:
        os.dup2(other, handle.fd)
        os.close(other)
        sb = Superblock(union.sb.branches, union.sb.options, max_fds=1000)
        fs = UnionFs(sb, union.fs.creds)
        recall.recall(fs, lives.record, (os.dup,))
        fs.table.read_all()
        assert handle.fh not in fs.handles.files
        assert kept.read() == b"f"
    bury(fs)


@pytest.mark.skipif(
    bool(compiled.why_not()), reason=f"{'' if compiled.wanted() else 'ok: '}compares with what is compiled"
)
def test_compiled_and_not_the_record_is_the_same(lives: Lives) -> None:
    union, record = lives.core, lives.record
    nameless = union.tmpfile(mode=0o6755)
    for name in ("f", "d/f", "d/new"):
        union.fs.release(union.create(name).fh if name == "d/new" else union.open(name).fh)
        union.open(name, os.O_RDONLY)
    union.link("d/f", "d/linked")
    union.unlink("d/g")
    union.sb.inomap.fresh(7, 77)
    every: list[object] = [*union.sb.table.nodes.values(), *union.fs.handles.files.values(), nameless]
    every += [union.sb.inomap, *union.sb.inomap.entries(), (7, 78)]
    closed = union.open("f")
    union.fs.release(closed.fh)
    every.append(closed)
    every.append(Negative(union.sb.root, b"no such name"))
    numbers = (0, 1, -1, (1 << 31) - 1, 1 << 31, -(1 << 31), -(1 << 31) - 1, 1 << 45, (1 << 63) - 1, -(1 << 62))
    for at, number in enumerate(numbers):
        odd = Dir(
            (1 << 63) + at, [Layer(union.sb.root.branch, abs(number) % (1 << 32), 2 * abs(number) + 1, number, -1)]
        )
        odd.floor = odd.mtime_offset = number
        odd.nlink_extra = min(max(number, -(1 << 31)), (1 << 31) - 1)
        odd.opaque, odd.listed, odd.name = number or None, number > 0, b"n" * (abs(number) % 256)
        union.sb.table.add(odd)
        every.append(odd)
    assert record.quick is not None
    alone = 0
    for one in every:
        record.flush()
        before = record.size
        left = {one}
        record.quick(left, record._half)
        by_c = record._half.memory[before : record.size]
        if left:
            continue
        alone += 1
        record.changed.clear()
        before = record.size
        record.write(one)
        record._half.publish()
        assert record._half.memory[before : record.size] == by_c, one
    assert alone == len(every)
    for at in range(len(numbers)):
        union.sb.table.nodes.remove(union.sb.table.nodes[(1 << 63) + at])
