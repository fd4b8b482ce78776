"""Of a directory that is not trusted the kernel holds nothing, whatever made it lose trust; and what it holds is true.

A kernel that remembers (fake_kernel.py) works on a union while its branches, its mode and its watches change at random.
"""

from __future__ import annotations

import inspect
import logging
import os
import random
import shutil
import struct
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers.inprocess import Union
from tests.helpers.posix import EXCHANGE
from tests.t2_core.fake_kernel import FakeKernel
from tests.t2_core.fake_notifier import FakeNotifier
from tests.t2_core.test_native import Kernel
from udbad.branch.accept import open_branches
from udbad.branch.branches import BranchSet, BranchSpec
from udbad.branch.credentials import Credentials
from udbad.branch.policy import parse_copyup, parse_create
from udbad.coherence import base as base_module
from udbad.coherence import watches as watches_module
from udbad.coherence.base import Coherence
from udbad.coherence.events import Events
from udbad.coherence.none import NoneCoherence
from udbad.coherence.notify import NotifyCoherence
from udbad.coherence.reval import RevalCoherence
from udbad.coherence.watcher import Change, Watch, Watcher, WatchLimit
from udbad.inodes.handles import OpenFile
from udbad.inodes.node import Dir
from udbad.kernel import wire
from udbad.types import ROOT_CALLER, ROOT_ID, Caller, Perm
from udbad.union import reconfigure
from udbad.union.fs import SetAttr, UnionFs
from udbad.union.superblock import Superblock, UnionOptions

MODES: dict[str, type[Coherence]] = {"none": NoneCoherence, "reval": RevalCoherence, "notify": NotifyCoherence}
SEEDS = range(12)
STEPS = 60
USER = Caller(1000, 1000, os.getpid(), 0o022)
NAMES = (b"a", b"b", b"s", b"t")
DIRECTORIES: tuple[tuple[bytes, ...], ...] = ((), (b"d",), (b"e",), (b"d", b"s"), (b"e", b"s"))
PLENTY = 1000
OPTIONS = UnionOptions(parse_create("tdp"), parse_copyup("tdp"), plink=False)


def make(branch: Path, number: int) -> None:
    for directory in DIRECTORIES:
        here = branch.joinpath(*map(os.fsdecode, directory))
        if number == 1 or len(directory) < 2:
            here.mkdir(exist_ok=True)
            (here / f"f{number}").write_bytes(b"content")
            (here / "a").write_bytes(b"%d" % number)


class World:
    """A union of three branches, the kernel on it, and somebody who changes the branches directly.

    limit: how many directories may be watched. direct: whether the branches were changed behind mode none's back.
    """

    def __init__(self, directory: Path, mode: str, epochs: bool, specs: Sequence[BranchSpec]) -> None:
        self.mount_point = directory / "mnt"
        self.branches = self.open(specs)
        self.sb = Superblock(self.branches, OPTIONS, max_fds=1000)
        self.kernel = FakeKernel(epochs)
        self.fs = UnionFs(self.sb, Credentials())
        self.limit = PLENTY
        self.direct = False
        self.handles: list[OpenFile] = []
        self.start(mode)

    def open(self, specs: Sequence[BranchSpec]) -> BranchSet:
        return open_branches(list(specs), False, os.fsencode(self.mount_point))

    def start(self, mode: str) -> None:
        self.coherence = MODES[mode](self.sb, self.kernel)
        self.kernel.mount(self.fs, self.coherence)
        self.coherence.start()

    def switch(self, mode: str) -> None:
        """As MountProcess.set_mode."""
        self.coherence.hand_over()
        self.start(mode)

    def reconfigure(self, specs: Sequence[BranchSpec]) -> None:
        """As rebranch.set_branches."""
        old, fresh = self.branches, self.open(specs)
        new = reconfigure.carry_over(old, fresh)
        gone = reconfigure.removed(old, new)
        if any(reconfigure.users(self.sb, branch) for branch in gone):
            for branch in reconfigure.removed(new, old):
                branch.close()
            return
        self.coherence.hand_over()
        reconfigure.apply(self.sb, new)
        self.branches = new
        self.start(self.coherence.name)
        for branch in gone:
            branch.close()

    def close(self) -> None:
        for handle in self.handles:
            self.fs.release(handle.fh)
        self.coherence.stop()
        self.kernel.forget_all()
        for node in self.sb.table.nodes.values():
            if type(node) is Dir and node is not self.sb.root:
                self.sb.table.close_layers(node)
            elif node.orphan_fd >= 0:
                os.close(node.orphan_fd)
        self.branches.close()

    # -- what is compared -------------------------------------------------------------------------

    def check(self) -> None:
        found = self.kernel.too_much()
        assert not found, found

    def promises(self) -> bool:
        """Whether direct changes there were, if any, are to be seen by now."""
        modes = [self.coherence.mode_of(branch) for branch in self.branches.branches]
        return not self.direct or "none" not in modes

    def check_truth(self) -> int:
        """Everything that the kernel would answer without asking is what somebody who has just mounted sees."""
        compared = 0
        branches = self.open(specs_of(self.branches))
        sb = Superblock(branches, OPTIONS, max_fds=1000)
        strategy = RevalCoherence(sb, FakeNotifier())
        strategy.start()
        fresh = UnionFs(sb, self.fs.creds)
        below: dict[int, dict[bytes, int]] = {}
        for (parent, name), number in self.kernel.entries.items():
            below.setdefault(parent, {})[name] = number
        waiting: list[tuple[int, int, bytes]] = [(ROOT_ID, ROOT_ID, b"")]
        try:
            while waiting:
                number, other, path = waiting.pop()
                st = fresh.getattr(other)
                seen = {"mode": st[1].st_mode, "uid": st[1].st_uid, "gid": st[1].st_gid}
                if type(st[0]) is Dir:
                    seen["nlink"] = st[1].st_nlink + st[0].nlink_extra
                else:
                    seen["size"] = st[1].st_size
                held = self.kernel.attributes_of.get(number, {})
                compared += len(held)
                for key, value in seen.items():
                    assert held.get(key, value) == value, (path, key)
                for name, child in below.get(number, {}).items():
                    there = fresh.lookup(other, name)
                    compared += 1
                    assert (there is None) == (child == 0), (path, name, child)
                    if there is not None:
                        there[0].nlookup += 1
                        waiting.append((child, there[0].id, path + b"/" + name))
        finally:
            strategy.stop()
            for node in sb.table.nodes.values():
                if type(node) is Dir and node is not sb.root:
                    sb.table.close_layers(node)
            branches.close()
        return compared


def specs_of(branches: BranchSet) -> list[BranchSpec]:
    return [BranchSpec(one.path, one.perm, one.attrs, one.udba, one.watch) for one in branches.branches]


class Chance:
    """One random step after another."""

    def __init__(self, world: World, paths: Sequence[Path], seed: int, direct: bool) -> None:
        self.world = world
        self.paths = paths
        self.rng = random.Random(seed)
        self.direct = direct
        self.done: Counter[str] = Counter()

    def step(self) -> None:
        kinds: list[tuple[int, Callable[[], None]]] = [(8, self.look), (8, self.own), (1, self.events)]
        if self.direct:
            kinds.append((4, self.directly))
        kind = self.rng.choices([one for _, one in kinds], [weight for weight, _ in kinds])[0]
        self.done[kind.__name__] += 1
        try:
            kind()
        except OSError:
            self.done["refused"] += 1

    def path(self) -> tuple[bytes, ...]:
        return self.rng.choice(DIRECTORIES)

    def name(self) -> bytes:
        return self.rng.choice([*NAMES, b"f0", b"f1", b"f2"])

    def look(self) -> None:
        kernel = self.world.kernel
        directory = kernel.walk(self.path())
        if self.rng.random() < 0.3:
            kernel.read_directory(directory)
        for _ in range(3):
            number = kernel.look_up(directory, self.name())
            if number:
                kernel.stat(number, *self.rng.choice([(), ("mode",), ("size",)]))

    def own(self) -> None:
        kernel, rng = self.world.kernel, self.rng
        parent, other = kernel.walk(self.path()), kernel.walk(self.path())
        name, second = self.name(), self.name()
        number = kernel.look_up(parent, name)
        target = kernel.look_up(other, second)
        is_dir = bool(number) and type(self.world.fs.table.node(number)) is Dir
        mode = rng.choice([0o644, 0o755, 0o6755, 0o2745])
        if not number:
            if rng.random() < 0.5:
                kernel.mkdir(parent, name, USER)
            else:
                self.world.handles.append(kernel.create(parent, name, mode, USER))
            return
        if rng.random() < 0.4:
            kernel.rename(parent, name, other, second, EXCHANGE if target and rng.random() < 0.5 else 0)
        elif is_dir:
            kernel.rmdir(parent, name, number)
        else:
            changes: list[Callable[[], None]] = [
                lambda: kernel.unlink(parent, name, number),
                lambda: kernel.link(number, other, second),
                lambda: kernel.set_attributes(number, SetAttr(mode=mode), ROOT_CALLER),
                lambda: kernel.set_attributes(number, SetAttr(size=rng.randrange(9)), self.owner(number)),
                lambda: self.open_and_write(number),
                lambda: self.open_and_write(number),
            ]
            rng.choice(changes)()

    def owner(self, number: int) -> Caller:
        """Somebody whom the kernel would let truncate the file."""
        return USER if self.world.fs.getattr(number)[1].st_uid == USER.uid else ROOT_CALLER

    def open_and_write(self, number: int) -> None:
        world = self.world
        handle = world.kernel.open(number, os.O_WRONLY | self.rng.choice([0, os.O_TRUNC]), USER)
        world.handles.append(handle)
        world.kernel.write(self.rng.choice([one for one in world.handles if one.node is handle.node]), b"written")

    def directly(self) -> None:
        """One change of a branch, as nobody sees it but inotify."""
        rng = self.rng
        self.world.direct = True
        here = rng.choice(self.paths).joinpath(*map(os.fsdecode, self.path()))
        path, other = here / os.fsdecode(self.name()), rng.choice(self.paths) / os.fsdecode(self.name())
        what = rng.randrange(8)
        if what == 0 and path.is_dir():
            shutil.rmtree(path)
        elif what == 0:
            path.unlink()
        elif what == 1:
            path.mkdir()
        elif what == 2:
            path.rename(other)
        elif what == 3:
            (here / f".wh.{path.name}").touch()
        elif what == 4:
            mark = here / ".wh..wh..opq"
            mark.unlink() if mark.exists() else mark.touch()
        elif what == 5:
            path.chmod(rng.choice([0o700, 0o6711]))
        else:
            path.write_bytes(b"directly")

    def events(self) -> None:
        """Whatever makes directories lose trust."""
        world, rng = self.world, self.rng
        specs = [BranchSpec(os.fsencode(path), Perm.RW) for path in self.paths]
        what = rng.randrange(8)
        self.done[f"event {what}"] += 1
        if what == 0:
            world.coherence.drop_everything()
        elif what == 1:
            world.limit = rng.choice([2, 4, 7, PLENTY])
        elif what == 2:
            world.coherence.invalidate((*self.path(), self.name())[: rng.randrange(4)])
        elif what == 3:
            world.fs.recover(world.kernel.walk(self.path()))
        elif what == 4:
            world.reconfigure(rng.sample(specs, rng.choice([2, 3, 3])))
        elif what == 5:
            modes = [None, None, "reval", "none", world.coherence.name]
            world.reconfigure([BranchSpec(spec.path, Perm.RW, udba=rng.choice(modes)) for spec in specs])
        elif what == 6:
            world.reconfigure([BranchSpec(spec.path, rng.choice([Perm.RW, Perm.RO])) for spec in specs])
        else:
            world.switch(rng.choice(list(MODES)))


def three_branches(directory: Path) -> list[Path]:
    """Branches that share names, and a mount point beside them."""
    paths = [directory / f"b{number}" for number in range(3)]
    for number, path in enumerate(paths):
        path.mkdir(parents=True)
        make(path, number)
    (directory / "mnt").mkdir()
    return paths


@contextmanager
def new_world(
    directory: Path, mode: str, monkeypatch: pytest.MonkeyPatch, epochs: bool = True
) -> Iterator[tuple[World, list[Path]]]:
    paths = three_branches(directory)
    umask = os.umask(0o022)
    specs = [
        BranchSpec(os.fsencode(paths[0]), Perm.RW),
        *(BranchSpec(os.fsencode(path), Perm.RO) for path in paths[1:]),
    ]
    world = World(directory, mode, epochs, specs)
    watch = Watcher.watch_directory

    def limited(self: Watcher, fd: int, handle: object, by: str) -> Watch:
        if len(self) >= world.limit:
            raise WatchLimit
        return watch(self, fd, handle, by)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Watcher, "watch_directory", limited)
            patch.setattr(watches_module, "watch_limit", lambda: world.limit)
            yield world, paths
    finally:
        world.close()
        os.umask(umask)


@pytest.mark.parametrize("epochs", [True, False], ids=["epochs", "no epochs"])
@pytest.mark.parametrize("mode", list(MODES))
def test_nothing_is_held_of_what_is_not_trusted(
    tmp_path: Path, mode: str, epochs: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The watch limit, a name beside its whiteout: they come or do not.
    for name in ("udbad.coherence.watches", "udbad.union.view"):
        caplog.set_level(logging.ERROR, name)
    done: Counter[str] = Counter()
    held = compared = 0
    for seed in SEEDS:
        with new_world(tmp_path / str(seed), mode, monkeypatch, epochs) as (world, paths):
            chance = Chance(world, paths, seed, direct=bool(seed % 3))
            for number in range(STEPS):
                chance.step()
                world.check()
                held += len(world.kernel.entries)
                if not chance.direct:  # then there is nothing to wait for
                    compared += world.check_truth()
                if number % 6 == 0:
                    world.coherence.drain()
                    world.check()
                    if world.promises():
                        compared += world.check_truth()
            done += chance.done
    assert held > 100, done
    assert compared > 100, done
    assert len(done) > 12, done


def lose_events(world: World) -> None:
    """What was to be told is lost, and so is trust, as with an overflow."""
    assert isinstance(world.coherence, NotifyCoherence)
    watcher = world.coherence._watches.watcher
    assert watcher is not None
    with suppress(BlockingIOError):
        while os.read(watcher._inotify, 1 << 20):
            pass
    world.coherence._on_overflow()


@pytest.mark.parametrize("epochs", [True, False], ids=["epochs", "no epochs"])
def test_requests_come_before_all_that_is_known_was_doubted(
    tmp_path: Path, epochs: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is known of a node is doubted before it is used, whenever its turn comes."""
    caplog.set_level(logging.CRITICAL)  # lost events, and what `new_world` leaves out as well
    monkeypatch.setattr(base_module, "_PORTION", 2)
    amid = compared = 0
    for seed in SEEDS:
        posted: deque[Callable[[], None]] = deque()
        with new_world(tmp_path / str(seed), "notify", monkeypatch, epochs) as (world, paths):
            chance, rng = Chance(world, paths, seed, direct=True), random.Random(seed)
            world.coherence.later = posted.append
            for _ in range(STEPS // 6):
                for _ in range(6):
                    with suppress(OSError):
                        rng.choice((chance.look, chance.own, chance.directly))()
                lose_events(world)
                for _ in range(6):
                    with suppress(OSError):
                        rng.choice((chance.look, chance.look, chance.own))()
                    amid += world.sb.table.doubted is not None
                    if posted and rng.random() < 0.5:
                        posted.popleft()()
                while posted:
                    posted.popleft()()
                assert world.sb.table.doubted is None
                world.coherence.drain()
                world.check()
                compared += world.check_truth()
    assert amid > 100
    assert compared > 100


def test_what_is_below_a_directory_is_doubted_in_its_own_turn(
    notify: World, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    """There may be a million below one that was found by its name, and is not trusted any more."""
    posted: deque[Callable[[], None]] = deque()
    above, below = (notify.sb.table.nodes[notify.kernel.walk(path)] for path in ([b"d"], [b"d", b"s"]))
    assert isinstance(notify.coherence, NotifyCoherence)
    assert type(above) is Dir
    assert type(below) is Dir
    monkeypatch.setattr(base_module, "_PORTION", 0)  # none comes in the turn of the table, where either may be first
    notify.coherence.later = posted.append
    expect_log("lost branch events")
    with monkeypatch.context() as patch:
        patch.setattr(notify.coherence._watches, "watcher", None)  # so that nothing is trusted again
        notify.coherence._on_overflow()
        notify.kernel.look_up(ROOT_ID, b"d")
        assert (above.trusted, below.trusted) == (False, True)
        notify.fs.getattr(below.id)
        assert not below.trusted
        monkeypatch.setattr(base_module, "_PORTION", 1)
        while posted:
            posted.popleft()()
        notify.check()


# -- the ways to lose it, one by one ------------------------------------------------------------------


@pytest.fixture(params=list(MODES))
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with new_world(tmp_path, request.param, monkeypatch) as (world, _):
        yield world


@pytest.fixture
def notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with new_world(tmp_path, "notify", monkeypatch) as (world, _):
        yield world


def test_invalidating_a_name_leaves_the_others_of_its_directory_watched(notify: World, tmp_path: Path) -> None:
    kernel = notify.kernel
    directory = kernel.walk([b"d"])
    names = {name: kernel.look_up(directory, name) for name in (b"a", b"f1", b"absent")}
    assert notify.coherence.invalidate([b"d", b"a"]) == 1
    assert (directory, b"a") not in kernel.entries
    assert kernel.entries[directory, b"f1"] == names[b"f1"]
    (tmp_path / "b1/d/f1").unlink()
    (tmp_path / "b1/d/absent").touch()
    notify.coherence.drain()
    assert kernel.look_up(directory, b"f1") == 0
    assert kernel.look_up(directory, b"absent") != 0
    notify.check()


@pytest.mark.parametrize("path", [[], [b"d"], [b"d", b"absent"], [b"absent", b"x"]])
def test_invalidating_tells_the_kernel(world: World, path: list[bytes]) -> None:
    kernel = world.kernel
    for number in (ROOT_ID, kernel.walk([b"d"])):
        kernel.read_directory(number)
        kernel.look_up(number, b"absent")
    world.coherence.invalidate(path)
    world.check()
    if path == []:
        assert kernel.entries == {}
    assert (ROOT_ID, b"absent") in kernel.entries or path != [b"d"] or world.coherence.name == "reval"
    assert world.sb.root.trusted == (world.coherence.name != "reval")
    # Used again, everything is believed again.
    kernel.stat(kernel.walk([b"d", b"a"]))
    assert all(node.trusted == world.sb.root.trusted for node in directories(world) if node.name in (b"", b"d"))


def directories(world: World) -> list[Dir]:
    return [node for node in world.sb.table.nodes.values() if type(node) is Dir]


def test_a_recovery_that_fails_takes_no_trust_away(world: World, tmp_path: Path) -> None:
    kernel = world.kernel
    number = kernel.walk([b"e", b"s"])
    kernel.look_up(ROOT_ID, b"f0")
    trusted = world.sb.root.trusted
    node = world.sb.table.directory(number)
    for layer in node.layers:
        os.close(layer.fd)
        layer.fd = -1
        world.sb.table.open_fds -= 1
    shutil.rmtree(tmp_path / "b1/e")
    with pytest.raises(OSError, match=r"No such file|[Ss]tale"):
        world.fs.recover(number)
    world.check()
    assert world.sb.root.trusted == trusted
    if world.coherence.name == "notify":
        (tmp_path / "b0/f0").unlink()
        world.coherence.drain()
        assert kernel.look_up(ROOT_ID, b"f0") == 0
        assert world.sb.root.trusted


def test_the_watch_limit_is_reached_by_a_copy_up(
    notify: World, tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("watch limit reached")
    kernel = notify.kernel
    directory = kernel.walk([b"e", b"s"])
    before = kernel.look_up(directory, b"a")
    notify.limit = 0
    kernel.set_attributes(before, SetAttr(mode=0o600), ROOT_CALLER)
    assert (tmp_path / "b0/e/s/a").exists()
    assert not notify.sb.table.directory(directory).trusted
    notify.check()
    (tmp_path / "b0/e/s/f1").write_bytes(b"on top")
    assert kernel.stat(kernel.look_up(directory, b"f1"))["size"] == len(b"on top")


def test_the_root_is_trusted_again_when_there_are_watches(notify: World, expect_log: Callable[[str], None]) -> None:
    """It is never looked up, so nobody would come by to try."""
    expect_log("watch limit reached")
    notify.limit = 0
    notify.switch("notify")
    assert not notify.sb.root.trusted
    notify.kernel.walk([b"d"])
    notify.check()
    notify.limit = PLENTY
    notify.kernel.walk([b"d", b"s"])
    assert all(node.trusted for node in directories(notify))


@pytest.mark.parametrize("flags", [0, EXCHANGE])
def test_a_rename_into_a_directory_that_is_not_trusted(
    tmp_path: Path, flags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel moves its dentry, time-out and all."""
    with new_world(tmp_path, "none", monkeypatch) as (world, _):
        shutil.rmtree(tmp_path / "b0/d")
        shutil.rmtree(tmp_path / "b2")
        (tmp_path / "b2/d").mkdir(parents=True)
        (tmp_path / "b2/d/a").touch()
        world.reconfigure(
            [BranchSpec(os.fsencode(tmp_path / "b0"), Perm.RW), BranchSpec(os.fsencode(tmp_path / "b2"), Perm.RW)]
        )
        kernel = world.kernel
        source, target = kernel.walk([b"e"]), kernel.walk([b"d"])
        world.coherence.distrust(world.sb.table.directory(target))
        kernel.look_up(source, b"f0")
        monkeypatch.setattr(NoneCoherence, "adopt", lambda self, node, changed: None)
        kernel.look_up(target, b"a")
        kernel.rename(source, b"f0", target, b"a", flags)
        world.check()


def test_several_names_of_one_file_are_kept_as_long_as_each_directory_allows(
    notify: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as long as the directory that the file was found in first."""
    os.link(tmp_path / "b1/d/f1", tmp_path / "b1/e/link")
    trusted, other = notify.kernel.walk([b"d"]), notify.kernel.walk([b"e"])
    notify.kernel.look_up(trusted, b"f1")
    assert isinstance(notify.coherence, NotifyCoherence)
    notify.coherence.distrust(notify.sb.table.directory(other))
    monkeypatch.setattr(NotifyCoherence, "adopt", lambda self, node, changed: None)
    edge = Kernel(Union(notify.fs, notify.coherence, FakeNotifier()))

    def entry_timeout(parent: int, name: bytes) -> int:
        edge.ask(wire.LOOKUP, parent, name + b"\0")
        number, _, seconds = struct.unpack_from("<QQQ", edge.answer()[1])
        notify.fs.forget(number, 1)
        return int(seconds)

    try:
        assert entry_timeout(trusted, b"f1") > 0
        assert entry_timeout(other, b"link") == 0
    finally:
        edge.close()


def test_a_burst_that_fails_counts_as_lost(
    notify: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    """Also when somebody waits for it (`drain`): what came after the event that could not be handled was not seen."""
    expect_log("handling branch events failed")
    expect_log("lost branch events")
    kernel = notify.kernel
    for name in (b"f0", b"f1", b"a"):
        kernel.look_up(ROOT_ID, name)
    handle = Events.handle

    def fail(self: Events, changes: list[Change]) -> None:
        monkeypatch.setattr(Events, "handle", handle)
        raise ValueError("the first event")

    monkeypatch.setattr(Events, "handle", fail)
    (tmp_path / "b0/f0").unlink()
    (tmp_path / "b1/f1").unlink()
    notify.coherence.drain()
    assert kernel.look_up(ROOT_ID, b"f0") == kernel.look_up(ROOT_ID, b"f1") == 0
    assert notify.coherence.statistics().overflows == 1
    notify.check()


def test_no_event_leads_back_to_the_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It asks the branches, and judges what they say itself: `adopt` is for those who come from a request."""
    for name in ("udbad.coherence.watches", "udbad.union.view"):  # as above
        caplog.set_level(logging.ERROR, name)
    adopt, name_changed = NotifyCoherence.adopt, Events.name_changed
    under_way: list[str] = []
    entered: Counter[tuple[str, ...]] = Counter()

    @contextmanager
    def entering(what: str) -> Iterator[None]:
        under_way.append(what)
        entered[tuple(under_way)] += 1
        try:
            yield
        finally:
            under_way.pop()

    def adopting(self: NotifyCoherence, node: Dir, changed: bool) -> None:
        if under_way and node is self.sb.root:
            return adopt(self, node, changed)  # from `distrust`, as nobody looks the root up
        with entering("adopt"):
            return adopt(self, node, changed)

    def comparing(self: Events, node: Dir, name: bytes, kinds: int) -> Dir | None:
        with entering("event"):
            return name_changed(self, node, name, kinds)

    monkeypatch.setattr(NotifyCoherence, "adopt", adopting)
    monkeypatch.setattr(Events, "name_changed", comparing)
    for seed in SEEDS[:5]:
        with new_world(tmp_path / str(seed), "notify", monkeypatch) as (world, paths):
            chance = Chance(world, paths, seed, direct=True)
            for _ in range(STEPS):
                chance.step()
                world.coherence.drain()
    assert set(entered) <= {("adopt",), ("event",), ("adopt", "event")}, entered
    assert entered["adopt",] > 50
    assert entered["event",] > 50


def test_a_deep_tree_gets_other_layers_at_once(notify: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch directory comes above it, deeper than calls can go: each directory is merged from others then."""
    depth = 120
    path = Path(*["x"] * depth)
    (tmp_path / "b1" / path).mkdir(parents=True)
    (tmp_path / "b1" / path / "f").write_bytes(b"below")
    (tmp_path / "b0/new" / path.relative_to("x")).mkdir(parents=True)
    (tmp_path / "b0/new" / path.relative_to("x") / "f").write_bytes(b"on top")
    notify.coherence.drain()
    kernel = notify.kernel
    names = [b"x"] * depth + [b"f"]
    assert kernel.stat(kernel.walk(names))["size"] == len(b"below")
    (tmp_path / "b0/new").rename(tmp_path / "b0/x")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        notify.coherence.drain()
    finally:
        sys.setrecursionlimit(limit)
    assert notify.coherence.statistics().overflows == 0
    assert kernel.stat(kernel.walk(names))["size"] == len(b"on top")
    notify.check()
    notify.check_truth()


# -- what is held is true -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["append", "truncating open", "truncate", "other handle", "lower", "chmod later", "chown"]
)
def test_the_mode_after_a_write_that_takes_setuid_away(world: World, tmp_path: Path, how: str) -> None:
    """fuse_write_update_attr() leaves the mode as the kernel knows it."""
    kernel = world.kernel
    branch = "b1" if how == "lower" else "b0"
    path = tmp_path / branch / "s6755"
    path.write_bytes(b"content")
    os.chown(path, 1000, 1000)
    path.chmod(0o644 if how == "chmod later" else 0o6755)
    number = kernel.walk([b"s6755"])
    handle = kernel.open(number, os.O_WRONLY, USER)
    other = kernel.open(number, os.O_RDWR, USER)
    world.handles += [handle, other]
    if how == "chmod later":
        kernel.set_attributes(number, SetAttr(mode=0o6755), USER)
    assert kernel.stat(number)["mode"] & 0o7777 == 0o6755
    if how == "truncating open":
        world.handles.append(kernel.open(number, os.O_WRONLY | os.O_TRUNC, USER))
    elif how == "truncate":
        kernel.set_attributes(number, SetAttr(size=1), USER)
    elif how == "chown":
        kernel.set_attributes(number, SetAttr(gid=3000), USER)
    else:
        kernel.write(other if how == "other handle" else handle, b"x")
    assert kernel.stat(number, "mode")["mode"] & 0o7777 == 0o755
    told = sum(kernel.notified.values())
    kernel.write(handle, b"more")
    assert sum(kernel.notified.values()) == told, "once"


def test_setuid_set_directly_while_the_file_is_open(notify: World, tmp_path: Path) -> None:
    kernel = notify.kernel
    path = tmp_path / "b0/f0"
    os.chown(path, 1000, 1000)
    number = kernel.walk([b"f0"])
    notify.handles.append(kernel.open(number, os.O_WRONLY, USER))
    kernel.stat(number)
    path.chmod(0o6755)
    notify.coherence.drain()
    assert kernel.stat(number)["mode"] & 0o7777 == 0o6755
    kernel.write(notify.handles[0], b"x")
    assert kernel.stat(number, "mode")["mode"] & 0o7777 == 0o755


OWN: dict[str, Callable[[FakeKernel], None]] = {
    "rmdir": lambda k: k.rmdir(k.walk([b"p"]), b"sub", k.walk([b"p", b"sub"])),
    "rename away": lambda k: k.rename(k.walk([b"p"]), b"sub", ROOT_ID, b"away"),
    "rename over": lambda k: k.rename(k.walk([b"p"]), b"other", k.walk([b"p"]), b"sub"),
    "mkdir": lambda k: k.mkdir(k.walk([b"p"]), b"new", ROOT_CALLER),
    "copy-up": lambda k: k.mkdir(k.walk([b"p", b"low"]), b"x", ROOT_CALLER),
    "in the root": lambda k: k.rmdir(ROOT_ID, b"empty", k.walk([b"empty"])),
}
DIRECT: dict[str, Callable[[Path], None]] = {
    "rmdir": lambda root: (root / "b1/p/sub").rmdir(),
    "rename away": lambda root: os.rename(root / "b1/p/sub", root / "b1/away"),
    "mkdir": lambda root: (root / "b1/p/new").mkdir(),
    "mkdir, hidden by a file": lambda root: (root / "b1/p/file").mkdir(),
    "in the root": lambda root: (root / "b1/empty").rmdir(),
}


@pytest.mark.parametrize("what", [*OWN, *(f"directly {name}" for name in DIRECT)])
def test_links_of_a_directory(world: World, tmp_path: Path, what: str) -> None:
    """One for each subdirectory of each branch directory: what a fresh mount counts."""
    for path in ("b0/p", "b1/p/sub", "b1/p/other", "b1/p/low", "b1/empty"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "b0/p/file").touch()
    lower = Perm.RO if what == "copy-up" else Perm.RW
    world.reconfigure(
        [BranchSpec(os.fsencode(tmp_path / "b0"), Perm.RW), BranchSpec(os.fsencode(tmp_path / "b1"), lower)]
    )
    kernel = world.kernel
    kernel.walk([b"p", b"sub"])
    directory = ROOT_ID if what.endswith("in the root") else kernel.walk([b"p"])
    before = kernel.stat(directory)["nlink"]
    assert before == (9 if directory == ROOT_ID else 5)
    if what.startswith("directly "):
        if world.coherence.name == "none":
            return  # promises nothing
        DIRECT[what.removeprefix("directly ")](tmp_path)
        world.coherence.drain()
    else:
        OWN[what](kernel)
    assert kernel.stat(directory)["nlink"] == before + (1 if "mkdir" in what or what == "copy-up" else -1)
    world.check_truth()


# -- watches that are left to others ------------------------------------------------------------------


def use_many(world: World, branch: Path, count: int) -> int:
    """Use this many directories one after the other; the highest number of watches meanwhile."""
    for number in range(count):
        (branch / f"many{number}").mkdir(exist_ok=True)
    world.coherence.drain()
    most = 0
    for number in range(count):
        world.kernel.stat(world.kernel.walk([b"many%d" % number]))
        most = max(most, world.coherence.statistics().watches)
    world.check()
    return most


def reserve(world: World, percent: int) -> None:
    world.sb.options = OPTIONS._replace(watch_reserve=percent)
    world.coherence.options_changed()


def test_a_share_of_the_watches_is_left(notify: World, tmp_path: Path, expect_log: Callable[[str], None]) -> None:
    expect_log("watch limit reached")
    notify.limit = 200
    reserve(notify, 10)
    assert use_many(notify, tmp_path / "b1", 250) == 180
    assert notify.coherence.statistics().state == "limited"
    notify.check_truth()
    # While mounted: nothing is to be kept free, then more.
    reserve(notify, 0)
    assert use_many(notify, tmp_path / "b1", 250) == 200
    reserve(notify, 50)
    use_many(notify, tmp_path / "b1", 250)
    assert use_many(notify, tmp_path / "b1", 250) == 100


def test_watches_are_given_back_when_others_have_the_rest(
    notify: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("watch limit reached")
    monkeypatch.setattr(watches_module, "watch_limit", lambda: 1000)
    reserve(notify, 10)
    notify.limit = 250  # the others have 750
    use_many(notify, tmp_path / "b1", 300)
    assert use_many(notify, tmp_path / "b1", 300) == 150
    notify.check_truth()
    notify.limit = 2000
    monkeypatch.setattr(watches_module, "watch_limit", lambda: 2000)
    assert use_many(notify, tmp_path / "b1", 300) > 300
    assert notify.coherence.statistics().state == "healthy"
