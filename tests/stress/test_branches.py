"""A branch is added and removed again and again while readers and writers storm through the mount.

UDBAD_BRANCH_ROUNDS: how often in each mode (default 60, in make soak 334). What each client may see is known at
every moment: what is on the branch that comes and goes is there or is not, whole and nothing else; everything else
is as if nobody changed branches at all. Between rounds the storm goes on; what has just been added or removed must be
seen by the very next access of whoever did it, and from time to time the storm is stopped and the mount compared
with the merge of its branches (tests/helpers/merge.py).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.helpers.merge import diff, merge, snapshot
from tests.helpers.mount import Mount, UnionFactory
from tests.helpers.profile import scaled
from tests.stress.storm import MODES

pytestmark = [pytest.mark.fuse, pytest.mark.stress]

ROUNDS: Final = int(os.environ.get("UDBAD_BRANCH_ROUNDS", scaled("60", "334")))
COMPARE_EVERY: Final = 50
"""Rounds after which the storm is stopped and everything is compared, with the branch and without it."""
JOIN_SECONDS: Final = 60.0
NAMES: Final = 40
BIG: Final = "0123456789abcdef" * 8192


def fill(root: Path) -> None:
    """top over extra (sometimes) over base."""
    for branch, names in (
        ("top", ("both/top", "over/top")),
        ("extra", ("both/extra", "over/same", "only/extra", "deep/a/b/extra", "over/kind/file")),
        ("base", ("both/base", "over/same", "over/kind", "plain", "deep/base")),
    ):
        for name in names:
            path = root / branch / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{branch} {name} {BIG}")
    # Which one is hidden by a branch in between.
    (root / "extra" / "both" / ".wh.base").touch()
    (root / "base" / "up").mkdir()
    for number in range(NAMES):
        (root / "base" / "up" / str(number)).write_text(f"up {number}")


class Client(threading.Thread):
    """Does its turns until stopped; `wrong` is everything it should not have seen."""

    def __init__(self, root: Path, gate: Gate) -> None:
        super().__init__()
        self.root = root
        self.gate = gate
        self.turns = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        try:
            while self.gate.enter():
                try:
                    self.turn(self.turns)
                    self.turns += 1
                finally:
                    self.gate.leave()
        except BaseException as error:
            self.wrong.append(repr(error))

    def turn(self, number: int) -> None:
        raise NotImplementedError

    def expect(self, what: str, found: object, *allowed: object) -> None:
        if found not in allowed:
            self.wrong.append(
                f"{type(self).__name__} {what}: {str(found)[:80]}, allowed: {[str(a)[:40] for a in allowed]}"
            )


class Gate:
    """Lets clients do their turns, or holds them all between two turns."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._closed = False
        self._end = False

    def enter(self) -> bool:
        with self._condition:
            self._condition.wait_for(lambda: not self._closed or self._end)
            self._inside += not self._end
            return not self._end

    def leave(self) -> None:
        with self._condition:
            self._inside -= 1
            self._condition.notify_all()

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._condition:
            self._closed = True
            assert self._condition.wait_for(lambda: self._inside == 0, JOIN_SECONDS), "a client hangs"
        try:
            yield
        finally:
            with self._condition:
                self._closed = False
                self._condition.notify_all()

    def end(self) -> None:
        with self._condition:
            self._end = True
            self._condition.notify_all()


def read(path: Path) -> object:
    """The text of a file, or the errno."""
    try:
        return path.read_text()
    except OSError as error:
        return error.errno


def listed(path: Path) -> object:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        return error.errno


def content(name: str, branch: str) -> str:
    return f"{branch} {name} {BIG}"


class Reader(Client):
    """Reads names of every kind."""

    def turn(self, number: int) -> None:
        root = self.root
        self.expect("plain", read(root / "plain"), content("plain", "base"))
        self.expect("both/top", read(root / "both/top"), content("both/top", "top"))
        self.expect("deep/base", read(root / "deep/base"), content("deep/base", "base"))
        self.expect("both/extra", read(root / "both/extra"), content("both/extra", "extra"), errno.ENOENT)
        self.expect("only/extra", read(root / "only/extra"), content("only/extra", "extra"), errno.ENOENT)
        self.expect("deep", read(root / "deep/a/b/extra"), content("deep/a/b/extra", "extra"), errno.ENOENT)
        # Hidden by a whiteout that does not count: extra is ro without wh.
        self.expect("both/base", read(root / "both/base"), content("both/base", "base"))
        same = (content("over/same", branch) for branch in ("extra", "base"))
        self.expect("over/same", read(root / "over/same"), *same)
        self.expect("over/kind", read(root / "over/kind"), content("over/kind", "base"), errno.EISDIR)
        self.expect(
            "kind", read(root / "over/kind/file"), content("over/kind/file", "extra"), errno.ENOENT, errno.ENOTDIR
        )


class Lister(Client):
    """A listing is that of the union with the branch or without it, never something between."""

    def turn(self, number: int) -> None:
        root = self.root
        self.expect("both", listed(root / "both"), ["base", "extra", "top"], ["base", "top"])
        self.expect("over", listed(root / "over"), ["kind", "same", "top"])
        self.expect("deep", listed(root / "deep"), ["a", "base"], ["base"])
        self.expect("only", listed(root / "only"), ["extra"], errno.ENOENT)
        here = listed(root)
        self.expect("root", isinstance(here, list) and [name for name in here if name != "only"],
                    ["both", "deep", "over", "plain", "up", "work0", "work1"])  # fmt: skip


class Writer(Client):
    """Has a directory for itself, where nothing may ever be lost; and copies files up."""

    def __init__(self, root: Path, gate: Gate, number: int) -> None:
        super().__init__(root, gate)
        self.number = number
        self.here = root / f"work{number}"
        self.texts: dict[str, str] = {}

    def turn(self, number: int) -> None:
        name, other = f"f{number % 11}", f"f{number % 7}"
        text = f"{self.number} {number} {BIG[: number % 5000]}"
        (self.here / name).write_text(text)
        self.texts[name] = text
        with (self.here / name).open("a") as file:
            file.write("end")
        self.texts[name] += "end"
        if other != name:
            os.rename(self.here / name, self.here / other)
            self.texts[other] = self.texts.pop(name)
        if number % 5 == 0 and name in self.texts:
            (self.here / name).unlink()
            del self.texts[name]
        self.expect("listing", listed(self.here), sorted(self.texts))
        for known, expected in self.texts.items():
            self.expect(known, read(self.here / known), expected)
        up = 2 * (number % (NAMES // 2)) + self.number
        path = self.root / "up" / str(up)
        with path.open("a") as file:
            file.write(".")
        self.expect(f"up/{up}", read(path), f"up {up}" + "." * (number // (NAMES // 2) + 1))


def change(mount: Mount, *edits: list[str]) -> str:
    """Add or remove branches; the refusal, if any."""
    answer = mount.control({"op": "branches", "edits": list(edits)})
    return "" if answer["ok"] else str(answer["error"])


def compare(mount: Mount, with_extra: bool) -> list[str]:
    mount.flush()
    names = ["top", *(["extra"] if with_extra else []), "base"]
    return diff(merge([(mount.path.parent / name, name == "top") for name in names]), snapshot(mount.path))


def seen_now(mount: Mount, there: bool) -> list[str]:
    """What the change means for the next access: its answer comes when it is in force."""
    wrong = []
    for name in ("only/extra", "both/extra", "deep/a/b/extra"):
        found = read(mount.path / name)
        if found != (content(name, "extra") if there else errno.ENOENT):
            wrong.append(f"{name} {'after add' if there else 'after del'}: {str(found)[:60]}")
    if read(mount.path / "over/same") != content("over/same", "extra" if there else "base"):
        wrong.append(f"over/same {'after add' if there else 'after del'}")
    if ("extra" in os.listdir(mount.path / "both")) is not there:
        wrong.append("listing of both")
    return wrong


def storm(mount: Mount, clients: list[Client], gate: Gate) -> None:
    extra = mount.path.parent / "extra"
    refusals = 0
    for number in range(ROUNDS):
        assert change(mount, ["add", f"1:{extra}=ro"]) == ""
        assert seen_now(mount, True) == []
        if number % COMPARE_EVERY == 0:
            with gate.held():
                assert compare(mount, True) == []
        while refusal := change(mount, ["del", str(extra)]):
            # A reader has a file of it open: the one reason there may be.
            assert "is in use" in refusal, refusal
            refusals += 1
        assert seen_now(mount, False) == []
        if number % COMPARE_EVERY == 0:
            with gate.held():
                assert compare(mount, False) == []
        assert not any(client.wrong for client in clients), [client.wrong[:5] for client in clients]
    turns = {type(client).__name__: client.turns for client in clients}
    print(f"{ROUNDS} rounds, {refusals} refusals while in use, turns {turns}")
    assert all(client.turns > 1 for client in clients), "the storm was none"


@pytest.mark.parametrize("udba", MODES)
def test_add_and_del_under_a_storm(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    mount = union(None, udba, watchdog=900)
    gate = Gate()
    make: list[Callable[[], Client]] = [
        lambda: Reader(mount.path, gate), lambda: Lister(mount.path, gate),
        lambda: Writer(mount.path, gate, 0), lambda: Writer(mount.path, gate, 1),
    ]  # fmt: skip
    clients = [one() for one in make]
    for number in range(2):
        (mount.path / f"work{number}").mkdir()
    for client in clients:
        client.start()
    try:
        storm(mount, clients, gate)
    finally:
        gate.end()
        for client in clients:
            client.join(JOIN_SECONDS)
        assert not any(client.is_alive() for client in clients)
    assert not any(client.wrong for client in clients), [client.wrong[:5] for client in clients]
    assert compare(mount, False) == []
    assert mount.control({"op": "stats"})["bugs"] == 0
