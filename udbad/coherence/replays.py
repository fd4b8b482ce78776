"""Direct changes that watchers of the union are to see (`replay`): which, in what order, and what has become of them.

Whoever watches the union with inotify or fanotify hears of what is done through the mount, and of nothing else: telling
the kernel to forget a name sends no event. So what has changed is done once more, on the union, by a helper
(mount/replayhelper.py), whose requests are answered out of what is known (edge/replay.py). Here is only what there is
to do.

Each name of which something is to be shown has one entry: what watchers know that it stands for. `Events` says when
that may not be so any more, after the kernel was told; what has to be shown is the difference between that and what the
name stands for when its turn comes (`Replays.step`). So what comes fast becomes one, nothing depends on how far events
and requests have come in the meantime, and whoever goes by the events knows which names there are.

What a name stood for before an event is what is recorded of it, unless a request has come across the change before its
event was read: then the events themselves say whether there was something (`Replays.heard`).

Nobody relies on a replay. One that is late or lost leaves caches as they would be without it.

Event loop only.
"""

from __future__ import annotations

import os
import re
import stat as st_mod
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from typing import Final, TypeVar

from udbad.coherence.inotify import CLOSED, CONTENT, MODIFIED, TOUCHED
from udbad.inodes.handles import written_behind
from udbad.inodes.inomap import Identity
from udbad.inodes.node import Dir, Layer, Node
from udbad.inodes.paths import path_in
from udbad.types import MADE, MOVED_FROM, MOVED_TO, OF_DIRECTORY, REMOVED, ROOT_ID
from udbad.union.resolve import Found

MOST: Final = 4096
"""Names that wait; what comes beyond is dropped, and counted."""

_CAME, _WENT = MADE | MOVED_TO, REMOVED | MOVED_FROM
_NOTHING, _SOMETHING = 0x1000, 0x2000
"""Added to the kinds of the events of a name on a branch: what there was before the first of them."""
_UNKNOWN, _MERGED = -1, -2


class Kind(Enum):
    """What is replayed; the label of a metric."""

    DELETE = "delete"
    CREATE = "create"
    RENAME = "rename"
    ATTRIBUTES = "attributes"
    CONTENT = "content"


class Known:
    """What watchers know a name to stand for.

    node, identity: None where nobody has asked for it. index: of the branch on which it is; _MERGED for a directory
    that is on several, and the same on any of them. gone: it was removed; one that has its number is another.
    perhaps: nobody can tell whether there was something, as what was moved there replaces what was.
    assumed: the branches on which it is taken to have been, because it is there now and no event of them was read that
    says how it came. otherwise: what it was if that turns out to be wrong.
    """

    __slots__ = ("assumed", "directory", "gone", "identity", "index", "node", "otherwise", "perhaps")

    def __init__(
        self,
        directory: bool,
        node: Node | None = None,
        identity: Identity | None = None,
        index: int = _UNKNOWN,
        perhaps: bool = False,
        assumed: frozenset[int] = frozenset(),
        otherwise: Known | None = None,
    ) -> None:
        self.directory = directory
        self.node = node
        self.identity = identity
        self.index = index
        self.gone = False
        self.perhaps = perhaps
        self.assumed = assumed
        self.otherwise = otherwise

    @classmethod
    def of(cls, node: Node) -> Known:
        merged = type(node) is Dir and len(node.layers) > 1
        return cls(type(node) is Dir, node, node.identity, _MERGED if merged else node.branch.index)

    def is_same(self, node: Node) -> bool:
        """Whether it is certain that this is it."""
        if self.gone or self.directory != (type(node) is Dir):
            return False
        return self.node is node or self.identity == node.identity or self.index == _MERGED

    def may_be(self, node: Node) -> bool:
        """The same for who has reason to believe it."""
        by_kind = self.identity is None and not self.perhaps and self.directory == (type(node) is Dir)
        return by_kind or self.is_same(node)

    def after(self, heard: Mapping[int, int]) -> Known | None:
        """The same, after these events of the name (`Replays.heard`), the first ones since then."""
        if not self.assumed:
            return self
        otherwise = None if self.otherwise is None else self.otherwise.after(heard)
        left = frozenset(index for index in self.assumed if not heard.get(index, 0) & _NOTHING)
        if not left:
            return otherwise
        said = [heard[index] for index in left if heard.get(index)]
        if any(kinds & _SOMETHING for kinds in said):
            return self.assuming(frozenset(), None)
        if said:
            return Known(self.directory, perhaps=True)
        return self.assuming(left, otherwise)

    def assuming(self, assumed: frozenset[int], otherwise: Known | None) -> Known:
        """The same, of which something else is assumed."""
        other = Known(self.directory, self.node, self.identity, self.index, self.perhaps, assumed, otherwise)
        other.gone = self.gone
        return other


class Replay:
    """A name of the union of which something is to be shown; b"": the directory itself.

    named: it may stand for something else than `before`, which watchers know. attributes, modified, closed: what else
    has happened to what it stands for. tries: how often the next step could not be done yet.
    """

    __slots__ = ("attributes", "before", "closed", "modified", "name", "named", "parent", "tries")

    def __init__(self, parent: Dir, name: bytes) -> None:
        self.parent = parent
        self.name = name
        self.named = False
        self.before: Known | None = None
        self.attributes = False
        self.modified = False
        self.closed = False
        self.tries = 0

    @property
    def key(self) -> _Key:
        return self.parent, self.name


class Step:
    """One change that is to be shown now.

    now: what the name stands for; None for DELETE. origin: of RENAME, the old name. modified, closed: of CONTENT.
    """

    __slots__ = ("closed", "kind", "modified", "now", "origin", "replay")

    def __init__(
        self,
        kind: Kind,
        replay: Replay,
        now: Node | None = None,
        origin: Replay | None = None,
        modified: bool = False,
        closed: bool = False,
    ) -> None:
        self.kind = kind
        self.replay = replay
        self.now = now
        self.origin = origin
        self.modified = modified
        self.closed = closed


_Key = tuple[Dir, bytes]
_Noted = TypeVar("_Noted")


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


def _replacing(kinds: int) -> bool:
    """Whether these events of a name begin with one that does not say what there was: something was moved there, or
    several came as one."""
    return kinds != 0 and not kinds & (_NOTHING | _SOMETHING)


def _places(what: Node | Found) -> list[int]:
    """The branches on which something is."""
    layers = what.layers if isinstance(what, Dir | Found) else None
    return [what.branch.index] if layers is None else [layer.branch.index for layer in layers]


def _note(who: dict[_Noted, None], one: _Noted) -> None:
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
        self._heard: dict[_Key, dict[int, int]] = {}
        """How names came and went in this burst: kinds by branch."""
        self._left: tuple[_Key, int] | None = None
        """The name that was the last to be moved away, and the branch, until the next event of a name: the two of a
        rename follow one another."""
        self._came_from: dict[_Key, tuple[_Key, int]] = {}
        self._went_to: dict[_Key, _Key] = {}
        """Where what names stood for was moved, by the first one and the last one; and the reverse, with the branch on
        which the last one is."""
        self._own_names: dict[_Key, None] = {}
        """Changed through the mount, since all events were read the last time."""
        self._foreign: dict[Identity, None] = {}
        """Files that others have made or changed, and perhaps not closed: what comes of them is theirs, too, though it
        leaves no trace any more. Oldest first."""
        self._own: dict[Identity, None] = {}
        """What was changed through the mount, and may be changed by the kernel itself. Oldest first."""
        self.on_doubt: Callable[[], object] = lambda: None
        """Called when trust in a directory is lost, of which nothing is heard until somebody uses it."""
        self.st_mode: Callable[[Dir, Layer, bytes], int] = lambda parent, layer, name: 0
        """The mode of what a name of a directory is on a branch now, 0 for none."""
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._pending)

    # -- what there is to show --------------------------------------------------------------------

    def first(self) -> Replay | None:
        """Whose turn it is. It waits until there is no step for it any more (`settled`)."""
        if not self._pending:
            return None
        one = next(iter(self._pending.values()))
        passed = []
        while one.before is not None:
            # Where it is now has to be shown first, as it is not gone.
            target = self._entry_at(self._went_to.get(one.key))
            if target is None or target is one or target in passed:
                break
            passed.append(one)
            one = target
        return one

    def step(self, one: Replay, look: Callable[[Dir, bytes], Node | None]) -> Step | None:
        """What has to be shown next; None when watchers know everything. look: what a name stands for now.

        Raises what `look` raises.
        """
        now = look(one.parent, one.name) if one.name else one.parent
        if one.named:
            before = one.before
            if now is None:
                return None if before is None else Step(Kind.DELETE, one)
            if before is None or not before.is_same(now):
                origin = self._origin(one, now, look)
                if origin is one:
                    one.before = Known.of(now)  # moved away and back
                elif before is None or before.perhaps:
                    return Step(Kind.CREATE if origin is None else Kind.RENAME, one, now, origin)
                elif origin is not None and before.directory == (type(now) is Dir):
                    return Step(Kind.RENAME, one, now, origin)
                else:
                    return Step(Kind.DELETE, one)
        if now is None:
            return None
        if one.attributes:
            return Step(Kind.ATTRIBUTES, one, now)
        if one.modified or one.closed:
            return Step(Kind.CONTENT, one, now, modified=one.modified, closed=one.closed)
        return None

    def _origin(self, one: Replay, now: Node, look: Callable[[Dir, bytes], Node | None]) -> Replay | None:
        """From which name what a name stands for was moved; None where watchers do not know it by that."""
        origin = self._entry_at(self._source(one.key))
        if origin is None or origin.before is None or not origin.before.may_be(now):
            return None
        return origin if origin is one or look(*origin.key) is not now else None

    def _source(self, target: _Key) -> _Key | None:
        return self._came_from[target][0] if target in self._came_from else None

    def _entry_at(self, key: _Key | None) -> Replay | None:
        return None if key is None else self._pending.get(key)

    def begun(self, step: Step) -> None:
        """What happens from now on has to be shown as well."""
        if step.kind is Kind.ATTRIBUTES:
            step.replay.attributes = False
        elif step.kind is Kind.CONTENT:
            step.replay.modified = step.replay.closed = False

    def shown(self, step: Step) -> None:
        """Watchers know it now."""
        one = step.replay
        one.tries = 0
        if step.kind is Kind.DELETE:
            one.before = None
        elif step.now is not None and step.kind in (Kind.CREATE, Kind.RENAME):
            one.before = Known.of(step.now)
            if step.origin is not None:
                step.origin.before = None
            self._part(one.key)

    def again(self, step: Step) -> None:
        """It could not be done, and has to be tried once more."""
        one = step.replay
        one.attributes = one.attributes or step.kind is Kind.ATTRIBUTES
        one.modified, one.closed = one.modified or step.modified, one.closed or step.closed

    def given_up(self, step: Step) -> bool:
        """It cannot be done. False when there is another way: a rename can be shown as two changes."""
        one = step.replay
        one.tries = 0
        if step.kind is Kind.RENAME:
            self._part(one.key)
            return False
        if step.kind in (Kind.CREATE, Kind.DELETE):
            self.settled(one)
        return True

    def settled(self, one: Replay) -> None:
        """Nothing of a name is to be shown any more."""
        if self._pending.get(one.key) is one:
            del self._pending[one.key]
        self._part(one.key)
        target = self._went_to.get(one.key)
        if target is not None:
            self._part(target)

    # -- events -----------------------------------------------------------------------------------

    def heard(self, parent: Dir, name: bytes, index: int, kinds: int) -> None:
        """An event of a name on the branch with this index, before `Events` looks what has become of it."""
        if not kinds & (_CAME | _WENT):
            return
        key = parent, name
        branches = self._heard.setdefault(key, {})
        if index not in branches and not (kinds & _CAME and kinds & _WENT):  # both: fanotify has made one of several
            kinds |= _SOMETHING if kinds & _WENT else _NOTHING if kinds & MADE else 0
        branches[index] = branches.get(index, 0) | kinds
        if kinds & REMOVED:
            self._part(key)
        left, self._left = self._left, (key, index) if kinds & MOVED_FROM else None
        if kinds & MOVED_TO and left is not None:
            self._moved(*left, key, index)

    def end_of_burst(self) -> None:
        """All names that were heard of have been looked at."""
        for key in self._heard:
            if key not in self._pending:
                self._part(key)
        self._heard.clear()

    def caught_up(self) -> None:
        """All events up to now have been read."""
        self._own_names.clear()

    def _moved(self, source: _Key, index: int, target: _Key, to: int) -> None:
        """index, to: the branches on which these names are."""
        self._part(target)
        first, on = self._came_from.get(source, (source, _UNKNOWN))
        if on == index:
            self._part(source)
            source = first
        elif source in self._went_to:
            return  # with this name, there was something else before, which watchers know
        self._came_from[target] = source, to
        self._went_to[source] = target

    def _part(self, target: _Key) -> None:
        """What a name stands for was not moved there, or watchers know that."""
        if target in self._came_from:
            source, _ = self._came_from.pop(target)
            del self._went_to[source]

    # -- what Events finds ------------------------------------------------------------------------

    def replaced(self, parent: Dir, name: bytes, was: Node, found: Found | None, kinds: int) -> None:
        """A name stands for something else than this node, or for nothing. kinds: bits of coherence/inotify.py."""
        places, heard = _places(was), self._heard.get((parent, name), {})
        before: Known | None = Known.of(was)
        if not any(heard.get(index, _NOTHING) & _NOTHING == 0 for index in places):
            before = self._unless_made(parent, name, Known.of(was), places)
        self._named(parent, name, before, True)
        if found is not None:
            self._made(parent, name, found, kinds)

    def absent(self, parent: Dir, name: bytes, in_view: bool | None, whited: bool, kinds: int) -> None:
        """A name stands for nothing, of which no node is known. in_view: whether a branch was recorded to have it;
        None: nobody knows. whited: a whiteout hides it."""
        heard = self._heard.get((parent, name), {})
        seen = not whited and (parent, name) not in self._own_names
        if in_view:
            was_there = not heard or any(not said & _NOTHING for said in heard.values())
        elif heard:
            was_there = seen and any(said & _SOMETHING for said in heard.values())
        else:
            was_there = in_view is None and kinds & _WENT != 0  # a hint
        perhaps = not was_there and seen and any(map(_replacing, heard.values()))
        before = Known(kinds & OF_DIRECTORY != 0, perhaps=perhaps) if was_there or perhaps else None
        self._named(parent, name, before, True)

    def appeared(self, parent: Dir, name: bytes, in_view: bool | None, found: Found, kinds: int) -> None:
        """A name stands for something of which no node is known. in_view: as in `absent`."""
        before = self._before(parent, name, in_view, found, kinds)
        self._named(parent, name, before)
        if before is None or not before.identity:
            self._made(parent, name, found, kinds)

    def _before(self, parent: Dir, name: bytes, in_view: bool | None, found: Found, kinds: int) -> Known | None:
        """What watchers know in `appeared`; with an identity where that is what was found."""
        layers, heard = found.layers, self._heard.get((parent, name), {})
        places = _places(found)
        top, several = places[0], len(places) > 1
        the_same = Known(layers is not None, None, (found.st.st_dev, found.st.st_ino), _MERGED if several else top)
        if not heard:
            return the_same if in_view else None
        unheard = frozenset(index for index in places if index not in heard)
        if any(index <= top and kinds & _SOMETHING for index, kinds in heard.items()):
            gone = Known(kinds & OF_DIRECTORY != 0)
            less = gone.directory and layers is not None and unheard
            return the_same.assuming(unheard, gone) if less else gone
        if in_view is False and not _replacing(heard.get(top, 0)):
            return None
        if (parent, name) in self._own_names:
            return the_same
        return self._unless_made(parent, name, the_same, places)

    def _unless_made(self, parent: Dir, name: bytes, known: Known, places: Collection[int]) -> Known | None:
        """This, on these branches, unless it has come to be there in the meantime."""
        heard = self._heard.get((parent, name), {})
        unheard = frozenset(index for index in places if index not in heard)
        before = self._elsewhere(parent, name, places, known.directory)
        return known.assuming(unheard, before) if unheard else before

    def _elsewhere(self, parent: Dir, name: bytes, places: Collection[int], directory: bool) -> Known | None:
        """What a name stood for before what it stands for, perhaps a directory, came to be on these branches."""
        heard = self._heard.get((parent, name), {})
        perhaps = False
        for layer in parent.layers:
            index = layer.branch.index
            kinds = heard.get(index, 0)
            perhaps = perhaps or _replacing(kinds)
            if index in places:
                continue
            if kinds & _SOMETHING:
                return Known(kinds & OF_DIRECTORY != 0)
            if not kinds and (mode := self.st_mode(parent, layer, name)):
                lower = self._elsewhere(parent, name, [*places, index], directory)
                return Known(st_mod.S_ISDIR(mode), assumed=frozenset((index,)), otherwise=lower)
        return Known(directory, perhaps=True) if perhaps else None

    def same(self, parent: Dir, name: bytes, node: Node, found: Found) -> None:
        """A name stands for what it stood for, as far as is recorded."""
        heard = self._heard.get((parent, name))
        if not heard:
            return
        places = _places(found)
        before: Known | None = Known.of(node)
        if (parent, name) not in self._own_names:
            if not any(heard.get(index, 0) & _SOMETHING for index in places):
                before = self._unless_made(parent, name, Known.of(node), places)  # a request has come across it before
            elif len(places) == 1:
                before = Known(type(node) is Dir)  # it has the number of what was removed, or was moved back
        self._named(parent, name, before)

    def _made(self, parent: Dir, name: bytes, found: Found, kinds: int) -> None:
        """Others have made what a name stands for."""
        if found.layers is None:
            _note(self._foreign, (found.st.st_dev, found.st.st_ino))
            self.changed(parent, name, None, kinds, True)

    def changed(self, parent: Dir, name: bytes, node: Node | None, kinds: int, differs: bool) -> None:
        """Attributes or content of what a name stands for are others, or may be. node: None where nobody has asked for
        the name, so that nobody has changed it through the mount. differs: from what the kernel was told."""
        if node is not None and not self._is_foreign(node, kinds, differs):
            return
        if kinds & (TOUCHED | CONTENT):
            one = self._entry(parent, name)
            if one is not None:
                one.attributes = one.attributes or kinds & TOUCHED != 0
                one.modified = one.modified or kinds & MODIFIED != 0
                one.closed = one.closed or kinds & CLOSED != 0

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
        """A name was made, removed or moved through the mount, which watchers were told by that."""
        _note(self._own_names, (parent, name))
        one = self._pending.get((parent, name))
        if one is not None:
            self.settled(one)

    def own_data(self, node: Node) -> None:
        """A node was changed through the mount, or will be by the kernel: what comes of it may be that."""
        self._foreign.pop(node.identity, None)
        _note(self._own, node.identity)

    def may_be_own(self, node: Node) -> bool:
        """Whether an event of a node may be of a change through the mount; to be asked where nothing else tells."""
        return node.identity in self._own

    # -- what waits -------------------------------------------------------------------------------

    def _named(self, parent: Dir, name: bytes, before: Known | None, gone: bool = False) -> None:
        """A name may stand for something else than `before`; what is known already is older, and counts. gone: what
        has happened to what it stood for does not matter any more."""
        one = self._entry(parent, name)
        if one is None:
            return
        if not one.named:
            one.named, one.before = True, before
        if gone:
            one.attributes = one.modified = one.closed = False
        heard = self._heard.get(one.key, {})
        known = one.before = None if one.before is None else one.before.after(heard)
        if known is not None and one.key not in self._went_to and heard.get(known.index, 0) & REMOVED:
            known.gone = True

    def _entry(self, parent: Dir, name: bytes) -> Replay | None:
        """None where nobody is to see it."""
        key = parent, name
        one = self._pending.get(key)
        if one is None:
            if not self.is_watched(parent, name) and self._source(key) not in self._pending:
                return None
            if len(self._pending) >= MOST:
                self.dropped += 1
                return None
            one = self._pending[key] = Replay(parent, name)
        self._wake()
        return one

    def is_watched(self, parent: Dir, name: bytes) -> bool:
        """Whether somebody may be told of a name. A directory that is watched is held by the kernel."""
        if parent.nlookup <= 0 and parent.id != ROOT_ID:
            return False
        path = path_in(parent)
        return path is not None and self._is_chosen(path + b"/" + name if path else name)
