"""What the branches say a name of the union is (semantics 4).

`resolve` asks them, top to bottom, and is the only place that knows layer order for names. Nothing here changes what is
known of the union, or tells anybody: that is for lookup.py, or for the coherence strategy where an event made it ask.
What is found of a directory has descriptors, which go to its node, or back by `discard`.
"""

from __future__ import annotations

import os
import stat as st_mod
from enum import Enum
from typing import ClassVar, Final, Literal

from udbad.branch import syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.branch.syscalls import find_at, fstat
from udbad.errors import NO_DIRECTORY, eio, estale
from udbad.inodes.node import Dir, Index, Layer, Node
from udbad.union import redirects
from udbad.union.superblock import LAST_DEPTH, Superblock

_S_IFDIR, _S_IFCHR = st_mod.S_IFDIR, st_mod.S_IFCHR
_S_IFMT = 0o170000


class Answer(Enum):
    """What a search for a name came to, and so what whoever asked has to do next."""

    FOUND = "found"
    """An object is visible. It is for `intern` or `discard`, as a directory comes with descriptors."""
    NEGATIVE = "negative"
    """No layer shows the name and no whiteout ended the search. The last layer, where one hides nothing, was not
    asked for it: who makes an object there has to look."""
    WHITED = "whited"
    """A whiteout hides the name. Who makes an object on its branch has to remove it afterwards."""
    CLEAR = "clear"
    """No branch has the name, nor a whiteout: an object can be made anywhere, without looking."""


FOUND: Final = Answer.FOUND
NEGATIVE: Final = Answer.NEGATIVE
WHITED: Final = Answer.WHITED
"""By names of their own: to ask an Enum for one takes as long as a system call before Python 3.12."""


class Found:
    """A visible object: its top branch and attributes, and for a directory every merged layer."""

    __slots__ = ("branch", "examined", "kind", "layers", "moved", "offline", "opaque", "st", "whited")

    answer: ClassVar[Literal[Answer.FOUND]] = Answer.FOUND

    def __init__(
        self, kind: int, branch: Branch, st: os.stat_result, layers: list[Layer] | None, examined: int = 0
    ) -> None:
        self.kind = kind
        self.branch = branch
        self.st = st
        self.layers = layers
        self.examined = examined
        """Branches looked at."""
        self.whited: int | None = None
        """Index of the branch whose whiteout, or redirect, ended the search for lower layers by this name."""
        self.moved = False
        """As `Dir.moved`."""
        self.opaque: int | None = None
        """Index of the branch whose opaque mark did."""
        self.offline: list[Layer] | None = None
        """As `Dir.offline`."""


class Missing:
    """A name that nothing is visible of."""

    __slots__ = ("answer", "examined", "whited")

    def __init__(
        self, answer: Literal[Answer.NEGATIVE, Answer.WHITED, Answer.CLEAR], examined: int, whited: int | None = None
    ) -> None:
        self.answer = answer
        self.examined = examined
        """Branches looked at."""
        self.whited = whited
        """Index of the branch whose whiteout hides the name."""

    def excludes_whiteout(self, parent: Dir, branch: Branch) -> bool:
        """Whether the search has shown that there is no whiteout on `branch`, where an object is going to be made."""
        if self.answer is not NEGATIVE:
            return self is CLEAR
        return branch.index < parent.layers[-1].branch.index and parent.layer(branch.index) is not None


CLEAR = Missing(Answer.CLEAR, 0)
_NEGATIVE = [Missing(Answer.NEGATIVE, examined) for examined in range(LAST_DEPTH + 1)]
"""By the number of branches that were looked at: most searches that find nothing need no object of their own."""
_TRIES = 16
"""How often a directory may vanish between stat and open, before the branch is said to change too fast."""


def _negative(examined: int) -> Missing:
    return _NEGATIVE[examined] if examined <= LAST_DEPTH else Missing(Answer.NEGATIVE, examined)


def resolve(sb: Superblock, parent: Dir, name: bytes, below: Index = -1, tries: Index = _TRIES) -> Found | Missing:
    """What `name` is in `parent` according to the branches now.

    below: look only at branches with a larger index. Raises ESTALE when somebody changes the name all the time; EIO
    when nobody has it, but a branch that does not answer may.
    Order inside a branch: the name first, then its whiteout, because a whiteout hides lower branches only.
    """
    layers = parent.layers
    last = len(layers) - 1
    examined = 0
    for pos, layer in enumerate(layers):
        branch = layer.branch
        if branch.index <= below:
            continue
        fd = layer.fd
        if fd < 0:
            if branch.offline:
                continue
            fd = sb.layer_fd(parent, layer)
        examined += 1
        st = find_at(fd, name)
        if st is None:
            # The last layer is asked, too, where what a whiteout hides may be on a branch that does not answer.
            if branch.whable and (pos < last or parent.offline) and whiteout.present(fd, name):
                if parent.offline:
                    _check_known(parent, below, branch.index)
                return Missing(WHITED, examined, branch.index)
            continue
        kind = st.st_mode & _S_IFMT
        if kind != _S_IFDIR:
            if kind == _S_IFCHR and branch.overlay and whiteout.is_device(st):
                if parent.offline:
                    _check_known(parent, below, branch.index)
                return Missing(WHITED, examined, branch.index)
            return Found(kind, branch, st, None, examined)
        try:
            return _merge(sb, parent, name, pos, st, examined)
        except NO_DIRECTORY:
            # Somebody changed the branch between stat and open: resolve again, from what is there now.
            if not tries:
                raise estale() from None
            return resolve(sb, parent, name, below, tries - 1)
    if parent.offline:
        _check_known(parent, below, len(sb.branches))
    return _negative(examined)


def _check_known(parent: Dir, below: int, end: int) -> None:
    """Raises EIO when a branch between these two has what nobody knows in a directory."""
    if parent.offline and any(below < layer.branch.index < end for layer in parent.offline):
        raise eio()


def check_changeable(parent: Dir) -> None:
    """Raises EIO where a branch that does not answer may have names of a directory: whoever changes one would have to
    know whether it is there, and what a whiteout has to hide."""
    if parent.offline:
        raise eio()


def check_top(node: Dir, index: int) -> None:
    """Raises EIO where a branch that does not answer, and is above this one, may have a directory: what is about to be
    changed may not be what is visible when it answers again."""
    if node.offline and node.offline[0].branch.index < index:
        raise eio()


def opened(branch: Branch, dirfd: int, name: bytes) -> Found:
    """A directory that only this branch has, in its directory `dirfd`. Raises FileNotFoundError, NotADirectoryError."""
    fd = syscalls.open_dir_at(dirfd, name)
    st = fstat(fd)
    return Found(_S_IFDIR, branch, st, [Layer(branch, st.st_dev, st.st_ino, st.st_nlink, fd)], 1)


def _merge(sb: Superblock, parent: Dir, name: bytes, first: int, st: os.stat_result, examined: int) -> Found:
    """Collect the layers of a directory whose topmost copy is at position `first` of the parent.

    examined: branches looked at so far. Raises FileNotFoundError, NotADirectoryError when it changed meanwhile.
    """
    known = parent.children.get(name)
    held = {layer.branch.index: layer for layer in known.layers} if type(known) is Dir else {}
    layers: list[Layer] = []
    opened: list[int] = []
    last = len(parent.layers) - 1
    top_st = st
    whited = opaque = None
    path: bytes | None = None
    try:
        for pos in range(first, last + 1):
            above = parent.layers[pos]
            branch = above.branch
            fd = above.fd if above.fd >= 0 else sb.layer_fd(parent, above)
            if pos > first:
                here = find_at(fd, name)
                if here is None:
                    if branch.whable and pos < last and whiteout.present(fd, name):
                        whited = branch.index
                        break
                    continue
                st = here
            if st.st_mode & _S_IFMT == _S_IFDIR:
                layer = held.get(branch.index)
                if layer is None or layer.fd < 0 or layer.ino != st.st_ino or layer.dev != st.st_dev:
                    child = syscalls.open_dir_at(fd, name)
                    opened.append(child)
                    st = fstat(child)
                    layer = Layer(branch, st.st_dev, st.st_ino, st.st_nlink, child)
                else:
                    layer.nlink = st.st_nlink
                    layer.below = None
                if not layers:
                    top_st = st
                layers.append(layer)
                if branch.whable and whiteout.opaque(layer.fd, branch.overlay):
                    opaque = branch.index
                    break
                if branch.id in sb.redirecting:
                    path = redirects.path_of(sb, parent, layer)
                    if path is not None:
                        # Where this directory is below is for the redirect to say, not for its name: a whiteout beside
                        # it hides what is there of its name.
                        whited = branch.index
                        layers += redirects.follow(sb, layer, path, held, opened)
                        break
            elif branch.overlay and pos < last and whiteout.is_device(st):
                whited = branch.index
                break
            # A lower object of another type is skipped, it does not end the search (semantics 4.2).
            if branch.whable and pos < last and whiteout.present(fd, name):
                whited = branch.index
                break
    except BaseException:
        for child in opened:
            os.close(child)
        raise
    found = Found(_S_IFDIR, layers[0].branch, top_st, layers, examined + pos - first)
    found.whited = whited
    found.opaque = opaque
    if path is not None:
        found.moved = True
        _found_moved(sb, parent, known, found)
    elif parent.offline:
        found.offline = _not_seen(parent.offline, known, found)
    return found


def _found_moved(sb: Superblock, parent: Dir, known: Node | None, found: Found) -> None:
    """`Found.offline` of a directory that is below where a redirect says: any branch there may have it."""
    assert found.whited is not None
    beside = [layer for layer in parent.offline or () if layer.branch.index < found.whited]
    below = [layer for layer in sb.root.offline or () if layer.branch.index > found.whited]
    if beside or below:
        found.offline = _not_seen(beside + below, known, found, below=True)


def _not_seen(offline: list[Layer], known: Node | None, found: Found, below: bool = False) -> list[Layer] | None:
    """What a directory may have on these branches, where nobody can look. One that was seen before has there what it
    had then. below: also below what has ended the search by its name."""
    assert found.layers is not None
    limits = [limit for limit in (found.opaque, found.whited) if limit is not None and not below]
    end = min(limits, default=offline[-1].branch.index)
    if type(known) is Dir and not known.dead and same_directory(known, found.layers):
        return known.offline and [layer for layer in known.offline if layer.branch.index <= end]
    return [Layer(layer.branch, layer.dev, 0, 0, -1) for layer in offline if layer.branch.index <= end] or None


def discard(sb: Superblock, parent: Dir, name: bytes, found: Found) -> None:
    """Close what `resolve` opened for a directory that is not going to be interned."""
    if found.layers is None:
        return
    known = parent.children.get(name)
    held = set(known.layers) if type(known) is Dir else set()
    for layer in found.layers:
        if layer not in held:
            os.close(layer.fd)


def found_again(sb: Superblock, parent: Dir, node: Dir) -> Found | None:
    """What the name of a directory stands for now, if that is this directory. Raises what `resolve` raises."""
    found = resolve(sb, parent, node.name)
    if found.answer is not FOUND:
        return None
    if found.layers is not None and same_directory(node, found.layers):
        return found
    discard(sb, parent, node.name, found)
    return None


def same_directory(node: Dir, layers: list[Layer]) -> bool:
    """A directory stays itself while it keeps at least one of its branch directories."""
    ids = {layer.identity for layer in node.layers}
    return any(layer.identity in ids for layer in layers)
