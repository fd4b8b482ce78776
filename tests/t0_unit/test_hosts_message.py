"""What hosts tell each other: encoded and read again, and the rules by which a reader knows that he has missed some."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udbad.hosts.message import (
    KINDS,
    ROLES,
    Message,
    Sequences,
    Unreadable,
    Verdict,
    decode,
    decode_mark,
    encode_mark,
    gather,
    portion,
)

words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
names = st.binary(min_size=1, max_size=12).map(lambda name: os.fsdecode(name.replace(b"\0", b"x").replace(b"/", b"y")))
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
messages = st.builds(
    Message, st.sampled_from(KINDS), words, words, words, st.integers(1, 1 << 60), words, st.sampled_from(ROLES),
    st.lists(st.tuples(paths, words)).map(tuple), st.lists(words).map(tuple),
)  # fmt: skip


@given(messages)
def test_what_is_told_is_understood(message: Message) -> None:
    assert decode(message.encode()) == message


@given(st.binary(max_size=64) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(
        st.sampled_from(["v", "kind", "host", "boot", "seq", "branch", "role", "paths", "marks", "mark"]), below
    ),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_nonsense_is_refused(data: bytes) -> None:
    """And nothing else is raised."""
    for read in (decode, decode_mark):
        with pytest.raises(Unreadable):
            read(data)


@given(messages, st.sampled_from(["v", "kind", "epoch", "host", "boot", "seq", "branch", "role"]))
def test_every_field_is_needed(message: Message, key: str) -> None:
    table = json.loads(message.encode())
    del table[key]
    with pytest.raises(Unreadable):
        decode(json.dumps(table).encode())


@pytest.mark.parametrize("path", ["/etc", "a\0b", "\ud800"])
def test_what_is_no_path_on_the_branch_is_refused(path: str) -> None:
    with pytest.raises(Unreadable):
        decode(Message("changes", "e", "h", "b", 1, "share", changes=[(path, "")]).encode())


@given(words)
def test_marks(mark: str) -> None:
    assert decode_mark(encode_mark(mark)) == mark


@given(st.data(), st.lists(st.sampled_from("ab"), min_size=1, max_size=30), st.sets(st.integers(0, 29)))
def test_whatever_is_lost_is_a_gap(data: st.DataObject, hosts: list[str], lost: set[int]) -> None:
    """Two hosts tell; some of it does not come, some comes twice. Before the first of a host nothing is expected."""
    reader = Sequences("share", "e")
    counts = dict.fromkeys("ab", 0)
    seen: dict[str, int] = {}
    for place, host in enumerate(hosts):
        counts[host] += 1
        if place in lost:
            continue
        message = Message("changes", "e", host, "boot", counts[host], "share")
        complete = host not in seen or seen[host] == counts[host] - 1
        assert reader.see(message) is (Verdict.NEXT if complete else Verdict.GAP)
        seen[host] = counts[host]
        if data.draw(st.booleans()):
            assert reader.see(message) is Verdict.REPEATED


NEXT = Message("changes", "e", "h", "boot", 8, "share")


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        (NEXT, Verdict.NEXT),
        (Message("changes", "e", "h", "boot", 7, "share"), Verdict.REPEATED),
        (Message("changes", "e", "h", "boot", 6, "share"), Verdict.GAP),
        (Message("changes", "e", "h", "boot", 9, "share"), Verdict.GAP),
        (Message("hello", "e", "h", "again", 1, "share"), Verdict.GAP),
        (Message("changes", "e", "h", "again", 8, "share"), Verdict.GAP),
        (Message("changes", "other", "h", "boot", 8, "share"), Verdict.GAP),
        (Message("changes", "e", "h", "boot", 8, "other"), Verdict.GAP),
        (Message("hello", "e", "another", "x", 1, "share"), Verdict.NEXT),
    ],
    ids=["next", "repeated", "back", "ahead", "restarted", "boot", "stream", "branch", "host"],
)
def test_what_may_follow(other: Message, verdict: Verdict) -> None:
    reader = Sequences("share", "e")
    reader.see(Message("changes", "e", "h", "boot", 7, "share"))
    assert reader.see(other) is verdict


def test_who_says_goodbye_may_come_again() -> None:
    reader = Sequences("share", "e")
    reader.see(Message("changes", "e", "h", "boot", 7, "share"))
    assert reader.see(Message("bye", "e", "h", "boot", 8, "share")) is Verdict.NEXT
    assert reader.see(Message("hello", "e", "h", "again", 1, "share")) is Verdict.NEXT


def test_changes_of_one_path_are_one() -> None:
    changes: dict[str, str] = {}
    for path, kind in (("a", "modify"), ("b", "move"), ("a", "attrib,modify"), ("c", "move"), ("c", ""), ("b", "move")):
        gather(changes, path, kind)
    assert changes == {"a": "modify,attrib", "b": "move", "c": ""}


@given(st.dictionaries(st.text("ab\udc80", min_size=1, max_size=3).map(lambda name: name * 30_000), words, max_size=12))
def test_a_portion_fits_in_a_message(changes: dict[str, str]) -> None:
    """Whatever a byte is in JSON, and none is left."""
    while changes:
        part = portion(changes)
        assert part == list(changes.items())[: len(part)]
        data = Message("changes", "e", "h", "b", 1, "share", changes=part).encode()
        assert len(part) == 1 or decode(data).changes == tuple(part)
        for path, _ in part:
            del changes[path]
