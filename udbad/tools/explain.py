"""Answers to "which branch serves this path" and "why": for people, read from the branches as they are now.

Read-only, and independent of what the daemon has cached: it walks down from the branch roots and puts what
layers.py says (semantics 4) into words at each step. Also looks at what no
lookup would: copies that are hidden. Results are plain dictionaries, ready for JSON.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from udbad.branch import redirect, whiteout
from udbad.branch.branches import Branch
from udbad.branch.layers import End, Held, Part, look, merge
from udbad.branch.spec import printable
from udbad.branch.walk import kind_name
from udbad.inodes.node import Dir, Node
from udbad.union import redirects
from udbad.union.superblock import Superblock

_ROLES = {
    Part.TOP: "serves", Part.MERGED: "merged", Part.SKIPPED: "hidden", Part.COVERED: "hidden", Part.NOTHING: "absent",
}  # fmt: skip
_WORDS = {
    Part.TOP: "the first branch that has it",
    Part.MERGED: "a directory below the same directory",
    Part.SKIPPED: "the directory above it has the name",
}


@dataclass(slots=True)
class _Place:
    """A directory of the path on one branch. hidden: why the union does not look there, "" when it does."""

    branch: Branch
    fd: int
    hidden: str


@dataclass(slots=True)
class _Seen:
    """What a branch has under one name. role: serves, merged, hidden or absent; why in words."""

    branch: Branch
    held: Held
    role: str
    why: str

    @property
    def st(self) -> os.stat_result | None:
        return self.held.st


def where(sb: Superblock, parts: Sequence[bytes]) -> dict[str, Any]:
    """Which branch serves a path, and every copy of it, hidden ones too.

    parts: the names of the path in the mount, none for its root. Raises OSError when a branch cannot be read.
    """
    steps = _walk(sb, parts)
    last = steps[-1]
    serving = next((seen for seen in last if seen.role == "serves"), None)
    copies = [
        {
            "branch": os.fsdecode(seen.branch.path),
            "index": seen.branch.index,
            "path": os.fsdecode(os.path.join(seen.branch.path, *parts)),
            "kind": _kind(seen.st),
            "size": seen.st.st_size,
            "mtime": seen.st.st_mtime,
            "role": seen.role,
            "why": seen.why,
        }
        for seen in last
        if seen.st is not None
    ]
    answer: dict[str, Any] = {
        "path": "/" + os.fsdecode(b"/".join(parts)),
        "exists": serving is not None,
        "branch": None if serving is None else os.fsdecode(serving.branch.path),
        "copies": copies,
    }
    node = _known(sb, parts)
    if node is not None:
        # What the daemon believes; differs from the above only in mode none, or for an instant.
        answer["cached"] = {"node": node.id, "branch": os.fsdecode(node.branch.path)}
        if node.plink is not None:
            answer["data"] = os.fsdecode(os.path.join(node.plink.branch.path, whiteout.PLINK_DIR, node.plink.name))
    return answer


def why(sb: Superblock, parts: Sequence[bytes]) -> dict[str, Any]:
    """How a path is resolved: for each of its names, what every branch has and what follows from it."""
    steps = _walk(sb, parts)
    return {
        "path": "/" + os.fsdecode(b"/".join(parts)),
        "exists": any(seen.role == "serves" for seen in steps[-1]),
        "steps": [
            {
                "name": os.fsdecode(name) or "/",
                "branches": [
                    {
                        "branch": seen.branch.describe(),
                        "kind": _kind(seen.st),
                        "whiteout": seen.held.whiteout,
                        "opaque": seen.held.opaque,
                        "role": seen.role,
                        "why": seen.why,
                    }
                    for seen in step
                ],
            }
            for name, step in zip((b"", *parts), steps, strict=False)
        ],
    }


def _kind(st: os.stat_result | None) -> str | None:
    return None if st is None else kind_name(st.st_mode)


def _known(sb: Superblock, parts: Sequence[bytes]) -> Node | None:
    sb.table.read_all()
    node: Node = sb.root
    for part in parts:
        child = node.children.get(part) if type(node) is Dir else None
        if child is None:
            return None
        node = child
    return node


def _walk(sb: Superblock, parts: Sequence[bytes]) -> list[list[_Seen]]:
    """One list of findings for the root and for each name, the last one that exists anywhere included."""
    places = [_Place(branch, os.dup(branch.root_fd), "") for branch in sb.branches.branches]
    steps = [_root(places)]
    try:
        for at, name in enumerate(parts):
            step = _examine(sb, b"/" + b"/".join(parts[:at]), places, name)
            steps.append(step)
            for place in places:
                os.close(place.fd)
            places = [_Place(seen.branch, seen.held.fd, seen.why if seen.role == "hidden" else "")
                      for seen in step if seen.held.fd >= 0]  # fmt: skip
    finally:
        for place in places:
            os.close(place.fd)
    return steps


def _root(places: Sequence[_Place]) -> list[_Seen]:
    return [
        _Seen(place.branch, Held(os.fstat(place.fd)), "merged" if index else "serves",
              "the root of every branch is merged")
        for index, place in enumerate(places)
    ]  # fmt: skip


def _held(place: _Place, name: bytes) -> Held:
    return look(place.fd, name, place.branch.whable, place.branch.overlay)


def _redirect(sb: Superblock, seen: _Seen) -> bytes | None:
    """What a directory that counts says of where it is below; the empty path where that can be none."""
    if seen.role not in ("serves", "merged") or seen.branch.id not in sb.redirecting:
        return None
    if seen.held.fd < 0 or seen.held.opaque:
        return None
    try:
        return redirect.read(seen.held.fd, sb.redirect_key)
    except redirect.Unusable:
        return b""


def _follow_redirect(sb: Superblock, above: bytes, step: list[_Seen]) -> None:
    """Where the uppermost part of a directory that says so is below, in the place of what is there of its name.

    above: the path of the directory it is in, as the branches below have it.
    """
    told = next(((seen, said) for seen in step if (said := _redirect(sb, seen)) is not None), None)
    if told is None:
        return
    seen, said = told
    label = os.fsdecode(seen.branch.path)
    path = said if said.startswith(b"/") or not said else above.rstrip(b"/") + b"/" + said
    found = {layer.branch.index: layer for layer in redirects.followed(sb, seen.branch.index, path)} if path else {}
    for lower in [one for one in step if one.branch.index > seen.branch.index]:
        layer = found.pop(lower.branch.index, None)
        if layer is not None:
            if lower.held.fd >= 0:
                os.close(lower.held.fd)
            lower.held = Held(os.fstat(layer.fd), fd=layer.fd)
            lower.role, lower.why = "merged", f"the redirect on {label} leads to {printable(path)}"
        else:
            lower.role, lower.why = "", f"the redirect on {label} leads elsewhere"
    for layer in found.values():
        step.append(
            _Seen(layer.branch, Held(os.fstat(layer.fd), fd=layer.fd), "merged",
                  f"the redirect on {label} leads to {printable(path)}")
        )  # fmt: skip
    step.sort(key=lambda one: one.branch.index)


def _examine(sb: Superblock, place_at: bytes, places: Sequence[_Place], name: bytes) -> list[_Seen]:
    """Look up one name on every branch, top first; layers.py decides the roles. place_at: the path of `places`."""
    step: list[_Seen] = []
    try:
        for place in places:
            step.append(_Seen(place.branch, _held(place, name), "", place.hidden))
    except BaseException:
        for seen in step:
            if seen.held.fd >= 0:
                os.close(seen.held.fd)
        raise
    in_range = [seen for seen, place in zip(step, places, strict=True) if not place.hidden]
    ended = ""  # why nothing below is visible any more
    for seen, (part, end) in zip(in_range, merge(seen.held for seen in in_range), strict=True):
        # A whiteout on the lowest branch has nothing to hide, so nobody looks for it.
        marked = end is End.WHITEOUT and seen is not in_range[-1]
        if ended:
            seen.why = ended
        elif part is Part.NOTHING:
            seen.why = "a whiteout is here" if marked else "nothing is here"
        else:
            seen.why = _WORDS[part]
        label = os.fsdecode(seen.branch.path)
        if end is End.OBJECT:
            ended = f"the {_kind(seen.st)} on {label} is above it"
        elif end is End.OPAQUE:
            ended = f"the directory on {label} is opaque"
        elif marked:
            ended = f"the whiteout on {label} hides it"
        seen.role = _ROLES[part]
    _follow_redirect(sb, place_at, step)
    for seen in step:
        seen.role = seen.role or ("absent" if seen.st is None else "hidden")
    return step
