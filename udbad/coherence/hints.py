"""Events from elsewhere (`udbad feed`): somebody says that a path has changed on a branch.

A site may know of changes that no event here tells of: a file server's own log, a message bus, a build that has just
been copied in. What it says is a hint as every other one: it is believed only that one had better look. A wrong hint
costs a comparison, a missing one leaves what `udba=none` promises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from udbad.branch import whiteout
from udbad.branch.branches import BranchSet
from udbad.coherence.base import Coherence
from udbad.coherence.inotify import ATTRIBUTES, CLOSED, CONTENT, MODIFIED, NAMES, TOUCHED
from udbad.inodes.node import Dir
from udbad.types import MADE, MOVED_FROM, MOVED_TO, REMOVED

ANYTHING: Final = NAMES | CONTENT | ATTRIBUTES | MODIFIED | TOUCHED

_KINDS: Final = {
    "create": NAMES | MADE,
    "delete": NAMES | REMOVED,
    "move": NAMES,
    "moved_from": NAMES | MOVED_FROM,
    "moved_to": NAMES | MOVED_TO,
    "modify": CONTENT | MODIFIED,
    "close_write": CONTENT | CLOSED,
    "attrib": ATTRIBUTES | TOUCHED,
    "isdir": 0,
}
"""The words of inotifywait(1), which others use as well."""

Path = Sequence[bytes]
"""Names from the root of the union down."""


def kinds_of(words: str) -> int:
    """What a hint is about, as bits of coherence/inotify.py.

    words: of inotifywait(1), in any case, with commas in between; with one that is not known, and without any, it may
    be anything.
    """
    kinds = 0
    for word in words.lower().split(","):
        kinds |= _KINDS.get(word.strip(), ANYTHING)
    return kinds or ANYTHING


def roots_of(branches: BranchSet, mount_point: bytes) -> list[bytes]:
    """What absolute paths in the union begin with, the longest first: one branch may lie in another one's directory."""
    return sorted([mount_point, *(branch.path for branch in branches.branches)], key=len, reverse=True)


def inside(roots: Sequence[bytes], path: bytes) -> Path | None:
    """The names of a path in the union; None when it is not in it.

    path: absolute, below one of `roots_of`, or relative to any of them. It is not looked up: what it names may be gone,
    and a link in it is none of the union's.
    """
    if path.startswith(b"/"):
        for root in roots:
            if path == root or path.startswith(root.rstrip(b"/") + b"/"):
                path = path[len(root) :]
                break
        else:
            return None
    names = [name for name in path.split(b"/") if name not in (b"", b".")]
    return None if b".." in names else names


def take(coherence: Coherence, path: Path, kinds: int) -> bool:
    """Look at what a hint is about, and have the kernel forget what is not so any more.

    kinds: bits of coherence/inotify.py. True when anything is cached that the hint could be about.
    """
    if any(name.startswith(whiteout.PREFIX) for name in path):
        above, name = path[:-1], whiteout.subject(path[-1])
        if name is None or any(one.startswith(whiteout.PREFIX) for one in above):
            return False  # of our own
        path, kinds = [*above, name] if name else above, NAMES
    node = coherence.sb.root
    for name in path[:-1]:
        child = node.children.get(name)
        if type(child) is not Dir:
            return coherence.hint(node, name, NAMES)  # nothing below it is known, but it may have come with the rest
        node = child
    return coherence.hint(node, path[-1] if path else b"", kinds)


def take_one(coherence: Coherence, roots: Sequence[bytes], path: bytes, kinds: int) -> bool | None:
    """`take` for a path as `inside` has it; one that ends with a slash stands for all that is below it, too.

    True when anything is cached that it could be about, None when it is not in the union.
    """
    names = inside(roots, path)
    if names is None:
        return None
    return coherence.invalidate(names) > 0 if path.endswith(b"/") else take(coherence, names, kinds)
