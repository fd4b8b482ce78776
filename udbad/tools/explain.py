"""Answers to "which branch serves this path" and "why": for people, read from the branches as they are now.

Read-only, and independent of what the daemon has cached: it walks down from the branch roots and applies
the rules of lookup.py (semantics 4) with a word of explanation at each step. Also looks at what no
lookup would: copies that are hidden. Results are plain dictionaries, ready for JSON.
"""

from __future__ import annotations

import os
import stat as st_mod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from udbad.branch import syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.inodes.table import Dir, Node
from udbad.union.superblock import Superblock

_KINDS = {
    st_mod.S_IFREG: "file", st_mod.S_IFDIR: "directory", st_mod.S_IFLNK: "symlink", st_mod.S_IFIFO: "fifo",
    st_mod.S_IFSOCK: "socket", st_mod.S_IFCHR: "character device", st_mod.S_IFBLK: "block device",
}  # fmt: skip


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
    st: os.stat_result | None
    whiteout: bool
    opaque: bool
    role: str
    why: str
    fd: int = -1


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
                        "whiteout": seen.whiteout,
                        "opaque": seen.opaque,
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
    return None if st is None else _KINDS.get(st_mod.S_IFMT(st.st_mode), "unknown")


def _known(sb: Superblock, parts: Sequence[bytes]) -> Node | None:
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
        for name in parts:
            step = _examine(places, name)
            steps.append(step)
            for place in places:
                os.close(place.fd)
            places = [_Place(seen.branch, seen.fd, seen.why if seen.role == "hidden" else "")
                      for seen in step if seen.fd >= 0]  # fmt: skip
    finally:
        for place in places:
            os.close(place.fd)
    return steps


def _root(places: Sequence[_Place]) -> list[_Seen]:
    return [
        _Seen(place.branch, os.fstat(place.fd), False, False, "merged" if index else "serves",
              "the root of every branch is merged")
        for index, place in enumerate(places)
    ]  # fmt: skip


def _examine(places: Sequence[_Place], name: bytes) -> list[_Seen]:
    """Look up one name on every branch, top first; semantics 4.2 decides the roles."""
    step: list[_Seen] = []
    top: _Seen | None = None
    ended = ""  # why nothing below is visible any more
    lowest = max((index for index, place in enumerate(places) if not place.hidden), default=-1)
    try:
        for index, place in enumerate(places):
            seen = _look(place, name)
            step.append(seen)
            if place.hidden:
                seen.role, seen.why = ("absent" if seen.st is None else "hidden"), place.hidden
                continue
            if ended:
                seen.role, seen.why = ("absent" if seen.st is None else "hidden"), ended
                continue
            # A whiteout on the lowest branch has nothing to hide, so nobody looks for it.
            marks = seen.whiteout and index < lowest
            label = os.fsdecode(place.branch.path)
            if seen.st is None:
                seen.role = "absent"
                seen.why = "a whiteout is here" if marks else "nothing is here"
                if marks:
                    ended = f"the whiteout on {label} hides it"
            elif top is None:
                top = seen
                seen.role, seen.why = "serves", "the first branch that has it"
                if _kind(seen.st) != "directory":
                    ended = f"the {_kind(seen.st)} on {label} is above it"
            elif _kind(seen.st) == "directory":
                seen.role, seen.why = "merged", "a directory below the same directory"
            else:
                seen.role, seen.why = "hidden", "the directory above it has the name"
            if not ended and seen.st is not None:
                if seen.role != "hidden" and seen.opaque:
                    ended = f"the directory on {label} is opaque"
                elif marks:
                    ended = f"the whiteout on {label} hides it"
    except BaseException:
        for seen in step:
            if seen.fd >= 0:
                os.close(seen.fd)
        raise
    return step


def _look(place: _Place, name: bytes) -> _Seen:
    """What is on one branch under this name."""
    st: os.stat_result | None = None
    fd = -1
    opaque = False
    try:
        st = syscalls.stat_at(place.fd, name)
        if st_mod.S_ISDIR(st.st_mode):
            fd = syscalls.open_dir_at(place.fd, name)
            opaque = place.branch.whable and whiteout.opaque(fd)
    except (FileNotFoundError, NotADirectoryError):
        # Also when it was replaced between the two calls: then what is gone is not there.
        if fd < 0 and st is not None and st_mod.S_ISDIR(st.st_mode):
            st = None
    marked = place.branch.whable and whiteout.present(place.fd, name)
    return _Seen(place.branch, st, marked, opaque, "", "", fd)
