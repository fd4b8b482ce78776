"""What is mounted, where that is a layer: `docker-aufs:ROOT#ID`, the mount source that stands for a list of branches.

Looks at nothing; store.py does.
"""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple

from udbad.branch.branches import BranchSpec
from udbad.types import Perm

SCHEME: Final = "docker-aufs:"
FORM: Final = "docker-aufs:ROOT#ID, ROOT an absolute path"
REMOVING: Final = "-removing"
"""Ends the name of what is being removed from a store, and is no part of it any more."""
_ID: Final = "[A-Za-z0-9][A-Za-z0-9_.-]{0,234}(?<!-removing)"
"""A name in three directories, with room for what is appended to it."""

_FORM: Final = SCHEME + r"(?s:(?P<root>/[^\0]*)#(?P<id>[^#/]*))"


class Source(NamedTuple):
    """root: of the store. id: of the layer."""

    root: str
    id: str

    def top(self, ro: bool) -> BranchSpec:
        """The branch of this layer. ro: as one that others lie on, or of a view; its whiteouts count."""
        path = os.fsencode(os.path.join(self.root, "diff", self.id))
        return BranchSpec(path, Perm.RO, frozenset({"wh"})) if ro else BranchSpec(path, Perm.RW)

    def mount_point(self) -> str:
        """Where the store has its mount."""
        return os.path.join(self.root, "mnt", self.id)


def is_id(text: str) -> bool:
    """Whether that can be the id of a layer."""
    return re.fullmatch(_ID, text) is not None


def parse(text: str) -> Source | None:
    """None for what is no such source; ROOT may hold any character but NUL."""
    match = re.fullmatch(_FORM, text)
    if match is None or not is_id(match["id"]):
        return None
    return Source(match["root"], match["id"])


def absolute(text: str) -> str:
    """The source with ROOT as whoever calls us means it; other words as they are."""
    if not text.startswith(SCHEME):
        return text
    root, mark, layer = text.removeprefix(SCHEME).rpartition("#")
    return f"{SCHEME}{os.path.abspath(root)}{mark}{layer}"
