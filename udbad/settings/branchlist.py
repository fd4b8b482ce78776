"""The list of branches of a mount, and the words of `-o` that make one and change it: br, add, append, del, mod, ..."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Final

from udbad.branch.branches import BranchSpec
from udbad.branch.spec import parse_branch, parse_path, shown
from udbad.errors import ExitCode, UserError

_BRANCH_FORM: Final = "PATH[=PERM[+ATTR...]]"
LIST_OPTIONS: Final[dict[str, tuple[str, str]]] = {
    **dict.fromkeys(
        ("br", "dirs"), (_BRANCH_FORM + "[:PATH...]", "The branches, top first; several of these follow one another.")
    ),
    **dict.fromkeys(
        ("add", "ins"), ("INDEX:" + _BRANCH_FORM, "Put a branch before the one that has this index, 0 on top.")
    ),
    "append": (_BRANCH_FORM, "Add a branch at the bottom."),
    "prepend": (_BRANCH_FORM, "Add a branch on top."),
    "del": ("PATH", "Take a branch out."),
    "mod": ("PATH=PERM[+ATTR...]", "Give a branch another permission and other attributes."),
}
"""Words about branches: the form of the value, and what they do. Only these take `name:value` as well."""

DIGITS: Final = "[0-9]{1,10}"


def edit_branches(branches: Sequence[BranchSpec], edits: Sequence[tuple[str, str]]) -> list[BranchSpec]:
    """Apply (option, value) pairs of add, ins, append, prepend, del and mod to a branch list, in order.

    Raises UserError (OPTION) for an index outside 0..len, a path that is no branch, and when no branch is left.
    """
    result = list(branches)
    for key, raw in edits:
        edit_branch(result, key, raw)
    if branches and not result:
        raise no_branch_left()
    return result


def no_branch_left() -> UserError:
    return UserError("the last branch cannot be removed: a union has at least one", ExitCode.OPTION)


def edit_branch(result: list[BranchSpec], key: str, raw: str) -> None:
    """Apply one of these. Raises as `edit_branches` does."""
    if key == "append":
        result.append(parse_branch(raw))
    elif key == "prepend":
        result.insert(0, parse_branch(raw))
    elif key == "del":
        del result[_position(result, key, raw, parse_path(raw))]
    elif key == "mod":
        spec = parse_branch(raw)
        if spec.perm is None:
            raise UserError(f"{key}={shown(raw)}: must be {LIST_OPTIONS[key][0]}", ExitCode.OPTION)
        place = _position(result, key, raw, spec.path)
        result[place] = spec._replace(path=result[place].path)
    else:
        index, colon, branch = raw.partition(":")
        if not colon or re.fullmatch(DIGITS, index) is None:
            raise UserError(f"{key}={shown(raw)}: must be {LIST_OPTIONS[key][0]}", ExitCode.OPTION)
        if int(index) > len(result):
            raise UserError(
                f"{key}={shown(raw)}: wrong index {index}, must be from 0 to {len(result)}", ExitCode.OPTION
            )
        result.insert(int(index), parse_branch(branch))


def _position(branches: Sequence[BranchSpec], key: str, raw: str, path: bytes) -> int:
    place = find_branch(branches, path)
    if place is None:
        raise UserError(f"{key}={shown(raw)}: {shown(path)} is not a branch", ExitCode.OPTION)
    return place


def find_branch(branches: Sequence[BranchSpec], path: bytes) -> int | None:
    """The index of the branch that `path` names: as it is written, else by where symbolic links lead."""
    for same in (os.path.normpath, os.path.realpath):
        wanted = same(path)
        for index, spec in enumerate(branches):
            if same(spec.path) == wanted:
                return index
    return None
