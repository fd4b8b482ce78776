"""What hosts tell each other of a branch, and by which rules a reader knows that he has missed something.

Two subjects for each branch. On `changes`, whoever changes it, or watches it where its files are, says what has
changed: numbered by himself, from one on, for as long as his process lives ("boot"). On `marks`, who reads that asks
whether he has heard all: every publisher passes a mark on among his changes, after all that had happened when he got
it. So a reader who gets back a mark that he has made at a moment of his own clock knows all that was changed before
that moment, whatever has been how late on the way, and whoever has been stopped in between.

What a message says is a hint; what the branch says counts. What cannot be understood is a gap: something was missed.
Pure: no clock, no socket.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

VERSION: Final = 1
MAX_BYTES: Final = 512 * 1024
"""Of a message; servers take a megabyte and more."""
KINDS: Final = ("hello", "changes", "passed", "bye")
"""A publisher has begun, and will miss nothing from here on; what has changed; marks that are passed on; he ends, and
has told everything."""
ROLES: Final = ("watch", "mount")
"""Whoever publishes watches the files where they are, and sees the changes of everybody; or is a mount, and tells what
was changed through it."""
EVERYTHING: Final = "./"
"""The path that stands for all of a branch."""

_AT_ONCE: Final = 1000
"""Paths in one message, which may have 4 KiB each in theory."""
_BYTES: Final = MAX_BYTES // 8  # a byte may be six in JSON

Change = tuple[str, str]
"""A path on the branch, with a slash at its end for all below it, too; and what has become of it (`udbad feed`)."""


class Unreadable(ValueError):
    """No message, or none of a version that is known."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message on `changes`.

    epoch: the stream that the publisher writes to, as it is identified. host: a name for the publisher, unique; boot:
    for his process. seq: the number of the message among those of this process about this branch, from 1 on.
    """

    kind: str
    epoch: str
    host: str
    boot: str
    seq: int
    branch: str
    role: str = "watch"
    changes: Sequence[Change] = ()
    marks: Sequence[str] = ()

    def encode(self) -> bytes:
        """JSON. Undecodable bytes of paths travel as the surrogates of os.fsdecode()."""
        table: dict[str, Any] = {
            "v": VERSION, "kind": self.kind, "epoch": self.epoch, "host": self.host, "boot": self.boot,
            "seq": self.seq, "branch": self.branch, "role": self.role,
        }  # fmt: skip
        if self.changes:
            table["paths"] = self.changes
        if self.marks:
            table["marks"] = self.marks
        return json.dumps(table, separators=(",", ":")).encode()


def decode(data: bytes) -> Message:
    """Raises Unreadable."""
    table = _object(data)
    texts = [table.get(key) for key in ("kind", "epoch", "host", "boot", "branch", "role")]
    seq = table.get("seq")
    if not all(isinstance(text, str) and text for text in texts) or type(seq) is not int or seq < 1:
        raise Unreadable("a field is missing, or of another type")
    kind, epoch, host, boot, branch, role = map(str, texts)
    if kind not in KINDS or role not in ROLES:
        raise Unreadable(f"neither kind {kind!r} nor role {role!r} may be unknown")
    return Message(kind, epoch, host, boot, seq, branch, role, _changes(table), _marks(table))


def _object(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise Unreadable("too long")
    try:
        table = json.loads(data)
    except (ValueError, RecursionError):
        raise Unreadable("not JSON") from None
    if not isinstance(table, dict):
        raise Unreadable("not an object")
    if table.get("v") != VERSION:
        raise Unreadable(f"version {table.get('v')!r}")
    return table


def _changes(table: dict[str, Any]) -> tuple[Change, ...]:
    paths = table.get("paths", [])
    if not isinstance(paths, list):
        raise Unreadable("paths must be a list")
    for one in paths:
        if not isinstance(one, list) or len(one) != 2 or not all(isinstance(text, str) for text in one):
            raise Unreadable("a path must be [path, kind]")
        if one[0].startswith("/") or "\0" in one[0] or not _is_path(one[0]):
            raise Unreadable("a path must be one on the branch")
    return tuple((path, kind) for path, kind in paths)


def _is_path(text: str) -> bool:
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that os.fsdecode() does not make
        return False
    return True


def _marks(table: dict[str, Any]) -> tuple[str, ...]:
    marks = table.get("marks", [])
    if not isinstance(marks, list) or not all(isinstance(mark, str) for mark in marks):
        raise Unreadable("marks must be a list of strings")
    return tuple(marks)


def gather(changes: dict[str, str], path: str, words: str) -> None:
    """One change more among others, by their paths: of each path all that has become of it. No words: anything."""
    had = changes.get(path)
    if had is None:
        changes[path] = words
    elif had != words:
        changes[path] = ",".join(_unique((*had.split(","), *words.split(",")))) if had and words else ""


def _unique(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def portion(changes: Mapping[str, str]) -> list[Change]:
    """As many of them, from the first on, as one message may have; the rest is for the next one."""
    found: list[Change] = []
    size = 0
    for path, words in changes.items():
        size += len(path)
        if len(found) >= _AT_ONCE or (found and size > _BYTES):
            break
        found.append((path, words))
    return found


def encode_mark(mark: str) -> bytes:
    return json.dumps({"v": VERSION, "mark": mark}).encode()


def decode_mark(data: bytes) -> str:
    """Raises Unreadable."""
    mark = _object(data).get("mark")
    if not isinstance(mark, str) or not mark or len(mark) > 256:
        raise Unreadable("no mark")
    return mark


class Verdict(Enum):
    """What a message is to a reader who has read those before it."""

    NEXT = "next"
    """It follows what is known, or is the first of its host."""
    REPEATED = "repeated"
    """The last one once more: its publisher had no answer when he sent it first."""
    GAP = "gap"
    """Something may have been missed before it; it is what the host's next message has to follow."""


class Sequences:
    """Up to where a reader of a branch has read, host by host."""

    def __init__(self, branch: str, epoch: str) -> None:
        self._branch = branch
        self._epoch = epoch
        self._last: dict[str, tuple[str, int]] = {}
        """By host: its boot, and the number of its last message."""

    def see(self, message: Message) -> Verdict:
        if message.branch != self._branch or message.epoch != self._epoch:
            return Verdict.GAP
        known = self._last.get(message.host)
        self._last[message.host] = (message.boot, message.seq)
        if message.kind == "bye":
            del self._last[message.host]
        if known is None:
            return Verdict.NEXT
        boot, last = known
        if message.boot != boot:
            return Verdict.GAP  # it was started anew: nobody has told what happened meanwhile
        if message.seq == last:
            return Verdict.REPEATED
        return Verdict.NEXT if message.seq == last + 1 else Verdict.GAP
