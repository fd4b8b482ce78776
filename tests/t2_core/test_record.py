"""The record of a mount is readable whenever its writer was killed, and says what was known then."""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.helpers.uncompiled import from_source
from udbad.inodes import record as record_module
from udbad.inodes.record import DROPPED, SLOTS_AT, VERSION, Record, UnreadableRecord, unpack

STEPS = 160
PYTHON = from_source(record_module)
"""What C stores, it stores as this does, and nobody sees it doing so."""


class Killed(BaseException):
    pass


class Clock:
    """Counts stores, and ends the writer at one of them. torn: in its middle; else before it."""

    def __init__(self, at: int, torn: float = 0.0) -> None:
        self.at, self.torn, self.stores = at, torn, 0

    def store(self, memory: Any, key: Any, value: Any) -> None:
        self.stores += 1
        if self.stores == self.at:
            if isinstance(key, slice):  # one of a word happens or does not
                part = int(len(value) * self.torn)
                memory[key.start : key.start + part] = value[:part]
            raise Killed
        memory[key] = value


class Memory:
    """Shared memory, or its words, every store to which is counted."""

    def __init__(self, memory: Any, clock: Clock) -> None:
        self.memory, self.clock = memory, clock

    def __getitem__(self, key: Any) -> Any:
        return self.memory[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.clock.store(self.memory, key, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)


@dataclass(eq=False)
class Thing:
    """An object as the record sees one."""

    id: int
    value: int
    nlookup: int = 0
    place: int = 0


class Writer:
    """Things that change, and their record."""

    def __init__(self, made: type[Record] = Record) -> None:
        self.record = made.create()
        self.things: dict[int, Thing] = {}
        self.record.write = self.write
        self.record.live = lambda: list(self.things.values())

    def write(self, thing: Thing) -> None:
        if self.things.get(thing.id) is thing:
            thing.place = self.record.append(
                record_module.pack((thing.id, thing.value, bytes(120))), count=thing.nlookup
            )
        elif thing.id not in self.things:
            self.record.append(record_module.pack((thing.id, None, b"")))

    def state(self) -> dict[int, tuple[int, int]]:
        return {thing.id: (thing.value, thing.nlookup) for thing in self.things.values()}

    def step(self, rng: random.Random) -> None:
        """A random operation; what it does is in the record before the answer would be given."""
        number = rng.randrange(12)
        thing = self.things.get(number)
        other = self.things.get(rng.randrange(12))
        if thing is None:
            self.things[number] = thing = Thing(number, rng.randrange(1000), 1)
            self.record.changed.add(thing)
        elif other is not None and other is not thing and rng.random() < 0.3:
            thing.value, other.value = other.value, thing.value
            self.record.changed |= {thing, other}
        elif rng.random() < 0.4:
            thing.nlookup += 1
            self.record.count(thing)
        elif rng.random() < 0.5:
            thing.value += 1
            self.record.changed.add(thing)
        else:
            del self.things[number]
            self.record.drop(thing)
        if self.record.changed:
            self.record.flush()


def read(record: Record) -> dict[int, tuple[int, int]]:
    state: dict[int, tuple[int, int]] = {}
    for payload, count in record.entries():
        number, value, _ = unpack(payload)
        state.pop(number, None)
        if value is not None and count != DROPPED:
            state[number] = value, count
    return state


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is written anew every now and then, some of it at a time."""
    for module in (record_module, PYTHON):
        monkeypatch.setattr(module, "_CHUNK", 4096)
        monkeypatch.setattr(module, "_PORTION", 3)


def run(seed: int, steps: int, clock: Clock) -> tuple[Writer, list[dict[int, tuple[int, int]]]]:
    """The writer after so many operations, or where the clock has ended it; states that it may be found in."""
    rng = random.Random(seed)
    writer = Writer(PYTHON.Record)
    record: Any = writer.record
    record._words = Memory(record._words, clock)
    record._head = Memory(record._head, clock)
    made = PYTHON.Half

    class Counting(made):  # type: ignore[valid-type,misc]  # the record's own, with the clock in its memory
        def _extend(self, end: int) -> None:
            super()._extend(end)
            half: Any = self
            half.memory, half.words = Memory(half.memory, clock), Memory(half.words, clock)

    record._half = Counting(record.fd, record._words, 0)
    states = [writer.state()]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PYTHON, "Half", Counting)
            record.note("n", b"0")
            record.rewrite()
            for number in range(steps):
                writer.step(rng)
                states = [writer.state()]
                record.note("n", b"%d" % number)
    except Killed:
        states.append(writer.state())
    return writer, states


def test_the_writer_may_be_stopped_at_any_store(small: None) -> None:
    clock = Clock(0)
    writer, _ = run(1, STEPS, clock)
    writer.record.close()
    assert writer.record.rewritten > 3, "all was written anew now and then"
    assert clock.stores > 600
    tears = (0.0, 0.3, 0.9)
    unreadable = 0
    for at in range(1, clock.stores + 1):
        killed, (before, *after) = run(1, STEPS, Clock(at, tears[at % 3]))
        fd = os.dup(killed.record.fd)
        killed.record.close()
        try:
            found = Record.attach(fd)
        except UnreadableRecord:
            os.close(fd)
            unreadable += 1
            continue
        state = read(found)
        allowed = [before, *after]
        assert state in allowed, at
        assert found.noted("n") is not None
        found.close()
    assert unreadable < 15, "only before all was written for the first time"


def test_a_successor_goes_on_in_the_same_record(small: None) -> None:
    writer, _ = run(3, 100, Clock(0))
    record = writer.record
    for _ in range(5):
        successor = Writer()
        successor.record.close()
        record = successor.record = Record.attach(os.dup(record.fd))
        record.write, record.live = successor.write, lambda successor=successor: list(successor.things.values())  # type: ignore[misc]
        for number, (value, count) in read(record).items():
            successor.things[number] = Thing(number, value, count)
        assert successor.state() == writer.state()
        record.rewrite()
        rng = random.Random(4)
        for _ in range(50):
            successor.step(rng)
        assert read(record) == successor.state()
        writer.record.close()
        writer = successor
    record.close()


def test_what_one_flush_writes_is_there_at_once(small: None) -> None:
    """Also when the quick way has written a part of it, and while all is written anew."""
    writer = Writer()
    record = writer.record
    seen: list[int] = []

    def quick(changed: set[Any], half: record_module.Half) -> bool:
        one = changed.pop()
        writer.write(one)
        return False

    def write(thing: Thing) -> None:
        found = Record.attach(os.dup(record.fd))
        seen.append(len({value for value, _ in read(found).values()}))
        found.close()
        writer.write(thing)

    writer.things = {number: Thing(number, 0, 1) for number in range(12)}
    record.rewrite()
    record.quick, record.write = quick, write
    for value in range(1, 200):
        for thing in writer.things.values():
            thing.value = value
            record.changed.add(thing)
        record.flush()
    assert record.rewritten > 5
    assert set(seen) == {1}, "all of them have the same value whenever somebody looks"
    record.close()


@pytest.fixture
def record() -> Iterator[Record]:
    made = Record.create()
    yield made
    made.close()


def test_what_is_no_record_or_of_another_version_is_not_read(record: Record) -> None:
    with pytest.raises(UnreadableRecord, match="version 0"):
        Record.attach(record.fd)
    record.rewrite()
    Record.attach(os.dup(record.fd)).close()
    record._words[record_module._STATE] = VERSION + 1 << 32
    with pytest.raises(UnreadableRecord, match=f"version {VERSION + 1}, and {VERSION} is"):
        Record.attach(record.fd)
    with open("/dev/null", "rb") as file, pytest.raises(UnreadableRecord, match="no record"):
        Record.attach(file.fileno())


def test_notes_and_slots_survive(record: Record) -> None:
    record.rewrite()
    assert record.noted("init") is None
    record.note("init", b"\0\1")
    record.note("other", b"")
    record.slots[7] = 42
    again = Record.attach(os.dup(record.fd))
    assert (again.noted("init"), again.noted("other"), again.slots[7]) == (b"\0\1", b"", 42)
    assert len(record.slots) == record_module.LOG_AT - SLOTS_AT
    with pytest.raises(ValueError, match="no room"):
        record.note("large", bytes(4096))
    assert record.noted("init") == b"\0\1"
    again.close()


def test_without_room_there_is_no_record_until_all_was_written_anew(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    append = record_module.Half.append
    for failing in range(15, 60):
        writer, rng = Writer(), random.Random(failing)
        record, calls = writer.record, itertools.count()

        def sometimes(half: Any, parts: Sequence[bytes], calls: Iterator[int] = calls, failing: int = failing) -> int:
            if next(calls) == failing:
                raise full
            return append(half, parts)

        record.rewrite()
        failed = 0
        with monkeypatch.context() as patch:
            patch.setattr(record_module.Half, "append", sometimes)
            for _ in range(150):
                try:
                    writer.step(rng)
                except OSError:
                    failed += 1
                    with pytest.raises(UnreadableRecord):
                        Record.attach(record.fd)
        while record.changed or record._words[record_module._STATE] == 0:
            record.flush()
        again = Record.attach(os.dup(record.fd))
        assert (failed, read(again)) == (1, writer.state())
        again.close()
        record.close()


def test_memory_is_given_back(record: Record) -> None:
    """What the log has grown to, and then does not need any more."""
    thing = Thing(1, 1)

    def write(one: object) -> None:
        record.append(bytes(100_000))

    record.write = write
    record.live = lambda: [thing]
    record.rewrite()
    most = 0
    for _ in range(400):
        record.changed.add(thing)
        record.flush()
        most = max(most, os.fstat(record.fd).st_blocks * 512)
    assert record.rewritten > 5
    assert most < 3 * record_module._CHUNK
