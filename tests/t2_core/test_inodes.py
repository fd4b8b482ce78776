"""The inode table against a plain counter model, and the properties of the inode numbers.

Precondition of the table that the rules keep: something is attached only below a directory on which
the kernel holds a reference, because the kernel names a parent only while it does.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.helpers.profile import scaled
from udbad.branch.branches import Branch
from udbad.inodes import inomap as inomap_module
from udbad.inodes.inomap import Identity, InoMap
from udbad.inodes.node import Dir, Layer, Node
from udbad.inodes.table import InodeTable
from udbad.types import ROOT_ID, Perm

BRANCH = Branch(0, 0, b"/nowhere", Perm.RW, frozenset(), None, -1, -1, 0, "tmpfs")
MAX_FDS = 5
LAYERS = 2
"""Branch directories of every directory made here."""

NAMES = (b"a", b"b", b"c")

Name = tuple[int, bytes]
"""Node id of the directory, and the name in it."""


@dataclass
class Known:
    """What the model knows of one node: kernel references, open files, names."""

    is_dir: bool
    references: int = 0
    handles: int = 0
    names: set[Name] = field(default_factory=set)


def open_layers() -> list[Layer]:
    return [Layer(BRANCH, 1, number, 2, os.open("/", os.O_PATH | os.O_CLOEXEC)) for number in range(LAYERS)]


def bare_root() -> Dir:
    """A root whose one branch directory is not really open."""
    return Dir(ROOT_ID, [Layer(BRANCH, 1, 1, 2, -1)])


class Table(RuleBasedStateMachine):
    """Operations as the kernel causes them, on the table and on the model."""

    def __init__(self) -> None:
        super().__init__()
        self.descriptors = len(os.listdir("/proc/self/fd"))
        self.root = Dir(ROOT_ID, open_layers())
        self.table = InodeTable(self.root, MAX_FDS)
        self.dropped: list[int] = []
        self.table.on_drop = lambda node: self.dropped.append(node.id)  # type: ignore[method-assign]  # its callback
        self.model: dict[int, Known] = {ROOT_ID: Known(True, references=1)}
        self.gone: list[int] = []
        self.ids = count(2)

    # -- the model ----------------------------------------------------------------------------

    def child(self, place: Name) -> int | None:
        return next((number for number, known in self.model.items() if place in known.names), None)

    def children(self, parent: int) -> list[int]:
        return [number for number, known in self.model.items() if any(above == parent for above, _ in known.names)]

    def settle(self) -> None:
        """Drop whatever nobody needs any more, until nothing changes."""
        while True:
            unneeded = [
                number
                for number, known in self.model.items()
                if number != ROOT_ID and not known.references and not known.handles and not self.children(number)
            ]
            if not unneeded:
                return
            for number in unneeded:
                del self.model[number]
                self.gone.append(number)

    def is_below(self, number: int, ancestor: int) -> bool:
        while number != ancestor:
            above = [parent for parent, _ in self.model[number].names]
            if not above:
                return False
            number = above[0]
        return True

    # -- what the draws choose from -------------------------------------------------------------

    def parents(self) -> list[int]:
        return [number for number, known in self.model.items() if known.is_dir and known.references]

    def place(self, data: st.DataObject) -> Name:
        return data.draw(st.sampled_from(self.parents())), data.draw(st.sampled_from(NAMES))

    def some(self, data: st.DataObject, is_dir: bool | None = None) -> int:
        return data.draw(st.sampled_from(self.fitting(is_dir)))

    def fitting(self, is_dir: bool | None = None) -> list[int]:
        return [n for n, known in self.model.items() if n != ROOT_ID and is_dir in (None, known.is_dir)]

    def directory(self, number: int) -> Dir:
        node = self.table.directory(number)
        assert node.id == number
        return node

    # -- rules --------------------------------------------------------------------------------

    def attach(self, number: int, place: Name) -> None:
        """On both sides; a name that was something else lets go of it, a directory has one name only."""
        node = self.table.node(number)
        self.table.attach(node, self.directory(place[0]), place[1])
        known = self.model[number]
        old = self.child(place)
        if old is not None and old != number:
            self.model[old].names.discard(place)
        if known.is_dir:
            known.names.clear()
        known.names.add(place)

    @rule(data=st.data(), is_dir=st.booleans())
    def look_up_something_new(self, data: st.DataObject, is_dir: bool) -> None:
        place = self.place(data)
        number = next(self.ids)
        node: Node
        node = Dir(number, open_layers()) if is_dir else Node(number, stat.S_IFREG, BRANCH, 1, number)
        self.table.add(node)
        if isinstance(node, Dir):
            self.table.open_fds += LAYERS
            self.table.note_fds(node)
        node.nlookup += 1  # before attaching, or the model would have to know who else lets go meanwhile
        self.model[number] = Known(is_dir, references=1)
        self.attach(number, place)
        self.settle()

    @precondition(lambda self: bool(self.fitting()))
    @rule(data=st.data(), times=st.integers(1, 5))
    def look_up_again(self, data: st.DataObject, times: int) -> None:
        number = self.some(data)
        self.table.node(number).nlookup += times
        self.model[number].references += times

    @precondition(lambda self: bool(self.fitting(False)))
    @rule(data=st.data())
    def another_name(self, data: st.DataObject) -> None:
        """A hard link, found or made."""
        number = self.some(data, is_dir=False)
        self.attach(number, self.place(data))
        self.settle()

    @precondition(lambda self: bool(self.fitting(True)))
    @rule(data=st.data())
    def move_directory(self, data: st.DataObject) -> None:
        number = self.some(data, is_dir=True)
        place = self.place(data)
        old = self.child(place)
        replaces_full = old not in (None, number) and bool(self.children(old or 0))
        if self.is_below(place[0], number) or replaces_full:
            return  # rename(2): EINVAL, ENOTEMPTY
        self.attach(number, place)
        self.settle()

    @precondition(lambda self: any(self.model[n].names for n in self.fitting()))
    @rule(data=st.data())
    def remove_name(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from([n for n in self.fitting() if self.model[n].names]))
        known = self.model[number]
        place = data.draw(st.sampled_from(sorted(known.names)))
        self.table.detach(self.table.node(number), self.directory(place[0]), place[1])
        known.names.discard(place)
        self.settle()

    @precondition(lambda self: bool(self.fitting(False)))
    @rule(data=st.data())
    def open_file(self, data: st.DataObject) -> None:
        number = self.some(data, is_dir=False)
        node = self.table.node(number)
        # The table only asks whether there are any.
        node.handles = [*(node.handles or []), cast("Any", object())]
        self.model[number].handles += 1

    @precondition(lambda self: any(known.handles for known in self.model.values()))
    @rule(data=st.data())
    def close_file(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from([n for n, known in self.model.items() if known.handles]))
        node = self.table.node(number)
        assert node.handles is not None
        node.handles.pop()
        self.model[number].handles -= 1
        if not node.handles:
            node.handles = None
            self.table.release_handles(node)
        self.settle()

    @precondition(lambda self: any(self.model[n].references for n in self.fitting()))
    @rule(data=st.data(), whole=st.booleans())
    def forget(self, data: st.DataObject, whole: bool) -> None:
        number = data.draw(st.sampled_from([n for n in self.fitting() if self.model[n].references]))
        references = self.model[number].references
        lost = references if whole else data.draw(st.integers(1, references))
        self.model[number].references -= lost
        self.table.forget(number, lost)
        self.settle()

    @rule(distance=st.integers(0, 5))
    def forget_of_an_unknown_id_is_ignored(self, distance: int) -> None:
        number = self.gone[distance] if distance < len(self.gone) else 10_000 + distance
        self.table.forget(number, 1)
        with pytest.raises(OSError, match="Stale"):
            self.table.node(number)
        with pytest.raises(OSError, match="Stale"):
            self.table.directory(number)

    @precondition(lambda self: bool(self.fitting(True)))
    @rule(data=st.data())
    def use_directory(self, data: st.DataObject) -> None:
        """Have its descriptors open again, as sb.layer_fd does."""
        node = self.directory(self.some(data, is_dir=True))
        for layer in node.layers:
            if layer.fd < 0:
                layer.fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
                self.table.open_fds += 1
        self.table.note_fds(node)

    @rule()
    def trim(self) -> None:
        self.table.trim()
        if self.table.over_budget():  # by what cannot be opened again, as it has no name
            holders = [node for node in self.table.nodes.values() if isinstance(node, Dir) and node.layers[0].fd >= 0]
            assert [node for node in holders if node.parent is not None] == []
        assert all(layer.fd >= 0 for layer in self.root.layers)

    @precondition(lambda self: len(self.model) > 8)
    @rule()
    def forget_everything(self) -> None:
        for number in sorted(self.model, reverse=True):
            known = self.model.get(number)
            if known is not None and number != ROOT_ID and known.references:
                self.table.forget(number, known.references)
                known.references = 0
        self.settle()

    # -- what must hold -------------------------------------------------------------------------

    @invariant()
    def the_table_is_the_model(self) -> None:
        assert set(self.table.nodes) == set(self.model)
        assert sorted(self.dropped) == sorted(self.gone), "each node that left was reported, once"
        for number, known in self.model.items():
            node = self.table.nodes[number]
            assert node.id == number
            if number != ROOT_ID:
                assert node.nlookup == known.references
            names = [(parent.id, name) for parent, name in node.names()]
            assert len(names) == len(set(names))
            assert set(names) == known.names
            for parent, name in node.names():
                assert self.table.nodes[parent.id] is parent, "a node's parent is in the table"
                assert parent.children[name] is node
            if isinstance(node, Dir):
                assert {child.id for child in node.children.values()} == set(self.children(number))

    @invariant()
    def descriptors_are_counted(self) -> None:
        dirs = [node for node in self.table.nodes.values() if isinstance(node, Dir)]
        held = sum(layer.fd >= 0 for node in dirs for layer in node.layers)
        statistics = self.table.statistics()
        assert held == self.table.open_fds == statistics.directory_fds
        assert (statistics.nodes, statistics.directories) == (len(self.model), len(dirs))

    def teardown(self) -> None:
        for number, known in list(self.model.items()):
            if known.handles:
                node = self.table.nodes[number]
                node.handles = None
                known.handles = 0
                self.table.release_handles(node)
        self.settle()
        self.forget_everything()
        assert set(self.table.nodes) == {ROOT_ID}
        assert self.root.children == {}
        self.table.close_layers(self.root)
        assert len(os.listdir("/proc/self/fd")) == self.descriptors


def test_counts_names_and_descriptors_follow_a_model() -> None:
    run_state_machine_as_test(
        Table, settings=settings(max_examples=scaled(60, 300), stateful_step_count=60, derandomize=True, database=None)
    )


def test_the_root_is_never_forgotten() -> None:
    root = bare_root()
    table = InodeTable(root, MAX_FDS)
    table.forget(ROOT_ID, 1 << 40)
    assert table.node(ROOT_ID) is root


def test_trim_prefers_what_was_not_used() -> None:
    root = bare_root()
    table = InodeTable(root, 2 * LAYERS + 1)
    cold, used, new = (Dir(number, open_layers()) for number in (2, 3, 4))
    for node in (cold, used, new):
        node.nlookup = 1
        table.add(node)
        table.attach(node, root, b"%d" % node.id)
        table.open_fds += LAYERS
        table.note_fds(node)
    cold.hot = False
    table.trim()
    assert [layer.fd for layer in cold.layers] == [-1, -1]
    assert all(layer.fd >= 0 for node in (used, new) for layer in node.layers)
    for node in (cold, used, new):
        table.forget(node.id, 1)
    assert table.open_fds == len(root.layers)


def test_a_directory_that_has_a_name_again_can_be_trimmed_again() -> None:
    """Taken away directly and found under another name: its descriptors were all that was left of it meanwhile."""
    root = bare_root()
    table = InodeTable(root, 0)
    node = Dir(7, open_layers())
    node.nlookup = 1
    table.add(node)
    table.open_fds += LAYERS
    table.note_fds(node)
    table.attach(node, root, b"a")
    table.detach(node, root, b"a")
    table.trim()
    assert all(layer.fd >= 0 for layer in node.layers)
    table.attach(node, root, b"b")
    table.trim()
    assert all(layer.fd < 0 for layer in node.layers)


def test_what_the_kernel_was_never_told_of_keeps_no_directory() -> None:
    """An entry that did not fit into a reply, a replacement found by an event: nobody will ever forget those."""
    table = InodeTable(bare_root(), MAX_FDS)
    above, below = Dir(2, open_layers()), Dir(3, open_layers())
    told, untold = (Node(number, stat.S_IFREG, BRANCH, 1, number) for number in (4, 5))
    for node, parent in ((above, table.root), (below, above), (told, above), (untold, below)):
        table.add(node)
        table.attach(node, parent, b"%d" % node.id)
    table.open_fds += 2 * LAYERS
    above.nlookup = told.nlookup = 1
    table.forget(above.id, 1)
    assert set(table.nodes) == {ROOT_ID, above.id, told.id}, "what the kernel still has stays reachable"
    table.forget(told.id, 1)
    assert set(table.nodes) == {ROOT_ID}
    assert table.open_fds == len(table.root.layers)


def test_a_file_that_lost_all_names_can_have_two_again() -> None:
    root = bare_root()
    table = InodeTable(root, MAX_FDS)
    node = Node(2, stat.S_IFREG, BRANCH, 1, 2)
    node.nlookup = 1
    table.add(node)
    for _ in range(2):
        for name in (b"a", b"b"):
            table.attach(node, root, name)
        assert sorted(node.names(), key=lambda place: place[1]) == [(root, b"a"), (root, b"b")]
        for name in (b"a", b"b"):
            table.detach(node, root, name)
        assert node.names() == []
    table.forget(2, 1)
    assert set(table.nodes) == {ROOT_ID}


def test_an_orphan_lets_its_descriptor_go() -> None:
    table = InodeTable(bare_root(), MAX_FDS)
    node = Node(2, stat.S_IFREG, BRANCH, 1, 2)
    node.orphan_fd = fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    node.nlookup = 1
    table.add(node)
    table.forget(2, 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# -- inode numbers --------------------------------------------------------------------------------

LIMIT = 1 << 48
SHORT = 1 << 32
SPARE = SHORT - (1 << 24)
EDGES = [LIMIT, SHORT, SPARE, *(1 << bits for bits in (24, 30, 31)), *((1 << bits) - (1 << 24) for bits in (30, 31))]
INODES = st.one_of(
    st.integers(0, 20), st.builds(int.__add__, st.sampled_from(EDGES), st.integers(-3, 3)),
    st.sampled_from([1 << 63, (1 << 64) - 1]), st.integers(2),
)  # fmt: skip
IDENTITIES = st.tuples(st.integers(0, 4), INODES.filter(lambda ino: ino < 1 << 64))
SETS = st.lists(IDENTITIES, unique=True, min_size=1, max_size=30)


def is_number(number: int) -> bool:
    return 1 < number < 1 << 64


@given(SETS, st.integers(1, 100), st.randoms(use_true_random=False))
def test_numbers_are_unique_and_stable(identities: list[Identity], file_systems: int, random: Any) -> None:
    numbers = InoMap(file_systems)
    first = {identity: numbers.number(*identity) for identity in identities}
    assert all(map(is_number, first.values()))
    assert len(set(first.values())) == len(first)
    assert all(numbers.branch_ino(first[dev, ino]) == (ino if 1 < ino < LIMIT else 0) for dev, ino in identities)
    random.shuffle(identities)
    assert {identity: numbers.number(*identity) for identity in identities} == first


@given(SETS)
def test_only_what_does_not_fit_costs_memory(identities: list[Identity]) -> None:
    numbers = InoMap()
    for identity in identities:
        numbers.number(*identity)
    assert len(numbers) == sum(not 1 < ino < LIMIT for _, ino in identities)


@given(st.lists(st.integers(2, LIMIT - 1) | st.integers(SPARE - 3, SPARE) | st.integers(SHORT, SHORT + 3), min_size=1))
def test_one_file_system_keeps_its_own_numbers(inodes: list[int]) -> None:
    """But for the last ones below 2**32, which are the spare ones."""
    numbers = InoMap()
    inodes = [ino for ino in inodes if not SPARE <= ino < SHORT]
    assert [numbers.number(7, ino) for ino in inodes] == inodes


@given(st.integers(1, 64), st.data())
def test_short_numbers_stay_short_and_as_they_are_when_file_systems_are_added(few: int, data: st.DataObject) -> None:
    """Below 2**32 with as many bits for each file system as there are file systems for."""
    for file_systems, size in ((few, (1 << 32 - (few - 1).bit_length()) - (1 << 24)), (64, (1 << 26) - (1 << 24))):
        inodes = data.draw(st.lists(st.integers(2, size - 1), min_size=1, max_size=5))
        less, more = InoMap(few), InoMap(file_systems)
        for ino in inodes:
            numbers = [less.number(dev, ino) for dev in range(few)]
            assert numbers == [more.number(dev, ino) for dev in range(few)]
            assert max(numbers) < SHORT


def test_spare_numbers_are_short_until_they_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = InoMap(2)
    assert numbers.fresh(1, 2) == SPARE
    monkeypatch.setattr(numbers, "_next_spare", SHORT - 3)
    assert [numbers.fresh(1, ino) for ino in range(3, 7)] == [SHORT - 3, SHORT - 2, 1 << 63, (1 << 63) + 1]


@given(SETS, st.data())
def test_an_alias_takes_the_number_over_and_disturbs_nobody(identities: list[Identity], data: st.DataObject) -> None:
    numbers = InoMap()
    before = {identity: numbers.number(*identity) for identity in identities}
    home = data.draw(st.sampled_from(identities))
    copy = data.draw(IDENTITIES)
    numbers.alias(*copy, before[home])
    assert numbers.number(*copy) == before[home]
    assert {i: numbers.number(*i) for i in identities if i != copy} == {i: n for i, n in before.items() if i != copy}


@given(IDENTITIES)
def test_an_alias_to_the_own_number_costs_nothing(identity: Identity) -> None:
    numbers = InoMap()
    number = numbers.number(*identity)
    before = len(numbers)
    numbers.alias(*identity, number)
    assert (numbers.number(*identity), len(numbers)) == (number, before)


@given(SETS, st.data())
def test_a_fresh_number_is_new_and_stays(identities: list[Identity], data: st.DataObject) -> None:
    """What is dropped may come back as another object, which never gets a number that was given out as a spare."""
    numbers = InoMap()
    handed_out = {numbers.number(*identity) for identity in identities}
    for _ in range(data.draw(st.integers(1, 10))):
        identity = data.draw(st.sampled_from(identities))
        if data.draw(st.booleans()):
            numbers.drop(*identity)
        number = numbers.fresh(*identity)
        assert is_number(number)
        assert number not in handed_out
        assert numbers.number(*identity) == number
        handed_out.add(number)


@given(SETS, st.data())
def test_a_dropped_object_leaves_nothing(identities: list[Identity], data: st.DataObject) -> None:
    numbers = InoMap()
    plain = {identity: numbers.number(*identity) for identity in identities}
    for identity in data.draw(st.lists(st.sampled_from(identities))):
        numbers.alias(*identity, data.draw(st.sampled_from(sorted(plain.values()))))
    for identity in identities:
        numbers.drop(*identity)
    assert len(numbers) == 0
    for (dev, ino), number in plain.items():
        again = numbers.number(dev, ino)
        # A computed number comes back; a spare one is never given a second time.
        assert (again == number) if 1 < ino < LIMIT else again not in plain.values()


@pytest.fixture
def few_file_systems(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(inomap_module, "_MAX_FS", 2)
    return 2


def test_more_file_systems_than_fit(few_file_systems: int) -> None:
    numbers = InoMap()
    identities = [(dev, ino) for dev in range(3 * few_file_systems) for ino in range(2, 30)]
    first = [numbers.number(*identity) for identity in identities]
    assert len(set(first)) == len(first)
    assert [numbers.number(*identity) for identity in identities] == first
    assert len(numbers) == 2 * few_file_systems * 28


def test_the_table_gives_up_what_nobody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount lives for months, and files that were copied up are removed directly without anybody's telling."""
    monkeypatch.setattr(inomap_module, "ENTRIES", 100)
    numbers = InoMap()
    known: set[int] = set()
    numbers.in_use = known.__contains__
    kept = {}
    for ino in range(2, 10_000):
        numbers.alias(7, ino, ino + 100_000)
        if ino % 100 == 0:
            known.add(ino + 100_000)
            kept[ino] = ino + 100_000
        assert numbers.number(7, ino) == ino + 100_000, "the newest one is always there"
    assert len(numbers) <= 2 * len(known) + 100
    assert {ino: numbers.number(7, ino) for ino in kept} == kept
    assert numbers.number(7, 5) == InoMap().number(7, 5), "its own number"
