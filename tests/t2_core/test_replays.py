"""What watchers of the union are shown of direct changes (`replay`): they know which names there are, whatever comes
between a change and its event, and between that and its turn.

Without a kernel and its helper: a step is done as soon as it is asked for, or refused.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.inprocess import Union, notify_union
from udbad.branch import syscalls
from udbad.coherence import watcher
from udbad.coherence.replays import Kind, Replays, Step
from udbad.edge import replay
from udbad.inodes.node import Node
from udbad.types import ROOT_ID, Perm

NAMES = ("a", "b", "c")


class Watched:
    """A union of the directories upper and lower, all of which is watched: what its watchers were shown."""

    def __init__(self, union: Union, base: Path) -> None:
        self.union = union
        self.upper, self.lower = base / "upper", base / "lower"
        self.replays = Replays("on", lambda: None)
        union.coherence.replay_to(self.replays)
        self.looked_up: list[Node] = []
        self.shown: list[str] = []
        self.believed: set[str] = set()
        self.unknown: list[str] = []
        """What was shown to be gone, of which watchers did not know; without what nobody can tell of."""

    def listed(self) -> set[str]:
        return {os.fsdecode(name) for name in self.union.list(ROOT_ID)}

    def ask(self, name: str) -> None:
        """Somebody looks a name up, perhaps before the event of a change is read."""
        self.union.look_up(ROOT_ID, name.encode())

    def read(self) -> None:
        """All events."""
        self.union.coherence.drain()

    def have(self, *names: str) -> None:
        """Files that were there before anybody watched, and that nobody has asked for."""
        self.union.coherence.replay_to(None)
        for name in names:
            (self.upper / name).touch()
        self.read()
        self.union.coherence.replay_to(self.replays)
        self.believed.update(names)

    def look(self, _: object, name: bytes) -> Node | None:
        found = self.union.fs.lookup(ROOT_ID, name)
        if found is None:
            return None
        self.looked_up.append(found[0])
        return found[0]

    def let_go(self) -> None:
        table = self.union.fs.table
        for node in self.looked_up:
            if table.nodes.get(node.id) is node:
                table.not_sent(node)
        self.looked_up.clear()

    def next_step(self) -> Step | None:
        """As edge/replay.py asks for one; None when there is nothing to show."""
        self.union.coherence.drain()
        while (one := self.replays.first()) is not None:
            step = self.replays.step(one, self.look)
            if step is not None:
                self.replays.begun(step)
                return step
            self.replays.settled(one)
            self.let_go()
        return None

    def done(self, step: Step) -> None:
        """The helper has done it: so the kernel has sent the event."""
        name, before = os.fsdecode(step.replay.name), step.replay.before
        self.replays.shown(step)
        self.let_go()
        if step.kind in (Kind.DELETE, Kind.RENAME):
            gone = name if step.origin is None else os.fsdecode(step.origin.name)
            if gone not in self.believed and not (step.kind is Kind.DELETE and before is not None and before.perhaps):
                self.unknown.append(gone)
            self.believed.discard(gone)
        if step.kind in (Kind.CREATE, Kind.RENAME):
            self.believed.add(name)
        origin = "" if step.origin is None else f"{os.fsdecode(step.origin.name)} "
        self.shown.append(f"{step.kind.value} {origin}{name}")

    def refused(self, step: Step) -> None:
        """It could not be done."""
        self.replays.again(step)
        self.let_go()

    def show(self) -> list[str]:
        """All that is shown now."""
        while (step := self.next_step()) is not None:
            self.done(step)
        return [words for words in self.shown if not words.startswith(("attributes", "content"))]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    for name in ("upper", "lower"):
        (tmp_path / name).mkdir()
    branches = [(tmp_path / "upper", Perm.RW), (tmp_path / "lower", Perm.RO)]
    with notify_union(branches, tmp_path / "mnt") as union:
        yield Watched(union, tmp_path)
        union.coherence.replay_to(None)


def change(draw: random.Random, watched: Watched) -> None:
    """One direct change, which may fail."""
    branch = draw.choice((watched.upper, watched.lower))
    path, other = branch / draw.choice(NAMES), branch / draw.choice(NAMES)
    with suppress(OSError):
        match draw.randrange(6):
            case 0 | 1:
                path.open("a").close()
            case 2:
                path.unlink()
            case 3:
                path.rename(other)
            case 4:
                path.mkdir()
            case _:
                path.rmdir()


def gone_before_its_turn(w: Watched) -> None:
    """Another object has the name when the first one's turn comes, and none when that one's does: a file that watchers
    know is gone, and what came instead is nothing to be shown."""
    w.have("a")
    w.ask("a")
    (w.upper / "a").unlink()
    (w.upper / "a").mkdir()
    w.read()
    (w.upper / "a").rmdir()
    w.ask("a")


def rename_overtaken(w: Watched) -> None:
    w.have("a")
    (w.upper / "a").rename(w.upper / "b")
    w.read()
    (w.upper / "b").unlink()
    (w.upper / "b").mkdir()


def moved_on(w: Watched) -> None:
    w.have("a")
    (w.upper / "a").rename(w.upper / "b")
    w.read()
    (w.upper / "b").rename(w.upper / "c")


def moved_back(w: Watched) -> None:
    w.have("a")
    (w.upper / "a").rename(w.upper / "b")
    (w.upper / "b").rename(w.upper / "a")


def rotated(w: Watched) -> None:
    """As logrotate(8) does, at once: also where nobody has asked for the file before."""
    w.have("a")
    (w.upper / "a").rename(w.upper / "b")
    (w.upper / "a").touch()


def rotated_twice(w: Watched) -> None:
    w.have("a", "b")
    (w.upper / "b").rename(w.upper / "c")
    (w.upper / "a").rename(w.upper / "b")
    (w.upper / "a").touch()


def moved_on_two_branches(w: Watched) -> None:
    """To a name, and away from it: not the same."""
    w.have("b")
    (w.lower / "a").touch()
    w.show()
    w.ask("b")
    (w.lower / "a").rename(w.lower / "b")
    (w.upper / "b").rename(w.upper / "c")


def exchanged(w: Watched) -> None:
    w.have("a", "b")
    w.ask("a")
    w.ask("b")
    (w.upper / "a").rename(w.upper / "c")
    (w.upper / "b").rename(w.upper / "a")
    (w.upper / "c").rename(w.upper / "b")


def made_again(w: Watched) -> None:
    """It may get the number of the first one."""
    w.have("a")
    w.ask("a")
    (w.upper / "a").unlink()
    (w.upper / "a").touch()


def made_and_found(w: Watched) -> None:
    """By a request, before the event is read."""
    (w.upper / "a").touch()
    w.ask("a")


def made_and_listed(w: Watched) -> None:
    (w.upper / "a").touch()
    w.listed()


def removed_and_not_found(w: Watched) -> None:
    w.have("a")
    w.listed()
    (w.upper / "a").unlink()
    w.ask("a")


def hidden(w: Watched) -> None:
    """What nobody sees comes and goes without a word."""
    w.have("a")
    (w.lower / "a").touch()
    (w.upper / ".wh.b").touch()
    (w.lower / "b").touch()
    w.read()
    (w.lower / "a").unlink()
    (w.lower / "b").unlink()


def on_top_of_another(w: Watched) -> None:
    (w.lower / "a").touch()
    w.show()
    (w.upper / "a").mkdir()


def merged(w: Watched) -> None:
    """A directory is what it was with a branch more, or less."""
    (w.lower / "a").mkdir()
    w.show()
    (w.upper / "a").mkdir()
    w.read()
    (w.upper / "a").rmdir()


def made_on_two_branches(w: Watched) -> None:
    """The event of the upper one comes in another burst than that of the lower one."""
    (w.lower / "a").mkdir()
    (w.upper / "a").mkdir()


def made_on_two_branches_and_found(w: Watched) -> None:
    made_on_two_branches(w)
    w.ask("a")


def made_above(w: Watched) -> None:
    """The same with files, of which the lower one was there: watchers know that one."""
    (w.lower / "a").mkdir()
    w.show()
    (w.lower / "a").rmdir()
    (w.upper / "a").touch()


def moved_away_and_made_again(w: Watched) -> None:
    """What was found above, before any event of it was read, was there: its first event says so."""
    w.have("a")
    (w.lower / "a").touch()
    w.read()
    (w.upper / "a").rename(w.upper.parent / "a")
    w.read()
    (w.upper / "a").touch()
    (w.upper / "a").unlink()
    (w.lower / "a").unlink()


def replaced_by_a_rename(w: Watched) -> None:
    """No event says that there was something where a file was moved to."""
    w.have("a", "b")
    (w.upper / "b").rename(w.upper / "a")
    w.read()
    (w.upper / "a").unlink()


def replaced_by_a_rename_at_once(w: Watched) -> None:
    w.have("a", "b")
    (w.upper / "b").rename(w.upper / "a")
    (w.upper / "a").unlink()


def removed_meanwhile(w: Watched) -> None:
    """While the helper is at it."""
    (w.upper / "a").touch()
    step = w.next_step()
    assert step is not None
    (w.upper / "a").unlink()
    w.done(step)


def refused(w: Watched) -> None:
    (w.upper / "a").touch()
    step = w.next_step()
    assert step is not None
    (w.upper / "a").unlink()
    w.refused(step)


def changed_through_the_mount(w: Watched) -> None:
    """Watchers have been told by that."""
    (w.upper / "a").touch()
    (w.upper / "b").touch()
    w.read()
    w.union.fs.unlink(ROOT_ID, b"a")


CASES: dict[Callable[[Watched], None], list[str]] = {
    gone_before_its_turn: ["delete a"],
    rename_overtaken: ["delete a", "create b"],
    moved_on: ["rename a c", "delete b"],
    moved_back: ["delete b"],
    rotated: ["rename a b", "create a"],
    rotated_twice: ["rename b c", "rename a b", "create a"],
    moved_on_two_branches: ["create a", "rename b c", "rename a b"],
    exchanged: ["rename a b", "create a", "delete c"],
    made_again: ["delete a", "create a"],
    made_and_found: ["create a"],
    made_and_listed: ["create a"],
    removed_and_not_found: ["delete a"],
    hidden: [],
    on_top_of_another: ["create a", "delete a", "create a"],
    merged: ["create a"],
    made_on_two_branches: ["create a"],
    made_on_two_branches_and_found: ["create a"],
    made_above: ["create a", "delete a", "create a"],
    moved_away_and_made_again: ["delete a"],
    replaced_by_a_rename: ["delete b", "delete a"],
    replaced_by_a_rename_at_once: ["delete b", "delete a"],
    removed_meanwhile: ["create a", "delete a"],
    refused: [],
    changed_through_the_mount: ["create b"],
}


@pytest.mark.parametrize("burst", [watcher._READ_BYTES, 32], ids=["", "one event at a time"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_shown(watched: Watched, case: Callable[[Watched], None], burst: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "_READ_BYTES", burst)
    case(watched)
    assert watched.show() == CASES[case]


@pytest.mark.parametrize("looks", [False, True], ids=["", "with others who look"])
@pytest.mark.parametrize("seed", range(int(os.environ.get("UDBAD_TEST_SEEDS", "12"))))
def test_at_random(watched: Watched, seed: int, looks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes by what was shown knows which names there are.

    And knew of what is gone, unless others have come across a change before its event, or bursts end in the middle.
    """
    if looks:
        monkeypatch.setattr(watcher, "_READ_BYTES", 272)  # some eight events
    draw, step = random.Random(seed), None
    for _ in range(200):
        match draw.randrange(10):
            case 0:
                watched.union.coherence.take_events()
            case 1 if looks:
                watched.union.look_up(ROOT_ID, os.fsencode(draw.choice(NAMES)))
            case 2 if looks:
                watched.union.list(ROOT_ID)
            case 3 | 4 if step is None:
                step = watched.next_step()
            case 3 | 4 as which if step is not None:
                if which == 3:
                    watched.done(step)
                else:
                    watched.refused(step)
                step = None
            case _:
                change(draw, watched)
    if step is not None:
        watched.done(step)
    watched.show()
    assert watched.believed == watched.listed()
    assert looks or not watched.unknown


def test_what_was_removed_has_a_link_more(tmp_path: Path) -> None:
    """Of what stat(2) of ours returns, compiled or not."""
    path = tmp_path / "f"
    path.write_text("content")
    os.utime(path, ns=(1_500_000_001, 2_000_000_003))
    with path.open() as file:
        given = replay._status(syscalls.fstat(file.fileno()), 1)
        there = os.fstat(file.fileno())
    assert given.st_nlink == there.st_nlink + 1
    names = [name for name in dir(there) if name.startswith("st_") and name != "st_nlink"]
    assert {name: getattr(given, name) for name in names} == {name: getattr(there, name) for name in names}
