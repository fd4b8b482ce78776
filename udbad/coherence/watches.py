"""What is watched for udba=notify, and which directories go without when there are no more watches.

A directory is watched on every branch it is on, but for branches of mode none; a file only when it has several names.
Watches are the user's, of all programs together (fs.inotify.max_user_watches): a share is left to the others, and
when the rest is in use, directories that were not used lately make room. Nothing is decided here about what the kernel
may keep: a directory that loses its watches is handed to `on_lost`.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic

from udbad.branch import syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.coherence.inotify import watch_limit
from udbad.coherence.watcher import Change, Echo, Watch, Watcher, WatchLimit
from udbad.inodes.inomap import Identity
from udbad.inodes.node import Dir, Index, Layer, Node
from udbad.union import redirects
from udbad.union.superblock import Superblock

log = logging.getLogger(__name__)

_EVICT = 64
"""Directories that lose their watches at once when the limit is reached."""
_HEALED_SECONDS = 60.0
"""Without meeting the limit; directories that nobody uses any more may be without a watch for longer."""


class Place:
    """Handle of a directory watch: the branch directory of `node` on the branch with this index."""

    __slots__ = ("dev", "index", "ino", "node", "watch")

    def __init__(self, node: Dir, layer: Layer) -> None:
        self.node = node
        self.index = layer.branch.index
        self.dev, self.ino = layer.dev, layer.ino
        """Which branch directory is watched."""
        self.watch: Watch = b""
        """Set once it is."""


class Way:
    """Handle of the watch of a branch directory in which `name` is on the way to where a redirect says that `node` is
    on the branch with this index."""

    __slots__ = ("index", "name", "node")

    def __init__(self, node: Dir, index: int, name: bytes) -> None:
        self.node = node
        self.index = index
        self.name = name

    def __eq__(self, other: object) -> bool:
        return type(other) is Way and self.node is other.node and self.index == other.index and self.name == other.name

    __hash__ = None  # type: ignore[assignment]  # as Python has it for what is compared by its values


class Watched:
    """The watches of one directory. There may be a million: tuples, as one that is empty takes no memory."""

    __slots__ = ("node", "places", "ways")

    def __init__(self, node: Dir) -> None:
        self.node = node
        self.places: tuple[Place, ...] = ()
        """One for each branch on which it is watched."""
        self.ways: tuple[tuple[Watch, Way, Identity], ...] = ()
        """Of a directory that was moved: the watches, and what they are on, in the order they are passed."""

    def place(self, index: Index) -> Place | None:
        """That on the branch with this index."""
        for place in self.places:
            if place.index == index:
                return place
        return None

    def without(self, index: Index) -> tuple[Place, ...]:
        """All others."""
        return tuple([place for place in self.places if place.index != index])


class Watches:
    """The watches of one mount. Event loop only."""

    def __init__(self, sb: Superblock, mode_of: Callable[[Branch], str], on_lost: Callable[[Dir], None]) -> None:
        """mode_of: the coherence mode that applies to a branch. on_lost: called with each directory that had to give
        its watches away."""
        self.watcher: Watcher | None = None
        """None: no inotify instance was to be had, or it is closed."""
        self.directories: OrderedDict[int, Watched] = OrderedDict()
        """By node id; those that were passed over as used lately go to the end."""
        self.state = "healthy"
        """One of metrics.COHERENCE_STATES."""
        self._sb = sb
        self._mode_of = mode_of
        self._on_lost = on_lost
        self._files: dict[int, Watch] = {}
        """The watches of files, by node id."""
        self._without: set[int] = set()
        """Directories that have no watch because of the limit."""
        self._on_ways = True
        self._limited_at = 0.0
        self._refused = 0.0, 0
        """When the kernel refused a watch, and what the limit was then."""

    def __len__(self) -> int:
        return 0 if self.watcher is None else len(self.watcher)

    @property
    def handles(self) -> int:
        """How many directories and files are watched by way of their file system."""
        return 0 if self.watcher is None else self.watcher.handles

    def open(
        self,
        on_changes: Callable[[list[Change]], None],
        on_echoes: Callable[[list[Echo]], None],
        on_overflow: Callable[[], None],
    ) -> int:
        """Begin to watch, with the callbacks of `Watcher`; the descriptor to wait for, -1 when none is to be had."""
        try:
            sources = {self._source_of(branch) for branch in self._sb.branches.branches}
            self.watcher = Watcher(on_changes, on_echoes, on_overflow, sources)
            self.options_changed()
        except OSError as error:
            self._set_state("degraded", f"no inotify instance to be had ({error.strerror}); served as reval")
        return -1 if self.watcher is None else self.watcher.fd

    def close(self) -> None:
        if self.watcher is not None:
            self.watcher.close()
            self.watcher = None
        self.directories.clear()
        self._files.clear()

    def shrink(self) -> None:
        """Give back the room that many nodes have taken."""
        self._files = dict(self._files)
        self.directories = OrderedDict(self.directories)
        if self.watcher is not None:
            self.watcher.shrink()

    def _set_state(self, state: str, message: str) -> None:
        if state != self.state:
            self.state = state
            log.log(logging.INFO if state == "healthy" else logging.WARNING, "coherence %s: %s", state, message)

    def _source_of(self, branch: Branch) -> str:
        """How changes of a branch are heard of: its own option `watch`, else the mount's."""
        return branch.watch or self._sb.options.watch

    # -- directories --------------------------------------------------------------------------

    def cover(self, node: Dir) -> bool:
        """Have every layer of a directory watched that needs it; False when that cannot be, or is not enough yet."""
        watcher = self.watcher
        if watcher is None:
            return False
        entry = self.directories.get(node.id)
        if entry is not None and entry.node is not node:
            self._uncover(node.id)
            entry = None
        wanted = self._wanted(node)
        if wanted is None:
            return False
        if entry is None:
            entry = self.directories[node.id] = Watched(node)
        for place in entry.places:
            layer = wanted.get(place.index)
            if layer is None or (layer.dev, layer.ino) != (place.dev, place.ino):
                entry.places = entry.without(place.index)
                watcher.unwatch(place.watch, place)
        complete = True
        first = redirects.source(node)
        for index, layer in wanted.items():
            if entry.place(index) is not None:
                continue
            fd = self._sb.layer_fd(node, layer)
            place = Place(node, layer)
            watch = self._add(watcher, node, place, fd)
            if watch is None:
                self._uncover(node.id)
                return False
            place.watch = watch
            entry.places = (*entry.places, place)
            branch = layer.branch
            if not branch.whable or node.parent is None:
                continue
            if first is not None and index > first.branch.index:
                complete = False  # where a redirect leads, there may be less by now
            elif whiteout.opaque(fd, branch.overlay) != (node.opaque == index):
                complete = False  # an opaque mark came or went before the watch: its layers have to be found again
            elif not redirects.is_as_known(self._sb, node, layer):
                complete = False  # so did a redirect
        if (node.moved or entry.ways) and not self._cover_ways(watcher, entry):
            complete = False
        return complete

    def _cover_ways(self, watcher: Watcher, entry: Watched) -> bool:
        """Have the ways to where a directory is watched; False when they were not yet, and it has to be found again."""
        node = entry.node
        before, entry.ways = entry.ways, ()
        self._on_ways = True

        def visit(branch: Branch, fd: int, name: bytes) -> None:
            mode = self._mode_of(branch)
            if mode in ("reval", "leased"):  # a hint has the path on the branch, which leads here in no other way
                self._on_ways = False
            if mode != "notify" or not self._on_ways:
                return
            way = Way(node, branch.index, name)
            watch = self._add(watcher, node, way, fd)
            if watch is None:
                self._on_ways = False
                return
            st = os.fstat(fd)
            entry.ways = (*entry.ways, (watch, way, (st.st_dev, st.st_ino)))

        try:
            redirects.visit_ways(self._sb, node, visit)
        finally:
            for watch, way, _ in before:
                watcher.unwatch(watch, way)
        return self._on_ways and before == entry.ways

    def _wanted(self, node: Dir) -> dict[int, Layer] | None:
        """The layers that need a watch, by branch index; None when events would not tell of all there are."""
        wanted = {}
        for layer in node.layers:
            mode = self._mode_of(layer.branch)
            if mode == "reval":
                return None
            if mode == "notify":
                wanted[layer.branch.index] = layer
        return wanted

    def _add(self, watcher: Watcher, node: Dir, handle: Place | Way, fd: int) -> Watch | None:
        for attempt in range(2):
            try:
                watch = watcher.watch_directory(fd, handle, self._source_of(self._sb.branches[handle.index]))
                if self.state == "limited":
                    self._got_one(node)
                return watch
            except WatchLimit:
                self._no_room(watcher)
                if attempt or not self._evict(node):
                    self._without.add(node.id)
                    return None
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EACCES, errno.ENOTDIR):
                    raise
                return None
        return None

    def _uncover(self, node_id: int) -> None:
        entry = self.directories.pop(node_id, None)
        if entry is not None and self.watcher is not None:
            for place in entry.places:
                self.watcher.unwatch(place.watch, place)
            for watch, way, _ in entry.ways:
                self.watcher.unwatch(watch, way)

    def expect(self, node: Dir, index: Index, name: bytes, event: Index) -> None:
        """A system call of ours has sent this event (`Hooks.own_event`), on the branch with this index."""
        entry: Watched | None = self.directories.get(node.id)
        if entry is None or entry.node is not node or self.watcher is None:
            return
        place: Place | None = entry.place(index)
        if place is not None:
            self.watcher.expect(place.watch, event, name)

    def gone(self, place: Place) -> bool:
        """The kernel has dropped a watch (IN_IGNORED); whether what it was on is still a layer of its directory."""
        node = place.node
        entry = self.directories.get(node.id)
        if entry is None or entry.node is not node:
            return False
        entry.places = entry.without(place.index)
        return node.layer(place.index) is not None and not node.dead

    def forget(self, node: Node) -> None:
        """The node has left the table."""
        if type(node) is Dir:
            self._without.discard(node.id)
            entry = self.directories.get(node.id)
            if entry is not None and entry.node is node:
                self._uncover(node.id)
        watch = self._files.pop(node.id, None)
        if watch is not None and self.watcher is not None:
            self.watcher.unwatch(watch, node)

    # -- files --------------------------------------------------------------------------------

    def cover_file(self, node: Node) -> bool:
        """Have a file watched itself; False when that begins only now, so that what was read of it may be old."""
        if node.id in self._files:
            return True
        if self.watcher is None or len(self._files) > self.watcher.room // 4:
            return False
        try:
            dirfd, name = self._sb.locate(node)
            fd = syscalls.pin_at(dirfd, name)
        except OSError:
            return False
        try:
            self._files[node.id] = self.watcher.watch_file(fd, node, self._source_of(node.branch))
        except (WatchLimit, OSError):
            pass
        finally:
            os.close(fd)
        return False

    def file_gone(self, node: Node) -> None:
        """The kernel has dropped the watch of a file."""
        self._files.pop(node.id, None)

    # -- the limit ----------------------------------------------------------------------------

    def options_changed(self) -> None:
        if self.watcher is not None:
            self.watcher.room = watch_limit() - self._reserve()

    def _reserve(self) -> int:
        """Watches that are left to other programs of the user: one limit is for all of them together."""
        return watch_limit() * self._sb.options.watch_reserve // 100

    def _no_room(self, watcher: Watcher) -> None:
        """A watch was refused, by the kernel or because the reserve begins."""
        self._limited_at = monotonic()
        self._set_state("limited", f"watch limit reached at {len(watcher)}; the rest is served as reval")
        limit = watch_limit()
        if len(watcher) < watcher.room:
            # Others have the rest. What they may still want is for us to give back.
            self._refused = self._limited_at, limit
            watcher.room = max(len(watcher) - self._reserve(), 0)
        elif self._limited_at - self._refused[0] > _HEALED_SECONDS or limit != self._refused[1]:
            self.options_changed()  # there may be more by now

    def _got_one(self, node: Dir) -> None:
        """A directory got a watch after the limit was met; one that somebody else gave back is not the end of it."""
        self._without.discard(node.id)
        if not self._without or monotonic() - self._limited_at > _HEALED_SECONDS:
            self._without.clear()
            self._set_state("healthy", "there are watches again")

    def _evict(self, keep: Dir) -> bool:
        """Take the watches of directories that were not used lately; a second chance for those that were. What is
        watched by way of its file system makes no room."""
        evicted = 0
        for _ in range(2 * len(self.directories)):
            node_id, entry = next(iter(self.directories.items()))
            node = entry.node
            watches = [place.watch for place in entry.places] + [way[0] for way in entry.ways]
            gives = any(isinstance(watch, int) for watch in watches)
            if node.hot or not gives or node is self._sb.root or _is_above(node, keep):
                node.hot = False
                self.directories.move_to_end(node_id)
                continue
            self._uncover(node_id)
            self._without.add(node_id)
            self._on_lost(node)
            evicted += 1
            if evicted >= _EVICT:
                break
        return evicted > 0


def _is_above(node: Dir, other: Dir) -> bool:
    """Whether `node` is `other`, or a directory on the way to it."""
    current: Dir | None = other
    while current is not None:
        if current is node:
            return True
        current = current.parent
    return False
