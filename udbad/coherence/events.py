"""What an event on a branch means: classified first, then one short function a case.

Events are hints, state decides. Whatever they say of a name, `classify` compares what is recorded of it with what the
branches say now and changes nothing; of the kinds of an event (coherence/inotify.py) it believes only that a
file whose content or attributes changed may be looked at first. Whiteouts are events of the name they hide, opaque
marks of their directory (`subject`). A case brings what is recorded up to date, then tells the kernel what differs.

Calls go one way. For an event, the union is asked only through functions that call nobody back (`resolve.resolve`,
`lookup.set_layers`, ...); for a request, it is the union that calls `Events.adopt`. So `adopt` is never entered
from the comparison of a name (tests/test_layering.py, tests/t2_core/test_trust.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from enum import Enum, auto

from udbad.branch import syscalls, whiteout
from udbad.coherence.base import Coherence
from udbad.coherence.inotify import CONTENT, GONE, KIND_BITS, KINDS, NAMES, OF_NAMES
from udbad.coherence.replays import Replays
from udbad.coherence.sent import SentAttributes
from udbad.coherence.watcher import Change, Echo
from udbad.coherence.watches import Place, Watches, Way
from udbad.inodes.node import Dir, Index, Layer, Node
from udbad.inodes.table import InodeTable
from udbad.union import homes, lookup, resolve
from udbad.union.resolve import FOUND, WHITED, Found
from udbad.union.superblock import Superblock, is_object

log = logging.getLogger(__name__)

_DOT = ord(".")


class Case(Enum):
    """What has become of a name, by what is recorded of it and what the branches say now."""

    __hash__ = object.__hash__  # Enum's own is a Python function, and slow

    NOTHING_HELD = auto()
    """Its directory was removed through the mount, or is not trusted: the kernel holds nothing of it."""
    ITSELF = auto()
    """No name, but the directory's own attributes: the root's, which is in no other directory."""
    SAME_FILE = auto()
    """The file it was, with its content or attributes perhaps others; found without asking every branch."""
    SAME_OBJECT = auto()
    """The same, and every branch was asked."""
    SAME_DIRECTORY = auto()
    """The directory it was, with its layers or attributes perhaps others."""
    REPLACED = auto()
    """Another object than before."""
    GONE = auto()
    """A known object, which no branch shows any more under this name."""
    APPEARED = auto()
    """An object nobody has asked for yet: the kernel may hold that there is none."""
    NOT_ASKED_FOR = auto()
    """A name of which nothing is held, and the event does not say that it was made: of our copies without a name, too.
    No branch is asked."""
    ABSENT = auto()
    """Nothing, as was recorded: it came and went."""
    HIDDEN = auto()
    """The same, by a whiteout."""


Finding = tuple[Case, Node | None, Found | None, os.stat_result | None]
"""The case; the node the name stood for; what `resolve` found, whose descriptors are the caller's for SAME_DIRECTORY
and closed otherwise; the status of the object for SAME_FILE and SAME_OBJECT."""


def classify(sb: Superblock, node: Dir, name: bytes, kinds: Index) -> Finding:
    """Which case a name of a directory is (b"": the directory itself), after events with these kind bits.

    Raises OSError when the branches cannot say.
    """
    if node.dead:
        return Case.NOTHING_HELD, None, None, None
    if not name:
        return Case.ITSELF, None, None, None
    if not node.trusted:
        return Case.NOTHING_HELD, None, None, None
    child: Node | None = node.children.get(name)
    if not kinds & NAMES:
        if child is None:
            return Case.NOT_ASKED_FOR, None, None, None
        st = _same_file(node, name, child)
        if st is not None:
            return Case.SAME_FILE, child, None, st
    found = resolve.resolve(sb, node, name)
    if found.answer is not FOUND:
        if child is not None:
            return Case.GONE, child, None, None
        return Case.ABSENT if found.answer is not WHITED else Case.HIDDEN, None, None, None
    if found.layers is None:
        if child is None:
            return Case.APPEARED, None, found, None
        st = _same_object(sb, node, name, child, found)
        return Case.REPLACED if st is None else Case.SAME_OBJECT, child, found, st
    if type(child) is Dir and not child.dead and resolve.same_directory(child, found.layers):
        return Case.SAME_DIRECTORY, child, found, None
    resolve.discard(sb, node, name, found)
    if child is not None:
        return Case.REPLACED, child, found, None
    return Case.APPEARED, None, found, None


def _same_file(node: Dir, name: bytes, child: Node) -> os.stat_result | None:
    """The status of a file that has kept its name, from its own branch; None when it may be another one by now."""
    if type(child) is Dir or child.dead or child.plink is not None:
        return None
    layer = node.layer(child.branch.index)
    if layer is None or layer.fd < 0:
        return None
    try:
        st = syscalls.stat_at(layer.fd, name)
    except OSError:
        return None
    return st if is_object(child, st) else None


def _same_object(sb: Superblock, node: Dir, name: bytes, child: Node, found: Found) -> os.stat_result | None:
    """The status of what is no directory, when it is what the name stood for, perhaps by way of a pseudo-link."""
    if child.kind != found.kind or child.dead:
        return None
    st = found.st
    if child.plink is not None and homes.leads(sb, node, name, found.branch, st, child.plink):
        return sb.stat(child)
    return st if child.identity == (st.st_dev, st.st_ino) else None


def subject(place: Place, name: bytes) -> tuple[Dir, bytes] | None:
    """The directory and the name in it that an event in a branch directory is about; None for a name of our own.

    name: as the event has it, b"" for the branch directory itself.
    """
    node = place.node
    about = whiteout.subject(name)
    if about is None:
        return None
    if about or node.parent is None:
        return node, about
    return node.parent, node.name


def on_the_way(way: Way, name: bytes) -> bool:
    """Whether an event in a branch directory may have to do with the name in it that leads to a directory."""
    return whiteout.subject(name) in (way.name, b"")


def _about(name: bytes, kinds: int) -> int:
    """The kinds of an event for the name it is about: how a whiteout came or went says nothing of the name it hides."""
    return kinds & ~OF_NAMES if name.startswith(whiteout.PREFIX) else kinds


class Events:
    """The cases. Event loop only."""

    def __init__(self, coherence: Coherence, watches: Watches, sent: SentAttributes) -> None:
        """coherence: tells the kernel, and gives and takes trust."""
        self.sb = coherence.sb
        self.count = 0
        """Events so far."""
        self.echoes = 0
        """Of these, those that told nothing new."""
        self._coherence = coherence
        self._notifier = coherence.notifier
        self._watches = watches
        self._sent = sent
        self.replays: Replays | None = None
        """Has watchers of the union see what is found here; None: they do not."""
        self._cases: dict[Case, Callable[[Dir, bytes, Finding, int], Dir | None]] = {
            Case.NOTHING_HELD: self._nothing_held,
            Case.ITSELF: self._itself,
            Case.SAME_FILE: self._same_file,
            Case.SAME_OBJECT: self._same_object,
            Case.SAME_DIRECTORY: self._same_directory,
            Case.REPLACED: self._replaced,
            Case.GONE: self._gone,
            Case.APPEARED: self._appeared,
            Case.NOT_ASKED_FOR: self._not_asked_for,
            Case.ABSENT: self._absent,
            Case.HIDDEN: self._absent,
        }

    # -- from events to names -----------------------------------------------------------------

    def on_echoes(self, echoes: list[Echo]) -> None:
        """Events that were expected (`Watcher.expect`), so those of directory watches."""
        counts: dict[int, int] = self._coherence.branch_events
        kinds: Index
        for handle, kinds, times in echoes:
            if type(handle) is Place:
                place: Place = handle
                key = place.index << KIND_BITS | kinds & KINDS
                counts[key] = counts.get(key, 0) + times
                self.count += times
                self.echoes += times

    def handle(self, changes: list[Change]) -> None:
        """One burst: each name once, however often it is mentioned."""
        if self.replays is not None:
            self._hear(self.replays, changes)
        counts: dict[int, int] = self._coherence.branch_events
        names: dict[tuple[Dir, bytes], int] = {}
        heard = 0
        name: bytes
        kinds: Index
        for handle, name, kinds in changes:
            if type(handle) is Place:
                place: Place = handle
                node: Dir = place.node
                count = place.index << KIND_BITS | kinds & KINDS
                counts[count] = counts.get(count, 0) + 1
                heard += 1
                if kinds & GONE:
                    if self._watches.gone(place):
                        self._coherence.distrust(node)
                    continue
                if name and name[0] != _DOT:  # neither a whiteout nor a mark, nor the directory itself
                    if not kinds & NAMES and node.trusted and name not in node.children:
                        # NOT_ASKED_FOR for certain: each copy-up sends some events of its file without a name.
                        self.echoes += 1
                        if self.replays is not None:
                            self.replays.changed(node, name, None, kinds, True)
                        continue
                    key = node, name
                    names[key] = names.get(key, 0) | kinds
                    continue
                about = subject(place, name)
                if about is not None:
                    names[about] = names.get(about, 0) | _about(name, kinds)
            elif type(handle) is Way:
                # Where a redirect leads may be another directory now, or none.
                parent = handle.node.parent
                if parent is not None and (kinds & GONE or on_the_way(handle, name)):
                    key = parent, handle.node.name
                    names[key] = names.get(key, 0) | NAMES
            elif isinstance(handle, Node):
                count = handle.branch.index << KIND_BITS | kinds & KINDS
                counts[count] = counts.get(count, 0) + 1
                heard += 1
                self._file_changed(handle, kinds)
        self.count += heard
        self._look_at(names)
        if self.replays is not None:
            self.replays.end_of_burst()

    @staticmethod
    def _hear(replays: Replays, changes: list[Change]) -> None:
        for handle, name, kinds in changes:
            if type(handle) is Place and kinds & NAMES:
                about = subject(handle, name)
                if about is not None:
                    replays.heard(about[0], about[1], handle.index, _about(name, kinds))

    def _look_at(self, names: dict[tuple[Dir, bytes], int]) -> None:
        """`look` at each of these, by the kinds of all its events."""
        table: InodeTable = self.sb.table
        sent: SentAttributes = self._sent
        as_sent = 0
        node: Dir
        name: bytes
        kinds: Index
        for (node, name), kinds in names.items():
            if table.nodes.get(node.id) is node:
                if kinds & NAMES or self.replays is not None or not sent.is_as_sent(node, name):
                    self.look(node, name, kinds)
                else:
                    as_sent += 1  # SAME_FILE, as most that a request of ours has changed
            if table.over_budget():  # events come without requests, too
                table.trim()
        self.echoes += as_sent

    def look(self, node: Dir, name: bytes, kinds: int) -> None:
        """`name_changed`, with all below it that has other layers now."""
        below = self.name_changed(node, name, kinds)
        if below is not None:
            self._compare_below(below)

    def _file_changed(self, node: Node, kinds: int) -> None:
        """An event of a file that is watched itself, as it has several names."""
        if kinds & GONE:
            self._watches.file_gone(node)
        if node.dead and self.sb.held_fd(node) < 0:
            return  # removed through the mount, and the kernel knows
        try:
            st = self.sb.stat(node)
        except OSError:
            if not node.dead:
                self._notifier.attributes(node.id)
            return
        if self._compare(node, st, kinds) and self.replays is not None:
            self.replays.changed_elsewhere(node)

    def name_changed(self, node: Dir, name: bytes, kinds: int) -> Dir | None:
        """A name may stand for something else (b"": the directory itself is another): bring what is recorded up to
        date, then tell the kernel what it must forget.

        Returns the directory it stands for, when its names have to be compared as well (`_compare_below`).
        """
        try:
            if kinds & NAMES:
                self._names_changed(node, name)
            finding = classify(self.sb, node, name, kinds)
            return self._cases[finding[0]](node, name, finding, kinds)
        except OSError as error:
            # ESTALE, EIO: believe nothing of it any more.
            log.debug("cannot resolve %r: %s", name, error)
            self._coherence.distrust(node)
            return None

    def _names_changed(self, node: Dir, name: bytes) -> None:
        """A branch directory has another name now, or one less, whatever the union shows of it."""
        if name and node.trusted and not node.dead:
            node.note_stacked(name)
            if len(node.layers) > 1 and self.sb.count_links(node):
                self._notifier.attributes(node.id)

    # -- requests -----------------------------------------------------------------------------

    def adopt(self, node: Dir, changed: bool) -> None:
        """`Hooks.adopt`: a request found the layers of a directory."""
        if self._judge(node, changed):
            self._compare_below(node)

    def _judge(self, node: Dir, changed: bool) -> bool:
        """Have a directory watched whose layers were found, and trust it if that can be. changed: they are others.

        True when the kernel may hold names in it that come from other branch directories now: `_compare_below`.
        """
        parent = node.parent
        was = node.trusted
        trusted = (parent is None or parent.trusted) and self._watches.cover(node)
        self._coherence.judge(node, trusted)
        return changed and was and trusted and node.nlookup > 0

    def _compare_below(self, top: Dir) -> None:
        """Drop every name of a directory that its new layers have changed, and of those below it that they changed.

        The directory is still the same node and keeps its entry: without one, processes that sit in it
        could not tell where they are (getcwd(2)).
        """
        waiting = [top]
        while waiting:  # not recursive: trees may be deep
            node = waiting.pop()
            if not node.trusted:
                continue  # by now, and the kernel has been told
            self._coherence.tell_names(node)
            for name in list(node.children):
                below = self.name_changed(node, name, NAMES)
                if below is not None:
                    waiting.append(below)
            self._coherence.forget_negatives(node)

    # -- one a case ---------------------------------------------------------------------------

    def _nothing_held(self, node: Dir, name: bytes, finding: Finding, kinds: int) -> None:
        pass

    def _itself(self, node: Dir, name: bytes, finding: Finding, kinds: int) -> None:
        differs = self._compare(node, self.sb.stat(node), kinds)
        if self.replays is not None and node.parent is None:
            self.replays.changed(node, b"", node, kinds, differs)

    def _same_file(self, node: Dir, name: bytes, finding: Finding, kinds: int) -> None:
        _, child, _, st = finding
        assert child is not None
        assert st is not None
        differs = self._compare(child, st, kinds)
        if self.replays is not None:
            self.replays.changed(node, name, child, kinds, differs)

    def _same_object(self, node: Dir, name: bytes, finding: Finding, kinds: int) -> None:
        self._remember_known(node, name, finding, kinds)
        self._known_already(node, name, finding)
        self._same_file(node, name, finding, kinds)

    def _same_directory(self, node: Dir, name: bytes, finding: Finding, kinds: int) -> Dir | None:
        _, child, found, _ = finding
        assert type(child) is Dir
        assert found is not None
        self._remember_known(node, name, finding, kinds)
        self._known_already(node, name, finding)
        before = [layer.identity for layer in child.layers]
        below = self._judge(child, lookup.set_layers(self.sb, child, found, node.floor))
        if [layer.identity for layer in child.layers] == before:
            differs = self._compare(child, self.sb.stat(child), kinds)
            if self.replays is not None:
                self.replays.changed(node, name, child, kinds, differs)
        return child if below else None

    def _known_already(self, node: Dir, name: bytes, finding: Finding) -> None:
        _, child, found, _ = finding
        if self.replays is not None and child is not None and found is not None:
            self.replays.same(node, name, child, found)

    def _replaced(self, node: Dir, name: bytes, finding: Finding, kinds: int) -> None:
        _, child, found, _ = finding
        assert child is not None
        self._remember_known(node, name, finding, kinds)
        self.sb.table.detach(child, node, name)
        self._tell_entry(node, name)
        # Whoever still has it open sees its new link count.
        self._sent.doubt(child)
        self._notifier.attributes(child.id)
        if self.replays is not None:
            self.replays.replaced(node, name, child, found, kinds)

    def _gone(self, node: Dir, name: bytes, finding: Finding, kinds: int) -> None:
        self._replaced(node, name, finding, kinds)  # by nothing

    def _appeared(self, node: Dir, name: bytes, finding: Finding, kinds: int) -> None:
        found = finding[2]
        assert found is not None
        in_view = None if node.view is None else name in node.view
        self._remember_unknown(node, name, found, kinds)
        if node.negatives is not None and name in node.negatives:
            node.negatives.discard(name)
            self._tell_entry(node, name)
        else:
            self._compare(node, self.sb.stat(node), kinds)
        self._compare_other_name(found, kinds)
        if self.replays is not None:
            self.replays.appeared(node, name, in_view, found, kinds)

    def _not_asked_for(self, node: Dir, name: bytes, finding: Finding, kinds: int) -> None:
        self.echoes += 1
        if self.replays is not None:
            self.replays.changed(node, name, None, kinds, True)

    def st_mode(self, node: Dir, layer: Layer, name: bytes) -> int:
        """The mode of what a name of a directory is on the branch of this layer; 0 for none."""
        try:
            mode: int = syscalls.stat_at(self.sb.layer_fd(node, layer), name).st_mode
        except OSError:
            return 0
        return mode

    def _absent(self, node: Dir, name: bytes, finding: Finding, kinds: int) -> None:
        in_view = None if node.view is None else name in node.view
        self._remember_unknown(node, name, None, kinds)
        if self.replays is not None:
            self.replays.absent(node, name, in_view, finding[0] is Case.HIDDEN, kinds)
        self._compare(node, self.sb.stat(node), kinds)  # its times may be others

    # -- what is recorded, what the kernel is told ----------------------------------------------

    def _remember_known(self, node: Dir, name: bytes, finding: Finding, kinds: int) -> None:
        """The view gets what a name of a known object stands for."""
        if kinds & NAMES and node.negatives is not None and name in node.negatives:
            # A listing came across the name before its event, and it did not fit into a reply.
            node.negatives.discard(name)
            self._notifier.expire(node.id, name)
        lookup.remember(node, name, finding[2] or resolve.CLEAR)

    def _remember_unknown(self, node: Dir, name: bytes, found: Found | None, kinds: int) -> None:
        """The view gets what a name stands for that nobody has asked for; a listing that the kernel may keep goes, if
        that makes it another one. Of a known object, its identity says that."""
        view = node.view
        listing = node.listed and kinds & NAMES and (view is None or name in view or found is not None)
        lookup.remember(node, name, found or resolve.CLEAR)
        if listing:
            self._coherence.tell_names(node)

    def _compare(self, node: Node, st: os.stat_result, kinds: int) -> bool:
        """Attributes of a node that is what it was; whether others have changed it, as far as can be told."""
        sent = node.sent
        if self._sent.compare(node, st, bool(kinds & CONTENT)):
            self.echoes += 1
            return False
        return sent is not None or (self.replays is not None and not self.replays.may_be_own(node))

    def _compare_other_name(self, found: Found, kinds: int) -> None:
        """A new name of something that the kernel may know by another one: link(2) sends no event to that one."""
        if found.layers is None and found.st.st_nlink > 1:
            identity = (found.st.st_dev, found.st.st_ino)
            other = self.sb.table.find(self.sb.inomap.number(*identity))
            if other is not None and other.identity == identity:
                self._compare(other, found.st, kinds)

    def _tell_entry(self, node: Dir, name: bytes) -> None:
        self._notifier.entry(node.id, name)
        self._coherence.tell_names(node)
