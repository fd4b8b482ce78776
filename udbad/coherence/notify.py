"""udba=notify: the kernel caches for ever, and events drop exactly what changed.

Every directory the kernel may hold something of is watched on every branch it is on. Events are only
hints: for each name they mention, what the branches say now is compared with what was recorded, and
only a difference leads to an invalidation. So own changes that come back as events cost nothing, and
a doubled or missing detail does no harm. The view is brought up to date first, then the kernel is told.

A directory is trusted while it and every directory above it is watched and healthy. Everything else
is served as reval: branches whose file system sends no events, directories for which no watch is to be
had, everything after an overflow until it is asked for again. It degrades; it never lies.

Calls go one way: the union calls `adopt` for a directory whose layers it found, or the strategy, for an event, asks
`lookup.resolve` and `lookup.set_layers`, which call nobody. So `adopt` is never entered from a comparison of names.

What no event tells: stores through a shared mapping of a branch file (seen at the next open, when
the time stamps differ), and changes through a hard link in a directory nobody watches, until the
file is known to have several names; it is then watched itself.
"""

from __future__ import annotations

import errno
import logging
import os
import stat as st_mod
from collections import OrderedDict
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from udbad.branch import syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.coherence.base import FOREVER, Coherence, CoherenceStatistics, KernelNotifier
from udbad.coherence.watcher import CONTENT, GONE, NAMES, Change, Watcher, WatchLimit, watch_limit
from udbad.inodes.handles import note_id_bits
from udbad.inodes.inomap import Identity
from udbad.inodes.table import Dir, Node
from udbad.union import homes, lookup, times
from udbad.union.superblock import Superblock

log = logging.getLogger(__name__)

SILENT_FS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "afs", "lustre", "gfs2", "ocfs2", "vboxsf"}
)
"""File systems on which others can change things without an inotify event here; so can all of FUSE."""

_EVICT = 64
"""Directories that lose their watches at once when the limit is reached."""
_HEALED_SECONDS = 60.0
"""Without meeting the limit; directories that nobody uses any more may be without a watch for longer."""

Stamp = tuple[int, int, int, int]


def stamp(node: Node, st: os.stat_result) -> Stamp | None:
    """What tells two states of one object apart: ctime changes with everything (inode(7)). None: nothing does yet."""
    if times.is_racy(node.branch, st):
        return None
    return (st.st_ctime_ns, st.st_mtime_ns, st.st_size, st.st_nlink)


@dataclass(slots=True)
class _Watched:
    """The watches of one directory: branch index to (watch, identity of the directory watched)."""

    node: Dir
    watches: dict[int, tuple[Any, Identity]] = field(default_factory=dict)


@dataclass(slots=True)
class _Place:
    """Handle of a directory watch."""

    node: Dir
    index: int


class NotifyCoherence(Coherence):
    """The strategy. Runs on the event loop but for the notifier, which has threads of its own."""

    name = "notify"

    def __init__(self, sb: Superblock, notifier: KernelNotifier) -> None:
        super().__init__(sb, notifier)
        self._watcher: Watcher | None = None
        self._watched: OrderedDict[int, _Watched] = OrderedDict()
        self._files: dict[int, Any] = {}
        self._silent: set[int] = set()
        self._state = "healthy"
        self._events = 0
        self._echoes = 0
        self._overflows = 0
        self._without: set[int] = set()
        """Directories that have no watch because of the limit."""
        self._limited_at = 0.0
        self._refused = 0.0, 0
        """When the kernel refused a watch, and what the limit was then."""
        self._sent: dict[int, Stamp | None] = {}

    # -- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        try:
            self._watcher = Watcher(self._on_changes, self._on_echo, self._on_overflow)
            self.events = self._watcher.fd
            self.options_changed()
        except OSError as error:
            self._set_state("degraded", f"no inotify instance to be had ({error.strerror}); served as reval")
        for branch in self.sb.branches.branches:
            if self._is_silent(branch):
                self._silent.add(branch.index)
                log.info("branch %s: %s sends no events; served as reval", branch.describe(), branch.fs_type)
        super().start()

    async def run(self) -> None:
        if self._watcher is not None:
            await self._watcher.run()

    def stop(self) -> None:
        self.events = -1
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None
        self._watched.clear()
        self._files.clear()
        self._sent.clear()

    def take_events(self) -> None:
        if self._watcher is not None:
            self._watcher.take()

    def drain(self) -> None:
        if self._watcher is not None:
            self._watcher.drain()

    def options_changed(self) -> None:
        if self._watcher is not None:
            self._watcher.room = watch_limit() - self._reserve()

    def _reserve(self) -> int:
        """Watches that are left to other programs of the user: one limit is for all of them together."""
        return watch_limit() * self.sb.options.watch_reserve // 100

    def _no_room(self) -> None:
        """A watch was refused, by the kernel or because the reserve begins."""
        watcher = self._watcher
        assert watcher is not None
        self._limited_at = monotonic()
        self._set_state("limited", f"watch limit reached at {len(watcher)}; the rest is served as reval")
        limit = watch_limit()
        if len(watcher) < watcher.room:
            # Others have the rest. What they may still want is for us to give back.
            self._refused = self._limited_at, limit
            watcher.room = max(len(watcher) - self._reserve(), 0)
        elif self._limited_at - self._refused[0] > _HEALED_SECONDS or limit != self._refused[1]:
            self.options_changed()  # there may be more by now

    def _is_silent(self, branch: Branch) -> bool:
        if branch.udba == "notify":
            return False  # the user knows better
        return branch.fs_type in SILENT_FS or branch.fs_type.startswith("fuse")

    def mode_of(self, branch: Branch) -> str:
        mode = super().mode_of(branch)
        return "reval" if mode == "notify" and branch.index in self._silent else mode

    # -- trust --------------------------------------------------------------------------------

    def adopt(self, node: Dir, changed: bool) -> None:
        if self._judge_layers(node, changed):
            self._compare_below(node)

    def _judge_layers(self, node: Dir, changed: bool) -> bool:
        """Watch a directory whose layers were found, and trust it if that can be.

        True when the kernel may hold names in it that are merged from other branch directories now: `_compare_below`.
        """
        parent = node.parent
        was = node.trusted
        trusted = self._watcher is not None and (parent is None or parent.trusted) and self._watch(node)
        self.judge(node, trusted)
        return changed and was and trusted and node.nlookup > 0

    def _watch(self, node: Dir) -> bool:
        """Have every layer of a directory watched that needs it; False when that cannot be, or is not enough yet."""
        watcher = self._watcher
        assert watcher is not None
        entry = self._watched.get(node.id)
        if entry is not None and entry.node is not node:
            self._unwatch(node.id)
            entry = None
        wanted = {}
        for layer in node.layers:
            mode = self.mode_of(layer.branch)
            if mode == "reval":
                return False
            if mode == "notify":
                wanted[layer.branch.index] = layer
        if entry is None:
            entry = _Watched(node)
            self._watched[node.id] = entry
        for index in [index for index in entry.watches if index not in wanted]:
            watcher.unwatch(entry.watches.pop(index)[0], _Place(node, index))
        complete = True
        for index, layer in wanted.items():
            held = entry.watches.get(index)
            if held is not None:
                if held[1] == layer.identity:
                    continue
                watcher.unwatch(held[0], _Place(node, index))
                del entry.watches[index]
            fd = self.sb.layer_fd(node, layer)
            watch = self._add_watch(node, index, fd)
            if watch is None:
                self._unwatch(node.id)
                return False
            entry.watches[index] = (watch, layer.identity)
            if layer.branch.whable and node.parent is not None and whiteout.opaque(fd) != (node.opaque == index):
                complete = False  # an opaque mark came or went before the watch: its layers have to be found again
        return complete

    def _add_watch(self, node: Dir, index: int, fd: int) -> Any:
        watcher = self._watcher
        assert watcher is not None
        for attempt in range(2):
            try:
                watch = watcher.watch_directory(fd, _Place(node, index))
                if self._state == "limited":
                    self._without.discard(node.id)
                    # One watch that somebody else gave back is not the end of it.
                    if not self._without or monotonic() - self._limited_at > _HEALED_SECONDS:
                        self._without.clear()
                        self._set_state("healthy", "there are watches again")
                return watch
            except WatchLimit:
                self._no_room()
                if attempt or not self._evict(node):
                    self._without.add(node.id)
                    return None
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EACCES, errno.ENOTDIR):
                    raise
                return None
        return None

    def _evict(self, keep: Dir) -> bool:
        """Take the watches of directories that were not used lately; a second chance for those that were."""
        evicted = 0
        for _ in range(2 * len(self._watched)):
            node_id, entry = next(iter(self._watched.items()))
            node = entry.node
            if node.hot or node is keep or node is self.sb.root or self._is_above(node, keep):
                node.hot = False
                self._watched.move_to_end(node_id)
                continue
            self._unwatch(node_id)
            self._without.add(node_id)
            self.distrust(node)
            evicted += 1
            if evicted >= _EVICT:
                break
        return evicted > 0

    @staticmethod
    def _is_above(node: Dir, other: Dir) -> bool:
        current: Dir | None = other
        while current is not None:
            if current is node:
                return True
            current = current.parent
        return False

    def _unwatch(self, node_id: int) -> None:
        entry = self._watched.pop(node_id, None)
        if entry is not None and self._watcher is not None:
            for index, (watch, _) in entry.watches.items():
                self._watcher.unwatch(watch, _Place(entry.node, index))

    def dropped(self, node: Node) -> None:
        self._sent.pop(node.id, None)
        if type(node) is Dir:
            self._without.discard(node.id)
            entry = self._watched.get(node.id)
            if entry is not None and entry.node is node:
                self._unwatch(node.id)
        watch = self._files.pop(node.id, None)
        if watch is not None and self._watcher is not None:
            self._watcher.unwatch(watch, node)

    def shrink(self) -> None:
        self._sent = dict(self._sent)
        self._files = dict(self._files)
        self._watched = OrderedDict(self._watched)
        if self._watcher is not None:
            self._watcher.shrink()

    # -- what the kernel was told ---------------------------------------------------------------

    def attr_ttl(self, node: Node, st: os.stat_result) -> float:
        parent = node.parent
        sent = self._sent
        new = stamp(node, st)
        if type(node) is Dir:
            ttl = node.ttl if parent is None else min(node.ttl, parent.ttl)
            sent[node.id] = new
            return ttl
        if parent is None or not parent.ttl:
            return 0.0
        sent[node.id] = new
        if st.st_nlink > 1 and node.id not in self._files:
            # Somebody may change it through a name in a directory that is not watched. This answer was
            # taken before the watch, so it is good for now only.
            self._watch_file(node)
            return 0.0
        return FOREVER

    def _watch_file(self, node: Node) -> None:
        if self._watcher is None or len(self._files) > watch_limit() // 4:
            return
        try:
            dirfd, name = self.sb.locate(node)
            fd = syscalls.pin_at(dirfd, name)
        except OSError:
            return
        try:
            self._files[node.id] = self._watcher.watch_file(fd, node)
        except (WatchLimit, OSError):
            return
        finally:
            os.close(fd)

    def not_sent(self, node: Node) -> None:
        if node.id in self._sent:
            self._sent[node.id] = None

    def before_own(self, node: Node, fd: int = -1) -> None:
        """Before an own change that will be recorded as told: a foreign one not handled yet must not hide in it."""
        sent = self._sent.get(node.id)
        if sent is None:
            return
        try:
            now = stamp(node, self._stat(node, fd))
        except OSError:
            return
        if now != sent:
            self.notifier.data(node.id)

    def _stat(self, node: Node, fd: int) -> os.stat_result:
        """By descriptor where there is one: for each write of a big file, the name would have to be looked for."""
        return os.fstat(fd) if fd >= 0 else self.sb.stat(node)

    def own_data(self, node: Node, content: bool = False, st: os.stat_result | None = None, fd: int = -1) -> None:
        sent = self._sent.get(node.id)
        if sent is None:
            return
        now = None
        if not node.dead or node.handles:
            try:
                now = stamp(node, self._stat(node, fd) if st is None else st)
            except OSError:
                pass
        if now is not None and not content and now[1:3] != sent[1:3] and type(node) is not Dir:
            self.notifier.data(node.id)  # only a foreign change can have done that
        self._sent[node.id] = now

    def own_change(self, node: Dir, name: bytes, st: os.stat_result | None = None) -> None:
        super().own_change(node, name)
        # The kernel marks the directory's attributes old by itself (fuse_dir_changed()), and asks for them when it
        # needs them.
        self._sent.pop(node.id, None)
        child = node.children.get(name)
        if child is not None:
            self.own_data(child, False, st)

    def own_event(self, node: Dir, branch: Branch, name: bytes, event: int) -> None:
        entry = self._watched.get(node.id)
        held = None if entry is None or entry.node is not node else entry.watches.get(branch.index)
        if held is not None and self._watcher is not None:
            self._watcher.expect(held[0], event, name)

    # -- events -------------------------------------------------------------------------------

    def _on_echo(self, handle: object, kinds: int) -> None:
        """An event that own_event announced, so that of a directory watch."""
        assert isinstance(handle, _Place)
        self._count(handle.index, kinds)
        self._echoes += 1

    def _count(self, index: int, kinds: int) -> None:
        """One event on the branch with this index."""
        self._events += 1
        key = (index, kinds)
        self.branch_events[key] = self.branch_events.get(key, 0) + 1

    def _on_changes(self, changes: list[Change]) -> None:
        """One burst: each name once, however often it is mentioned."""
        assert self._watcher is not None
        self.notifier.since = self._watcher.read_at
        try:
            self._handle(changes)
        finally:
            self.notifier.since = None

    def _handle(self, changes: list[Change]) -> None:
        names: dict[tuple[Dir, bytes], int] = {}
        for change in changes:
            handle = change.handle
            if isinstance(handle, _Place):
                self._count(handle.index, change.kinds)
                self._sort(handle, change, names)
            elif isinstance(handle, Node):
                self._count(handle.branch.index, change.kinds)
                self._file_changed(handle, change)
        table = self.sb.table
        for (node, name), kinds in names.items():
            if table.nodes.get(node.id) is node:
                below = self._name_changed(node, name, kinds)
                if below is not None:
                    self._compare_below(below)
            if table.over_budget():  # events come without requests, too
                table.trim()

    def _sort(self, place: _Place, change: Change, names: dict[tuple[Dir, bytes], int]) -> None:
        node, name = place.node, change.name
        if change.kinds & GONE:
            entry = self._watched.get(node.id)
            if entry is not None and entry.node is node:
                entry.watches.pop(place.index, None)
                if node.layer(place.index) is not None and not node.dead:
                    self.distrust(node)
            return
        if name.startswith(whiteout.RESERVED):
            if name != whiteout.OPAQUE:
                return
            name = b""
        elif name.startswith(whiteout.PREFIX):
            name = name[len(whiteout.PREFIX) :]
        if name:
            key = (node, name)
        elif node.parent is not None:
            key = (node.parent, node.name)
        else:
            key = (node, b"")
        names[key] = names.get(key, 0) | change.kinds

    def _file_changed(self, node: Node, change: Change) -> None:
        if change.kinds & GONE:
            self._files.pop(node.id, None)
        try:
            st = self.sb.stat(node)
        except OSError:
            if not node.dead:  # else removed through the mount, and the kernel knows
                self.notifier.attributes(node.id)
            return
        self._compare(node, st, change.kinds)

    def _name_changed(self, node: Dir, name: bytes, kinds: int) -> Dir | None:
        """Compare a name with what was recorded; update the view, then tell the kernel what it must forget.

        Returns the directory it stands for when its names have to be compared too (`_compare_below`).
        """
        try:
            return self._compare_name(node, name, kinds)
        except OSError as error:
            # ESTALE, EIO: believe nothing of it any more.
            log.debug("cannot resolve %r: %s", name, error)
            self.distrust(node)
            return None

    def _compare_name(self, node: Dir, name: bytes, kinds: int) -> Dir | None:
        if node.dead:
            return None  # removed through the mount: nothing is in it, and the kernel knows
        if not name:
            self._compare(node, self.sb.stat(node), kinds)
            return None
        if not node.trusted:
            return None  # nothing is cached of it
        if kinds & NAMES:
            node.note_stacked(name)
            if len(node.layers) > 1 and lookup.count_links(self.sb, node):
                self.notifier.attributes(node.id)
        child = node.children.get(name)
        if child is not None and not kinds & NAMES and self._content_changed(node, name, child, kinds):
            return None
        known_layers = [layer.identity for layer in child.layers] if type(child) is Dir else None
        found = lookup.resolve(self.sb, node, name)
        if child is not None and kinds & NAMES and node.negatives is not None and name in node.negatives:
            # A listing came across the name before its event, and it did not fit into a reply.
            node.negatives.discard(name)
            self.notifier.expire(node.id, name)
        # Whether a listing that the kernel may keep is another one now; of a known child, its identity says that.
        view = node.view
        listing = node.listed and kinds & NAMES and (view is None or name in view or found is not None)
        lookup.remember(node, name, found)
        if child is None and listing:
            self.tell_names(node)
        if found is None:
            if child is not None:
                self.sb.table.detach(child, node, name)
                self._tell_entry(node, name)
                self._tell_object(child)
            else:
                # The kernel knows nothing wrong of the name; the directory's times may be old.
                self._compare(node, self.sb.stat(node), kinds)
            return None
        if child is None:
            if not kinds & NAMES:
                self._echoes += 1  # neither positive nor, since it was created, negative in the kernel
                lookup.discard(self.sb, node, name, found)
                return None
            lookup.discard(self.sb, node, name, found)
            if node.negatives is not None and name in node.negatives:
                node.negatives.discard(name)
                self._tell_entry(node, name)
            else:
                self._compare(node, self.sb.stat(node), kinds)
            self._tell_link(found, kinds)
            return None
        if found.layers is not None:
            if type(child) is Dir and not child.dead and lookup.same_directory(child, found.layers):
                below = self._judge_layers(child, lookup.set_layers(self.sb, child, found, node.floor))
                if [layer.identity for layer in child.layers] == known_layers:
                    self._compare(child, self.sb.stat(child), kinds)
                return child if below else None
            lookup.discard(self.sb, node, name, found)
            self.sb.table.detach(child, node, name)
            self._tell_entry(node, name)
            self._tell_object(child)
            return None
        st = found.st
        same = child.kind == found.kind and not child.dead
        home = child.plink is not None and homes.leads(self.sb, node, name, found.branch, st, child.plink)
        if same and (child.identity == (st.st_dev, st.st_ino) or home):
            self._compare(child, self.sb.stat(child) if home else st, kinds)
            return None
        self.sb.table.detach(child, node, name)
        self._tell_entry(node, name)
        self._tell_object(child)
        return None

    def _content_changed(self, node: Dir, name: bytes, child: Node, kinds: int) -> bool:
        """Compare a file that keeps its name, without asking every branch; False when it may be another one by now."""
        if type(child) is Dir or child.dead or child.plink is not None:
            return False
        layer = node.layer(child.branch.index)
        if layer is None or layer.fd < 0:
            return False
        try:
            st = syscalls.stat_at(layer.fd, name)
        except OSError:
            return False
        if st.st_ino != child.ino or st.st_dev != child.dev or st_mod.S_IFMT(st.st_mode) != child.kind:
            return False
        self._compare(child, st, kinds)
        return True

    def _compare(self, node: Node, st: os.stat_result, kinds: int) -> None:
        """Attributes of a node that is what it was: tell the kernel only when they differ from what it was told."""
        if node.id not in self._sent:
            return  # the kernel has no attributes of it
        sent = self._sent[node.id]
        now = stamp(node, st)
        if now == sent and now is not None:
            self._echoes += 1
            return
        self._sent[node.id] = now
        if node.handles:
            note_id_bits(node, st)
        if node.handles and (sent is None or now is None or kinds & CONTENT or now[1:3] != sent[1:3]):
            self.notifier.data(node.id)
        else:
            self.notifier.attributes(node.id)

    def _tell_entry(self, node: Dir, name: bytes) -> None:
        self.notifier.entry(node.id, name)
        self.tell_names(node)

    def _tell_link(self, found: lookup.Found, kinds: int) -> None:
        """A new name of something that the kernel may know by another one: link(2) sends no event to that one."""
        if found.layers is None and found.st.st_nlink > 1:
            identity = (found.st.st_dev, found.st.st_ino)
            other = self.sb.table.nodes.get(self.sb.inomap.number(*identity))
            if other is not None and other.identity == identity:
                self._compare(other, found.st, kinds)

    def _tell_object(self, child: Node) -> None:
        """An object lost a name: whoever still has it open sees its new link count."""
        if child.id in self._sent:
            self._sent[child.id] = None
        self.notifier.attributes(child.id)

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
            self.tell_names(node)
            for name in list(node.children):
                below = self._name_changed(node, name, NAMES)
                if below is not None:
                    waiting.append(below)
            self.forget_negatives(node)

    def _on_overflow(self) -> None:
        """Events were lost: nothing that is cached can be believed.

        Every directory is asked again at its next use, which makes it trusted again.
        """
        self._overflows += 1
        log.warning("lost branch events (overflow %d); all caches dropped", self._overflows)
        self.drop_everything()

    def _drop_file(self, node: Node) -> None:
        super()._drop_file(node)
        self._sent.pop(node.id, None)

    # -- reporting ----------------------------------------------------------------------------

    def _set_state(self, state: str, message: str) -> None:
        if state != self._state:
            self._state = state
            log.log(logging.INFO if state == "healthy" else logging.WARNING, "coherence %s: %s", state, message)

    def state_of(self, branch: Branch) -> str:
        if super().mode_of(branch) != self.name:
            return "healthy"
        return "silent" if branch.index in self._silent else self._state

    def statistics(self) -> CoherenceStatistics:
        dirs = [node for node in self.sb.table.nodes.values() if type(node) is Dir]
        return CoherenceStatistics(
            mode=self.name,
            state=self._state,
            watches=0 if self._watcher is None else len(self._watcher),
            watch_limit=watch_limit(),
            degraded_directories=sum(not node.trusted for node in dirs),
            events=self._events,
            echoes=self._echoes,
            overflows=self._overflows,
        )
