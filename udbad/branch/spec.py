"""The text form of branches: PATH[=PERM[+ATTR...]][:PATH...] (semantics 3, aufs(5)).

Parses and prints; touches no file system and decides no default: a permission that was left out
stays None, accept.py fills it in where the type of the file system is known.

In a path `\\:` `\\,` `\\=` and `\\\\` stand for the second character, so any path can be written; a
backslash before anything else is an ordinary character. The first `=` without a backslash ends the
path. Beside the attributes of aufs a branch takes options of the mount for itself: `+udba=MODE`, `+watch=WAY`.

Invariants: format_branches(parse_branches(text)) parses to the same list; an attribute in a parsed
BranchSpec is known and possible with its permission; a BranchSpec without permission has neither
attributes nor options of its own, because the syntax has no way to say it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from udbad.branch.branches import BranchSpec
from udbad.errors import ExitCode, UserError
from udbad.types import Perm

log = logging.getLogger(__name__)

UDBA_MODES: Final = {"none": "none", "reval": "reval", "notify": "notify", "fsnotify": "notify"}
"""What may follow `udba=`, aliases included, and the mode it means (semantics 2)."""
WATCH_WAYS: Final = {way: way for way in ("auto", "inotify", "fanotify")}
"""What may follow `watch=`."""

_OWN: Final = {
    "udba": (UDBA_MODES, "none, reval or notify"),
    "watch": (WATCH_WAYS, "auto, inotify or fanotify"),
}
"""Options of the mount that a branch may have for itself: what may be written, and the value it means."""


class Attribute(NamedTuple):
    """valid_on: permissions that it can go with. meaning: for people."""

    valid_on: frozenset[Perm]
    meaning: str


_ALL: Final = frozenset(Perm)
_RW: Final = frozenset({Perm.RW})
ATTRIBUTES: Final = {
    "wh": Attribute(
        frozenset({Perm.RO, Perm.RR}),
        "Its whiteouts and opaque marks count, those of overlayfs as well; without it those of read-only branches are "
        "ignored.",
    ),
    "nolwh": Attribute(_RW, "Whiteouts are separate files, not hard links to one."),
    "coo_reg": Attribute(_ALL, "Opening a file copies it to the nearest writable branch above."),
    "coo_all": Attribute(_ALL, "The same, and opening a directory, too."),
    "moo": Attribute(_RW, "Like `coo_reg`, and the source is removed."),
    "icex": Attribute(_ALL, "A copy-up to it forgives extended attributes that cannot be set here."),
    **{
        "icex" + short: Attribute(_ALL, f"The same for {which}.")
        for short, which in (
            ("sec", "`security.*`"),
            ("sys", "`system.*`"),
            ("tr", "`trusted.*`"),
            ("usr", "`user.*`"),
            ("oth", "others"),
        )
    },
    "unpin": Attribute(_ALL, "Without an effect."),
    "fhsm": Attribute(frozenset({Perm.RW, Perm.RO}), "Without an effect."),
}
"""The attribute table of semantics 3."""

_EXCLUSIVE: Final = frozenset({"coo_reg", "coo_all", "moo"})

_TOKEN: Final = r"(?s)\\.|."
_ESCAPE: Final = r"\\([\\:,=])"


_NEAR: Final = 0.65
"""Similarity (difflib) from which on a word was probably meant: one letter of three may be wrong."""
_FEW: Final = 24


def split_escaped(text: str, separator: str) -> list[str]:
    """Split at every `separator` that is not escaped; the escapes stay in the parts."""
    if "\\" not in text:
        return text.split(separator)
    parts = [""]
    for token in re.findall(_TOKEN, text):
        if token == separator:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def unescape(text: str) -> str:
    """Take the escaping backslashes out."""
    return re.sub(_ESCAPE, r"\1", text) if "\\" in text else text


def escape(text: str, special: str = "\\:,=") -> str:
    """The inverse of unescape(): a backslash before every character of `special`, which holds the backslash."""
    return "".join("\\" + char if char in special else char for char in text)


def suggestion(word: str, known: Iterable[str]) -> str:
    """`, the closest known one is 'X'`, for messages about unknown words.

    When none is near: all of them, when they are few, or nothing.
    """
    import difflib  # most words are right

    words = sorted(known)
    near = difflib.get_close_matches(word, words, 1, cutoff=_NEAR)
    if near:
        return f", the closest known one is {near[0]!r}"
    return f", known are {', '.join(map(repr, words))}" if len(words) <= _FEW else ""


def shown(text: str | bytes) -> str:
    """A path or word for a message of one line: quoted with escapes only where it is not printable."""
    text = os.fsdecode(text)
    return text if text.isprintable() else repr(text)


def printable(path: bytes) -> str:
    """`path` for a terminal: whatever is not printable UTF-8 is escaped (a name may hold any byte)."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def parse_branches(text: str) -> list[BranchSpec]:
    """The value of `br=`: branches separated by colons, top first.

    `text` may carry undecodable bytes as os.fsdecode() does. Raises UserError (OPTION) as parse_branch().
    """
    return [parse_branch(part) for part in split_escaped(text, ":")]


def parse_branch(text: str) -> BranchSpec:
    """One PATH[=PERM[+ATTR...]].

    An empty permission after the `=` is ro (semantics 3). Attributes that cannot go with the
    permission are dropped with one warning; of coo_reg, coo_all and moo the last possible one wins.
    Raises UserError (OPTION) for an empty path and for an unknown permission, attribute or mode;
    aufs carries on with a warning there, which turns a typing error into another union than was asked for.
    """
    parts = split_escaped(text, "=")
    path = parse_path(parts[0])
    if len(parts) == 1:
        return BranchSpec(path)
    # Only the first = separates: one in +udba=MODE belongs to the attribute.
    word, *attrs = "=".join(parts[1:]).split("+")
    return _with_attrs(path, _parse_perm(path, word), attrs)


def parse_path(text: str) -> bytes:
    """The path of a branch, escapes taken out. Raises UserError (OPTION) when it is empty or holds a NUL."""
    path = os.fsencode(unescape(text))
    if not path:
        raise UserError("empty branch path", ExitCode.OPTION)
    if b"\0" in path:
        raise UserError(f"branch path with a NUL byte: {shown(path)}", ExitCode.OPTION)
    return path


def _parse_perm(path: bytes, word: str) -> Perm:
    if not word:
        return Perm.RO
    try:
        return Perm(word)
    except ValueError:
        raise UserError(
            f"branch {shown(path)}: unknown permission {word!r}, allowed are rw, ro, rr "
            "(a '=' in a path is written \\=)",
            ExitCode.OPTION,
        ) from None


def _with_attrs(path: bytes, perm: Perm, words: list[str]) -> BranchSpec:
    attrs: set[str] = set()
    dropped: list[str] = []
    own: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key in _OWN and equals:
            own[key] = _parse_own(path, key, value)
        elif word not in ATTRIBUTES:
            known = [*ATTRIBUTES, *(f"{name}={one}" for name, (values, _) in _OWN.items() for one in values)]
            raise UserError(
                f"branch {shown(path)}: unknown attribute {word!r}{suggestion(word, known)}", ExitCode.OPTION
            )
        elif perm not in ATTRIBUTES[word].valid_on:
            dropped.append(word)
        else:
            if word in _EXCLUSIVE:
                attrs -= _EXCLUSIVE
            attrs.add(word)
    if dropped:
        log.warning("branch %s: +%s dropped, impossible on a %s branch", shown(path), "+".join(dropped), perm.value)
    return BranchSpec(path, perm, frozenset(attrs), **own)


def _parse_own(path: bytes, key: str, value: str) -> str:
    values, allowed = _OWN[key]
    if value not in values:
        raise UserError(f"branch {shown(path)}: {key}={value}: must be {allowed}", ExitCode.OPTION)
    return values[value]


def format_branch(spec: BranchSpec) -> str:
    """The text that parse_branch() turns into `spec`, escapes included."""
    words = [] if spec.perm is None else [spec.perm.value, *sorted(spec.attrs)]
    if words:
        words += [f"{key}={value}" for key in _OWN if (value := getattr(spec, key)) is not None]
    return escape(os.fsdecode(spec.path)) + ("=" + "+".join(words) if words else "")


def format_branches(specs: Iterable[BranchSpec]) -> str:
    """The value of `br=` for these branches."""
    return ":".join(map(format_branch, specs))
