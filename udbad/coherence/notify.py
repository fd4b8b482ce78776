"""udba=notify: the kernel caches for ever, and events drop exactly what changed.

Every directory the kernel may hold something of is watched on every branch it is on. Events are only
hints: for each name they mention, what the branches say now is compared with what was recorded, and
only a difference leads to an invalidation. So own changes that come back as events cost nothing, and
a doubled or missing detail does no harm. The view is brought up to date first, then the kernel is told.

A directory is trusted while it and every directory above it is watched and healthy. Everything else
is served as reval: branches whose file system sends no events (unless somebody else tells of their changes:
coherence/leases.py), directories for which no watch is to be
had, everything after an overflow until it is asked for again. It degrades; it never lies.

What no event tells: stores through a shared mapping of a branch file (seen at the next open, when
the time stamps differ), and changes through a hard link in a directory nobody watches, until the
file is known to have several names; it is then watched itself.
"""

from __future__ import annotations

import logging
import os

from udbad.branch.branches import Branch
from udbad.branch.state import has_one_name, lasting_stamp
from udbad.coherence.base import FOREVER, Coherence, CoherenceStatistics, KernelNotifier, in_trusted
from udbad.coherence.events import Events
from udbad.coherence.inotify import SILENT_FS, watch_limit
from udbad.coherence.leases import Leases
from udbad.coherence.replays import Replays
from udbad.coherence.sent import UNKNOWN, SentAttributes
from udbad.coherence.watcher import Change, Watcher
from udbad.coherence.watches import Watches
from udbad.inodes.handles import written_behind
from udbad.inodes.node import Dir, Node
from udbad.inodes.table import Census
from udbad.union.superblock import Superblock

log = logging.getLogger(__name__)

_LEASED = {True: "its changes are told by others", False: "its changes are not told any more; served as reval"}


class NotifyCoherence(Coherence):
    """The strategy. Runs on the event loop but for the notifier, which has threads of its own."""

    name = "notify"

    def __init__(self, sb: Superblock, notifier: KernelNotifier) -> None:
        super().__init__(sb, notifier)
        self._watches = Watches(sb, self.mode_of, self.distrust)
        self._sent = SentAttributes(sb, notifier)
        self._events = Events(self, self._watches, self._sent)
        self._silent: set[int] = set()
        """Indices of the branches whose file system sends no events."""
        self._leases = Leases()
        """On branches of these."""
        self._overflows = 0

    # -- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        self.events = self._watches.open(self._on_changes, self._events.on_echoes, self._on_overflow)
        for branch in self.sb.branches.branches:
            if self._is_silent(branch):
                self._silent.add(branch.index)
                log.info("branch %s: %s sends no events; served as reval", branch.describe(), branch.fs_type)
        super().start()

    def replay_to(self, replays: Replays | None) -> None:
        self.replays = self._events.replays = replays
        if replays is not None:
            replays.st_mode = self._events.st_mode

    async def run(self) -> None:
        if self._watches.watcher is not None:
            await self._watches.watcher.run()

    def stop(self) -> None:
        super().stop()
        self.events = -1
        self._watches.close()
        for node in self.sb.table.nodes.values():
            node.sent = None

    def take_events(self) -> bool:
        watcher = self._watches.watcher
        if watcher is None:
            return False
        some = watcher.take()
        self._caught_up(watcher)
        return some

    def drain(self) -> None:
        watcher = self._watches.watcher
        if watcher is not None:
            watcher.drain()
            self._caught_up(watcher)
        super().drain()

    def _caught_up(self, watcher: Watcher) -> None:
        if watcher.emptied and self.replays is not None:
            self.replays.caught_up()

    def options_changed(self) -> None:
        self._watches.options_changed()

    def shrink(self) -> None:
        self._watches.shrink()

    def dropped(self, node: Node) -> None:
        node.sent = None
        self._watches.forget(node)

    # -- branches and directories ---------------------------------------------------------------

    def _is_silent(self, branch: Branch) -> bool:
        if branch.udba == "notify":
            return False  # the user knows better
        return branch.fs_type in SILENT_FS or branch.fs_type.startswith("fuse")

    def mode_of(self, branch: Branch) -> str:
        mode = super().mode_of(branch)
        if mode != "notify" or branch.index not in self._silent:
            return mode
        return "leased" if branch.index in self._leases else "reval"

    def lease(self, branch: Branch, until: float) -> bool:
        if super().mode_of(branch) != "notify" or branch.index not in self._silent:
            return False
        if self._leases.give(branch.index, until):
            log.info("branch %s: %s", branch.describe(), _LEASED[branch.index in self._leases])
            self.drop_everything()
        return branch.index in self._leases

    def end_leases(self) -> None:
        over = self._leases.end()
        if over:
            for index in over:
                branch = self.sb.branches[index]
                log.warning("branch %s: nobody vouches for it any more; served as reval", branch.describe())
            self.drop_everything()

    @property
    def leased_until(self) -> float | None:
        return self._leases.next_end

    def known_state(self, node: Node) -> object | None:
        # An event or an answer may have the stamp recorded anew; it is another one, by its ctime, after any change.
        stamp = node.sent if in_trusted(node) else None
        if stamp and (type(node) is Dir or has_one_name(stamp)):
            return stamp
        return None  # not known, or it may be changed by a name in a directory that nobody watches

    def adopt(self, node: Dir, changed: bool) -> None:
        self._events.adopt(node, changed)

    # -- attributes that the kernel is given ------------------------------------------------------

    def attr_ttl(self, node: Node, st: os.stat_result) -> float:
        parent = node.parent
        new = lasting_stamp(node.branch, st) or UNKNOWN
        if type(node) is Dir:
            ttl = node.ttl if parent is None else min(node.ttl, parent.ttl)
            node.sent = new
            return ttl
        if parent is None or not parent.ttl:
            return 0.0
        if node.handles and written_behind(node):
            node.sent = None
            return 0.0
        node.sent = new
        if st.st_nlink > 1 and (node.branch.index in self._leases or not self._watches.cover_file(node)):
            # Somebody may change it through a name in a directory that is not watched. This answer was
            # taken before the watch, so it is good for now only.
            return 0.0
        return FOREVER

    def opened_behind(self, node: Node, st: os.stat_result) -> None:
        self._sent.compare(node, st, False)
        if self.replays is not None:
            self.replays.own_data(node)

    def not_sent(self, node: Node) -> None:
        self._sent.doubt(node)

    def _drop_file(self, node: Node) -> None:
        super()._drop_file(node)
        node.sent = None

    # -- own changes --------------------------------------------------------------------------

    def before_own(self, node: Node, fd: int = -1) -> None:
        sent: SentAttributes = self._sent
        sent.before_own(node, fd)

    def own_data(
        self, node: Node, content: bool = False, st: os.stat_result | None = None, fd: int = -1, mtime: bool = False
    ) -> None:
        if mtime:
            super().own_data(node, mtime=True)
        sent: SentAttributes = self._sent
        sent.own_data(node, content, st, fd)
        if self.replays is not None:
            self.replays.own_data(node)

    def own_change(self, node: Dir, name: bytes, st: os.stat_result | None = None, moved: bool = False) -> None:
        super().own_change(node, name, st, moved)
        # The kernel marks the directory's attributes old by itself (fuse_dir_changed()), and asks for them when it
        # needs them.
        node.sent = None
        if self.replays is not None:
            self.replays.own_name(node, name)
        child = node.children.get(name)
        if child is not None:
            self.own_data(child, False, st)

    def drop_attributes(self, node: Node, soon: bool = False) -> None:
        super().drop_attributes(node, soon)
        if soon:
            node.sent = None  # the event of the change need not have it told once more

    def own_event(self, node: Dir, branch: Branch, name: bytes, event: int) -> None:
        self._watches.expect(node, branch.index, name, event)

    # -- events of others -----------------------------------------------------------------------

    def _on_changes(self, changes: list[Change]) -> None:
        assert self._watches.watcher is not None
        self.notifier.since = self._watches.watcher.read_at
        try:
            self._events.handle(changes)
        finally:
            self.notifier.since = None

    def _on_overflow(self) -> None:
        """Events were lost: nothing that is cached can be believed.

        Every directory is asked again at its next use, which makes it trusted again.
        """
        self._overflows += 1
        log.warning("lost branch events (overflow %d); all caches dropped", self._overflows)
        self.drop_everything()

    def hint(self, node: Dir, name: bytes, kinds: int) -> bool:
        if not node.trusted:
            return False
        if self._leases:
            # What a network file system says may be older than the hint, and its times too coarse to tell.
            return super().hint(node, name, kinds)
        was = node.children.get(name)
        self._events.look(node, name, kinds)
        if type(was) is Dir and node.children.get(name) is not was:
            self.distrust(was)  # hints of what was in it do not find it any more
        return True

    # -- reporting ----------------------------------------------------------------------------

    def state_of(self, branch: Branch) -> str:
        if super().mode_of(branch) != self.name:
            return "healthy"
        if branch.index in self._silent:
            return "healthy" if branch.index in self._leases else "silent"
        return self._watches.state

    def statistics(self, census: Census | None = None) -> CoherenceStatistics:
        if census is None:
            census = self.sb.table.census()
        return CoherenceStatistics(
            mode=self.name,
            state=self._watches.state,
            watches=len(self._watches),
            watch_limit=watch_limit(),
            handles=self._watches.handles,
            degraded_directories=census.untrusted,
            events=self._events.count,
            echoes=self._events.echoes,
            overflows=self._overflows,
        )
