"""What a coherence strategy is: how far the kernel's and our own caches may be believed.

A strategy is told of every directory whose branch directories were resolved and of every change, own or
foreign, and decides two things: whether a directory's layers and view may be used without asking the
branches (`Dir.trusted`), and how long the kernel may keep its entries and attributes (`Dir.ttl`,
seconds). Nothing else in udbad looks at the mode. Trust is inherited: a directory is trusted only
below a trusted one, since a branch directory may appear in any branch its parent is on.

Of a directory that is not trusted the kernel holds nothing: no name, positive or negative, no listing, and no
attributes, of it or of what is in it. Nobody would tell it when they are old. So trust is given and lost in this
module alone, and whatever takes it away has the kernel forget in the same step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from stat import S_IFLNK
from typing import NamedTuple, Protocol

from udbad.branch import state
from udbad.branch.branches import Branch
from udbad.coherence.inotify import NAMES
from udbad.coherence.replays import Replays
from udbad.inodes.handles import written_behind
from udbad.inodes.journal import Negative
from udbad.inodes.node import Dir, Node
from udbad.inodes.table import Census
from udbad.types import Perm
from udbad.union.superblock import Superblock

FOREVER = 1.0e9
"""Seconds; the kernel keeps the answer until it is told otherwise or needs the memory."""

_PORTION = 1000
"""Nodes that are doubted between two requests, which takes less than a millisecond."""

MAX_NEGATIVES = 4096
"""Names of one directory that the kernel may remember as missing: it never tells which of them it has dropped."""


def in_trusted(node: Node) -> bool:
    """Whether the kernel may keep attributes of a node: it is in a directory that is trusted, or one itself."""
    directory = node if type(node) is Dir else node.parent
    return directory is not None and directory.ttl > 0.0


class KernelNotifier(Protocol):
    """How a strategy tells the kernel to drop what it has cached; never blocks, never fails."""

    since: float | None
    """When the event was read that makes us tell what follows (seconds of time.monotonic); None: now, no event."""

    def entry(self, parent: int, name: bytes) -> None:
        """Forget what `name` in the directory with node id `parent` is, positive or negative.

        What is mounted on it or below it is detached (d_invalidate()): only for a name that stands for another
        object now, or for none.
        """

    def expire(self, parent: int, name: bytes) -> None:
        """Have `name` looked up again at its next use. What is mounted there stays when it is still the same."""

    def attributes(self, node: int) -> None:
        """Forget the attributes of a node; changed size or mtime then drops its pages too."""

    def attributes_soon(self, node: int) -> None:
        """`attributes`, once for what comes within a few milliseconds: the same may be told again and again."""

    def data(self, node: int) -> None:
        """Forget the attributes and the cached pages of a node, mapped ones included."""

    def expire_all(self, parent: int, names: Iterable[bytes]) -> None:
        """`expire` for many names."""

    def attributes_all(self, nodes: Iterable[int]) -> None:
        """`attributes` for many nodes, which nothing else has to wait for."""

    def data_all(self, nodes: Iterable[int]) -> None:
        """`data`, likewise."""

    def everything(self) -> bool:
        """Forget every name at once; False when they must be given one by one, because this kernel has no epochs
        or because that would detach what others have mounted inside the union."""


class CoherenceStatistics(NamedTuple):
    """What a strategy did so far; all zero for those that only wait to be asked."""

    mode: str
    state: str = "healthy"
    watches: int = 0
    watch_limit: int = 0
    handles: int = 0
    degraded_directories: int = 0
    events: int = 0
    echoes: int = 0
    overflows: int = 0


class _Doubts:
    """What `Coherence._distrust_all` has to do, still."""

    __slots__ = ("done", "epoch", "reading", "rest")

    def __init__(self, epoch: bool, reading: set[int], rest: Iterator[Node]) -> None:
        """epoch: the kernel has been told to forget every name. reading: directories whose listings are being read."""
        self.epoch = epoch
        self.reading = reading
        self.rest = rest
        self.done: set[Node] = set()
        """Those that somebody has asked for meanwhile."""


class Coherence:
    """Base of all strategies: promises nothing by itself."""

    name = "?"
    events = -1
    """Descriptor that is readable when `take_events` has something to do; -1: none."""
    by_times = False
    """Whether a directory that is not trusted stays so; else it is resolved at each use, and perhaps trusted again."""

    def __init__(self, sb: Superblock, notifier: KernelNotifier) -> None:
        self.sb = sb
        self.notifier = notifier
        self.branch_events: dict[int, int] = {}
        """Branch index << KIND_BITS | KINDS of coherence/inotify.py, to number of events."""
        self.later: Callable[[Callable[[], None]], object] | None = None
        """Has something called soon, between two requests. None: there is nobody who could."""
        self._doubts: _Doubts | None = None
        """Of what is known, as `_doubt_some` goes through it."""
        self.replays: Replays | None = None
        """Has watchers of the union see direct changes; None: they do not."""

    def start(self) -> None:
        """Take over a tree, freshly mounted or handed over by another strategy: nothing in it is trusted yet."""
        self.sb.changes.attach_hooks(self)
        self.adopt(self.sb.root, False)

    def replay_to(self, replays: Replays | None) -> None:
        """Have watchers of the union see direct changes that are found; only where others tell of them."""

    async def run(self) -> None:
        """Work in the background until cancelled (child of the mount's nursery)."""

    def take_events(self) -> bool:
        """Take notice of some of what can be read from `events`, without a turn of the event loop; False when there was
        nothing."""
        return False

    def known_state(self, node: Node) -> object | None:
        return True if in_trusted(node) else None

    def catch_up(self) -> None:
        pass

    def listen(self, node: Dir) -> bool:
        return False

    def drain(self) -> None:
        """Take notice of every direct change that has happened up to now; the notifier then has the rest."""
        self._finish_doubts()

    def options_changed(self) -> None:
        """The options of the tree are others now."""

    def stop(self) -> None:
        """Let go of everything held for the tree, which is not used any more; else `hand_over`."""
        self._doubts = self.sb.table.doubted = None

    def hand_over(self) -> None:
        """Let go of a tree that goes on being used: nothing in it is trusted until another strategy has started."""
        self._distrust_all()
        self.stop()

    def mode_of(self, branch: Branch) -> str:
        """The mode that applies to a branch: its own, none for media that cannot change, else the mount's."""
        if branch.udba is not None:
            return branch.udba
        return "none" if branch.perm is Perm.RR else self.name

    def lease(self, branch: Branch, until: float) -> bool:
        """Somebody hears of every change on a branch until a moment of `leases.now`, and gives a hint of each; one that
        has passed takes that back. Whether the branch is believed for that: it need not be, where its file system tells
        of changes, and must not, where another mode was asked for."""
        return False

    def end_leases(self) -> None:
        """Believe no branch any more whose lease is over."""

    @property
    def leased_until(self) -> float | None:
        """When the first lease ends."""
        return None

    def adopt(self, node: Dir, changed: bool) -> None:
        raise NotImplementedError

    def judge(self, node: Dir, trusted: bool) -> None:
        """Trust a directory from now on, or do not."""
        if self._doubts is not None:
            self._doubt_first(node)  # it was found by its name; `distrust` would go through all below it at once
        if trusted:
            node.trusted = True
            node.ttl = FOREVER
        elif node.trusted:
            self.distrust(node)

    def distrust(self, top: Dir) -> None:
        """Have a directory, and every one below it, asked at its next use, which makes it trusted where it can be.

        What the kernel has of those that were trusted it forgets; name by name, not by dropping the directory itself:
        that may still be the same, and somebody may have mounted something below it.
        """
        waiting = [top]
        while waiting:
            node = waiting.pop()
            was_trusted = self._lose(node)
            if was_trusted:
                self.notifier.attributes(node.id)
                self.expire_names(node)
            for child in node.children.values():
                if type(child) is Dir:
                    waiting.append(child)
                elif was_trusted:
                    self._drop_file(child)
        if top is self.sb.root:
            self.adopt(top, False)  # nobody looks it up

    def invalidate(self, path: Sequence[bytes]) -> int:
        """Ask again about a path (names from the root down) and all below it; returns how many nodes that were."""
        self.sb.table.read_all()
        node: Node | None = self.sb.root
        parent: Dir | None = None
        for name in path:
            parent = node if type(node) is Dir else None
            node = None if parent is None else parent.children.get(name)
        if parent is not None:
            self._doubt(parent, path[-1])
        if node is None:
            return 0
        if type(node) is Dir:
            self.distrust(node)
        waiting, count = [node], 0
        while waiting:
            node = waiting.pop()
            node.lacks = None
            count += 1
            if type(node) is Dir:
                waiting += node.children.values()
            else:
                self.notifier.data(node.id)
        return count

    def hint(self, node: Dir, name: bytes, kinds: int) -> bool:
        """Somebody says that a name of a directory has changed on a branch (b"": the root itself).

        kinds: bits of coherence/inotify.py. False when the kernel holds nothing of it, since the directory is not
        trusted. Where nothing is recorded that could be compared, all is dropped that the name stands for.
        """
        if not node.trusted:
            return False
        child = node.children.get(name) if name else node
        if kinds & NAMES and name:
            self._doubt(node, name)
            if type(child) is Dir:
                self.distrust(child)
        if type(child) is Dir:
            self.tell_names(child)
        elif child is not None:
            self._drop_file(child)
        return True

    def _doubt(self, node: Dir, name: bytes) -> None:
        """A name may stand for something else than we and the kernel think."""
        node.forget_names()
        if node.trusted:
            if node.negatives is not None:
                node.negatives.discard(name)
            self.notifier.expire(node.id, name)
            self.tell_names(node)

    def _distrust_all(self) -> None:
        """`distrust` for everything there is, what has lost its name included; by an epoch, where there is one."""
        self._begin_doubts(self.notifier.everything())
        self._finish_doubts()

    def _begin_doubts(self, epoch: bool) -> None:
        """Have `_distrust_all` done, `_doubt_some` by `_doubt_some`: each node before anybody uses it.

        epoch: what `KernelNotifier.everything` has said.
        """
        # A listing that was answered before may be taken in afterwards: names then have the new epoch, which
        # fuse_direntplus_link() looks at last. To have one forgotten waits for whoever reads the directory.
        handles, table = self.sb.handles, self.sb.table
        reading: set[int] = {handle.node.id for handle in handles.dirs.values()}
        self._doubts = _Doubts(epoch, reading, iter(list(table.nodes.values())))
        table.doubted = self._doubt_first
        opened: list[Node] = [handle.node for handle in handles.dirs.values()]
        opened += [handle.node for handle in handles.files.values()]
        for node in opened:
            self._doubt_first(node)  # who uses a handle does not ask for it

    def _doubt_first(self, node: Node) -> None:
        """Somebody asks for a node: that, and all above it, comes first."""
        doubts = self._doubts
        if doubts is None:
            return
        way: list[Node] = []
        waiting = [node]
        while waiting:
            one = waiting.pop()
            if one not in doubts.done:
                doubts.done.add(one)
                way.append(one)
                waiting += [parent for parent, _ in one.names()]
        self._doubt_these(doubts, way)

    def _doubt_some(self, most: int) -> bool:
        """Go on with `_begin_doubts`: with so many nodes. False when that is all."""
        doubts = self._doubts
        if doubts is None:
            return False
        some = list(islice(doubts.rest, most))
        self._doubt_these(doubts, [node for node in some if node not in doubts.done] if doubts.done else some)
        if len(some) < most:
            self._doubts = self.sb.table.doubted = None
        return self._doubts is not None

    def _finish_doubts(self) -> None:
        while self._doubt_some(_PORTION):
            pass

    def _doubt_later(self) -> None:
        """Between two requests: of all that is known there may be a million."""
        if self.later is None:
            self._finish_doubts()
        elif self._doubt_some(_PORTION):
            self.later(self._doubt_later)

    def _doubt_these(self, doubts: _Doubts, nodes: list[Node]) -> None:
        epoch, reading = doubts.epoch, doubts.reading
        attributes: list[int] = []
        data: list[int] = []
        for node in nodes:
            if type(node) is not Dir:
                if node.handles:
                    self._drop_file(node)
                    continue
                node.lacks = None
                if self._has_pages(node):
                    data.append(node.id)
                elif node.nlookup:
                    attributes.append(node.id)
                continue
            directory: Dir = node
            was_trusted = self._lose(directory, directory.id in reading)
            if was_trusted:
                attributes.append(directory.id)
            if was_trusted and (not epoch or directory.id in reading):
                self.expire_names(directory)
            elif epoch:
                directory.negatives = None
        self.notifier.data_all(data)
        self.notifier.attributes_all(attributes)

    def _lose(self, node: Dir, recorded: bool = True) -> bool:
        """A directory is not trusted; whether it was, so that the caller has its names and attributes dropped.

        recorded: that its listing is out of date. A successor that finds it listed has the kernel drop that.
        """
        node.lacks = None
        node.forget_names()
        if not node.trusted:
            return False
        node.trusted = False
        node.ttl = 0.0
        self._outdate_listing(node, recorded)
        if self.replays is not None:
            self.replays.on_doubt()
        return True

    def _has_pages(self, node: Node) -> bool:
        """Whether pages of what is no directory may be in use: of open files, and where links lead."""
        return bool(node.handles) or self.sb.kernel_opens or node.kind == S_IFLNK

    def _drop_file(self, node: Node) -> None:
        """Have the kernel ask for the attributes of what is no directory, and for pages that may be in use."""
        node.lacks = None
        if self._has_pages(node):
            self.notifier.data(node.id)
        elif node.nlookup:
            self.notifier.attributes(node.id)

    def dropped(self, node: Node) -> None:
        pass

    def shrink(self) -> None:
        pass

    def own_change(self, node: Dir, name: bytes, st: os.stat_result | None = None, moved: bool = False) -> None:
        # The kernel has dropped its listing, and what it knew of the name, by itself (fuse_dir_changed()).
        if node.listed:
            node.listed = False
            self.sb.table.changed(node)
        if node.negatives is not None:
            node.negatives.discard(name)
        if moved and not node.trusted:
            self.moved_in(node, name)

    def own_event(self, node: Dir, branch: Branch, name: bytes, event: int) -> None:
        pass

    def before_own(self, node: Node, fd: int = -1) -> None:
        pass

    def own_data(
        self, node: Node, content: bool = False, st: os.stat_result | None = None, fd: int = -1, mtime: bool = False
    ) -> None:
        if mtime and type(node) is Dir and node.mtime_offset:
            self.sb.table.changed(node)
            node.mtime_offset = 0  # times that were set are shown as they are
            self.notifier.data(node.id)

    def drop_dentry(self, node: Dir, name: bytes, lost: Node | None = None) -> None:
        if node.ttl:
            self.notifier.entry(node.id, name)
            self.tell_names(node)
            if lost is not None and lost.nlookup:
                self.notifier.attributes(lost.id)

    def tell_names(self, node: Dir) -> None:
        """Have the kernel forget a directory's attributes, and its listing if it may have one.

        It looks at mtime before it uses a listing (fuse_readdir_cached()), and a change on a lower branch
        leaves that of the top copy alone. Dropping the pages instead could come between an answer and its use.
        """
        self._outdate_listing(node, True)
        self.notifier.attributes(node.id)

    def _outdate_listing(self, node: Dir, recorded: bool) -> None:
        if node.listed:
            node.mtime_offset += 1
            if recorded:
                self.sb.table.changed(node)
            node.listed = False  # until it is read anew

    def moved_in(self, node: Dir, name: bytes) -> None:
        """A rename gave an object this name, in a directory that is not trusted."""
        # The kernel moves its dentry with the time-out that it had in another directory, which may have been trusted
        # when the rename began (d_move()), and asks for no attribute but ctime (fuse_rename_common()).
        self.notifier.expire(node.id, name)
        child = node.children.get(name)
        if child is not None and type(child) is not Dir:  # a directory was adopted in its new place
            self._drop_file(child)

    def drop_attributes(self, node: Node, soon: bool = False) -> None:
        if node.nlookup and (node.parent is None or node.parent.ttl):
            (self.notifier.attributes_soon if soon else self.notifier.attributes)(node.id)

    def negative_ttl(self, node: Node, name: bytes) -> float:
        """How long (seconds) the kernel may keep that a directory has no such name; 0.0: not at all.

        That it keeps it is remembered here, for when the name comes to be.
        """
        if type(node) is not Dir or not node.ttl:
            return 0.0
        names = node.negatives
        if names is None:
            names = node.negatives = set()
        elif len(names) >= MAX_NEGATIVES:
            self.forget_negatives(node)
            names = node.negatives = set()
        names.add(name)
        record = self.sb.table.record
        if record is not None:
            record.changed.add(tuple.__new__(Negative, (node, name)))  # as Negative(), which is a function of Python
        return node.ttl

    def forget_negatives(self, node: Dir) -> None:
        """Have the kernel forget every name of a directory that it was told not to exist."""
        names, node.negatives = node.negatives, None
        for name in names or ():
            if name not in node.children:  # else it exists by now, and is not to be detached
                self.notifier.entry(node.id, name)

    def expire_names(self, node: Dir) -> None:
        """Have the kernel ask again for every name of a directory, whatever it was told."""
        self.forget_negatives(node)
        self.notifier.expire_all(node.id, node.children)

    def not_sent(self, node: Node) -> None:
        """Attributes that `attr_ttl` was asked for did not fit into the reply."""

    def drop_everything(self) -> None:
        """Forget all views and have the kernel forget all names, attributes and the pages of open files.

        Every directory is asked again at its next use, which makes it trusted again where it can be.
        """
        self._begin_doubts(self.notifier.everything())
        self.adopt(self.sb.root, False)
        self._doubt_later()

    def recalled(self) -> None:
        """The tree is one that a predecessor had (union/recall.py): the kernel may remember all of it, and nobody has
        seen what has happened meanwhile. To be called after `start`."""
        epoch = self.notifier.everything()
        self._forget_unread(epoch)
        # The pages of a listing are dropped: a later mtime would be seen by who compares it, though nothing has
        # changed. An answer of then may come between that and its use. Where nothing changes by itself, it is as good
        # as one of now; elsewhere the listing is not used until it has been taken in, but where that cannot be had.
        handles = self.sb.handles
        reading: set[int] = set()
        if any(self.mode_of(branch) != "none" for branch in self.sb.branches.branches):
            if self.sb.kernel_opens:
                reading = {handle.node.id for handle in handles.dirs.values()}
            else:
                handles.unheard = {handle.fh: handle.node for handle in handles.dirs.values() if handle.cached}
                handles.unsure = set(handles.unheard.values())
        dropped: list[int] = []
        for node in self.sb.table.nodes.values():
            if type(node) is Dir:
                directory: Dir = node
                directory.trusted = True
                directory.ttl = FOREVER
                if directory.listed and directory.id not in reading:
                    directory.listed = False  # a successor that finds it listed drops that once more
                    dropped.append(directory.id)
        self._begin_doubts(epoch)
        self._finish_doubts()
        self.adopt(self.sb.root, False)
        self.notifier.data_all(dropped)

    def _forget_unread(self, epoch: bool) -> None:
        """Have the kernel forget what was not made yet, for which no node is needed where it can forget all names at
        once; else make all, of which it may remember any name."""
        table = self.sb.table
        unread = table.unread
        if unread is None:
            return
        if not epoch:
            table.read_all()
            return
        with_pages, rest = unread.forgotten(self.sb.kernel_opens)
        self.notifier.data_all(with_pages)
        self.notifier.attributes_all(rest)

    def attr_ttl(self, node: Node, st: os.stat_result) -> float:
        """How long (seconds) the kernel may keep the attributes of a node."""
        parent = node.parent
        if type(node) is Dir:
            return node.ttl if parent is None else min(node.ttl, parent.ttl)
        return 0.0 if parent is None or (node.handles and written_behind(node)) else parent.ttl

    def opened_behind(self, node: Node, st: os.stat_result) -> None:
        """The kernel will use the file, whose status now is `st`, without asking: what it has of its attributes may be
        from before a store through a mapping, of which nobody tells."""
        lasting = state.lasting_stamp(node.branch, st)
        if node.seen is not None and node.seen != lasting:
            self.notifier.attributes(node.id)
        node.seen = lasting

    def keep_cache(self, node: Node, st: os.stat_result) -> bool:
        """Whether pages cached at an earlier open still show the file whose status now is `st`.

        Compared with what was recorded at the last open: a change the kernel cannot see (a store
        through a shared mapping of the branch file) is at the latest seen at the next open.
        """
        lasting = state.lasting_stamp(node.branch, st)
        same = node.seen == (lasting or state.stamp(st))
        node.seen = lasting
        return same

    def state_of(self, branch: Branch) -> str:
        """How well the mode asked for is kept on a branch: one of metrics.COHERENCE_STATES."""
        return "healthy"

    def statistics(self, census: Census | None = None) -> CoherenceStatistics:
        """census: of all nodes, where that was made already."""
        return CoherenceStatistics(self.name)
