"""Direct changes that watchers of the union are to see (`replay`): which, in what order, and what has become of them.

Whoever watches the union with inotify or fanotify hears of what is done through the mount, and of nothing else: telling
the kernel to forget a name sends no event. So what has changed is done once more, on the union, by a helper
(mount/replayhelper.py), whose requests are answered out of what is known (edge/replay.py). Here is only what there is
to do: `Events` says what it has found, after the kernel was told; each name has at most one entry of a kind, so that
what comes fast becomes one.

Nobody relies on a replay. One that is late, lost or overtaken leaves caches as they would be without it.

Event loop only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from udbad.coherence.inotify import CLOSED, CONTENT, MODIFIED, TOUCHED
from udbad.inodes.handles import written_behind
from udbad.inodes.inomap import Identity
from udbad.inodes.table import Dir, Node
from udbad.types import MADE, MOVED_FROM, MOVED_TO, OF_DIRECTORY, ROOT_ID

MOST: Final = 4096
"""Changes that wait; what comes beyond is dropped, and counted."""


class Kind(Enum):
    """What is replayed; the label of a metric."""

    DELETE = "delete"
    CREATE = "create"
    RENAME = "rename"
    ATTRIBUTES = "attributes"
    CONTENT = "content"


@dataclass(eq=False, slots=True)
class Replay:
    """One change of the union that was made directly.

    was: what had the name before, where that is known; of RENAME, what the new name stood for. directory: whether it
    is one. origin: of RENAME, the old name. moved: of DELETE, away, wherever to. identity: of what was
    removed or made. shown: whether watchers know of the name. modified, closed: of CONTENT, what has
    happened. tries: how often it could not be done yet.
    """

    kind: Kind
    parent: Dir
    name: bytes
    was: Node | None = None
    directory: bool = False
    origin: tuple[Dir, bytes] | None = None
    moved: bool = False
    identity: Identity | None = None
    shown: bool = True
    modified: bool = False
    closed: bool = False
    tries: int = 0


_Key = tuple[Dir, bytes, Kind]
"""RENAME is kept as CREATE: a name is made once."""


def path_in(node: Node) -> bytes | None:
    """Path of a node from the root of the union, without a slash before it; None when it has none."""
    parts = []
    while node.parent is not None:
        parts.append(node.name)
        node = node.parent
    return b"/".join(reversed(parts)) if node.id == ROOT_ID else None


def chosen(words: str) -> Callable[[bytes], bool]:
    """Which paths (as of `path_in`) an option `replay` means: `on`, or patterns with `:` in between.

    `*` and `?` stand for no slash, `**` does; a pattern that ends with `/**` means the directory as well.
    """
    if words == "on":
        return lambda path: True
    pattern = re.compile(b"|".join(_expression(os.fsencode(word.lstrip("/"))) for word in words.split(":")), re.DOTALL)
    return lambda path: pattern.fullmatch(path) is not None


def _expression(glob: bytes) -> bytes:
    special = {b"/**": b"(?:/.*)?", b"**": b".*", b"*": b"[^/]*", b"?": b"[^/]"}
    parts = re.split(rb"(/\*\*|\*\*|\*|\?)", glob)
    return b"".join(special.get(part, re.escape(part)) for part in parts)


def _note(who: dict[Identity, None], one: Identity) -> None:
    who[one] = None
    if len(who) > MOST:
        del who[next(iter(who))]


class Replays:
    """What waits to be replayed, of one mount."""

    def __init__(self, words: str, wake: Callable[[], object]) -> None:
        """words: the option `replay`. wake: called when there is something to do."""
        self._is_chosen = chosen(words)
        self._wake = wake
        self._pending: dict[_Key, Replay] = {}
        self._gone: dict[Identity, Replay] = {}
        """What was moved away, by who it is, as long as it waits."""
        self._last_gone: Replay | None = None
        """The same of the last thing of which nobody knows who it is; within a burst, as the two events of a rename
        follow one another."""
        self._foreign: dict[Identity, None] = {}
        """Files that others have made or changed, and perhaps not closed: what comes of them is theirs, too, though it
        leaves no trace any more. Oldest first."""
        self._own: dict[Identity, None] = {}
        """What was changed through the mount, and may be changed by the kernel itself. Oldest first."""
        self.on_doubt: Callable[[], object] = lambda: None
        """Called when trust in a directory is lost, of which nothing is heard until somebody uses it."""
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._pending)

    def take(self) -> Replay | None:
        """The next one, which does not wait any more."""
        if not self._pending:
            return None
        one = self._pending.pop(next(iter(self._pending)))
        self._settled(one)
        return one

    def put_back(self, one: Replay) -> None:
        """One that could not be done yet, unless something newer has its place."""
        self._pending.setdefault(self._key(one), one)
        self._wake()

    def will_make(self, parent: Dir, name: bytes) -> bool:
        """Whether it waits that this name was made."""
        return (parent, name, Kind.CREATE) in self._pending

    def split(self, one: Replay) -> None:
        """A RENAME that cannot be shown as one: another object has one of its names by now."""
        if one.origin is not None:
            parent, name = one.origin
            self.put_back(Replay(Kind.DELETE, parent, name, directory=one.directory))
            self.put_back(Replay(Kind.CREATE, one.parent, one.name, identity=one.identity, shown=one.shown))

    # -- what Events finds ----------------------------------------------------------------------

    def end_of_burst(self) -> None:
        self._last_gone = None

    def lost(self, parent: Dir, name: bytes, was: Node | None, kinds: int) -> None:
        """A name stands for nothing any more, or for something else, and then `made` follows.

        was: what it stood for, None where nobody had asked for it. kinds: bits of coherence/inotify.py.
        """
        self._forget_changes(parent, name)
        directory = kinds & OF_DIRECTORY != 0 if was is None else type(was) is Dir
        moved = kinds & MOVED_FROM != 0
        shown = not (was is None and kinds & MADE)
        identity = None if was is None else was.identity
        made = self._pending.pop((parent, name, Kind.CREATE), None)
        if made is not None:
            shown, identity = made.shown, made.identity
            if made.origin is not None:
                # Moved twice: of the first name, watchers know, and perhaps of one that the second has taken.
                if shown:
                    self._put(Replay(Kind.DELETE, parent, name, made.was, type(made.was) is Dir))
                (parent, name), shown = made.origin, True
        before = self._pending.get((parent, name, Kind.DELETE))
        if before is not None and before.shown:
            shown = True
        if not shown and not moved:
            return  # came and went
        one = Replay(Kind.DELETE, parent, name, was, directory, moved=moved, shown=shown, identity=identity)
        if self._put(one) and moved:
            if one.identity is None:
                self._last_gone = one
            else:
                self._gone[one.identity] = one

    def made(self, parent: Dir, name: bytes, identity: Identity, directory: bool, kinds: int) -> None:
        """A name stands for an object that it did not stand for. identity: of that on its branch."""
        if not directory:
            _note(self._foreign, identity)
        over = self._pending.get((parent, name, Kind.DELETE))
        one = Replay(Kind.CREATE, parent, name, directory=directory, identity=identity, shown=over is not None)
        if kinds & MOVED_TO:
            away = self._gone.get(identity) or self._last_gone
            if away is not None:
                one.kind, one.origin = Kind.RENAME, (away.parent, away.name)
                self._pending.pop(self._key(away), None)
                self._settled(away)
                if over is not None and over is not away and not over.moved and over.directory == directory:
                    one.was = over.was
                    del self._pending[self._key(over)]
        self._put(one)

    def changed(self, parent: Dir, name: bytes, node: Node | None, kinds: int, differs: bool) -> None:
        """Attributes or content of what a name stands for are others, or may be. node: None where nobody has asked for
        the name, so that nobody has changed it through the mount. differs: from what the kernel was told."""
        if node is not None and not self._is_foreign(node, kinds, differs):
            return
        if kinds & TOUCHED:
            self._put(Replay(Kind.ATTRIBUTES, parent, name, node))
        if kinds & CONTENT:
            key = (parent, name, Kind.CONTENT)
            one = self._pending.get(key) or Replay(Kind.CONTENT, parent, name, node)
            one.modified = one.modified or kinds & MODIFIED != 0
            one.closed = one.closed or kinds & CLOSED != 0
            self._put(one)

    def changed_elsewhere(self, node: Node) -> None:
        """Others have changed a file, by whatever name; the event of that name follows, if it is one of the union."""
        _note(self._foreign, node.identity)

    def _is_foreign(self, node: Node, kinds: int, differs: bool) -> bool:
        """Whether others have changed a node, by an event with these kinds."""
        who = node.identity
        if written_behind(node):
            self._foreign.pop(who, None)  # by the kernel, too, for who uses the mount: nobody can tell
            return False
        if differs:
            _note(self._foreign, who)
        elif who not in self._foreign:
            return False
        if kinds & CLOSED:
            del self._foreign[who]
        return True

    def own_name(self, parent: Dir, name: bytes) -> None:
        """A name was made, removed or moved through the mount: what waits of its content is not of what it is now."""
        self._forget_changes(parent, name)

    def own_data(self, node: Node) -> None:
        """A node was changed through the mount, or will be by the kernel: what comes of it may be that."""
        self._foreign.pop(node.identity, None)
        _note(self._own, node.identity)

    def may_be_own(self, node: Node) -> bool:
        """Whether an event of a node may be of a change through the mount; to be asked where nothing else tells."""
        return node.identity in self._own

    # -- what waits -------------------------------------------------------------------------------

    @staticmethod
    def _key(one: Replay) -> _Key:
        return one.parent, one.name, Kind.CREATE if one.kind is Kind.RENAME else one.kind

    def _put(self, one: Replay) -> bool:
        """False where nobody is to see it."""
        if not self._is_wanted(one):
            return False
        if len(self._pending) >= MOST:
            self.dropped += 1
            return False
        key = self._key(one)
        before = self._pending.get(key)
        if before is not None and before is not one:
            self._settled(before)
        self._pending[key] = one
        self._wake()
        return True

    def _is_wanted(self, one: Replay) -> bool:
        if one.origin is not None and self.is_watched(*one.origin):
            return True
        return self.is_watched(one.parent, one.name)

    def is_watched(self, parent: Dir, name: bytes) -> bool:
        """Whether somebody may be told of a name. A directory that is watched is held by the kernel."""
        if parent.nlookup <= 0 and parent.id != ROOT_ID:
            return False
        path = path_in(parent)
        return path is not None and self._is_chosen(path + b"/" + name if path else name)

    def _forget_changes(self, parent: Dir, name: bytes) -> None:
        self._pending.pop((parent, name, Kind.ATTRIBUTES), None)
        self._pending.pop((parent, name, Kind.CONTENT), None)

    def _settled(self, one: Replay) -> None:
        """It cannot become part of a rename any more."""
        if one.identity is not None and self._gone.get(one.identity) is one:
            del self._gone[one.identity]
        if self._last_gone is one:
            self._last_gone = None
