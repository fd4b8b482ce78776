"""What the kernel knows: node id to node, lookup counts, parents and children.

A `Node` is one inode of the mount. Kernel lookup counts are raised by whoever hands an entry to the
kernel and lowered only by `forget` (libfuse, fuse_lowlevel.h: forget). A node leaves the table when
its count is zero, nothing is open on it and no known child needs it as parent. Directory nodes hold
O_PATH descriptors of their branch directories; their number is bounded, and descriptors are closed
only by `trim` and by a node's end, both between operations, so that an operation never loses one.

No I/O but closing descriptors, no locking: used from the event loop only.
"""

from __future__ import annotations

import os
import stat as st_mod
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sized
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from udbad.branch import syscalls
from udbad.branch.branches import Branch
from udbad.branch.state import Stamp
from udbad.errors import estale
from udbad.inodes import garbage
from udbad.inodes.garbage import MANY
from udbad.inodes.inomap import Identity
from udbad.inodes.record import DROPPED, Record
from udbad.types import ROOT_ID

if TYPE_CHECKING:
    from udbad.inodes.cunread import Unread
    from udbad.inodes.handles import OpenFile


Index = int
"""Of a branch."""

LOAD_AT_LEAST = 16
"""Questions about a directory's names, times its branches, that are never worth reading it."""


LEAST_FDS = 64
"""Descriptors that directories may have however many files are open: with fewer, each question would open its path."""


_PORTION_SECONDS = 0.0005
_PORTION = 64
"""Nodes."""

MAX_STACKED = 10_000
"""Names of one directory; with more, every question about one is asked of the branches."""


class Plink:
    """A pseudo-link: the copied-up home of a file whose other names are still on lower branches (semantics 10.3)."""

    __slots__ = ("branch", "counted", "dirfd", "identity", "links", "name", "pending", "source_dev", "source_ino")

    def __init__(
        self, branch: Branch, dirfd: int, name: bytes, identity: Identity, source_dev: int | None, source_ino: int,
        pending: int, links: int = 0, counted: bool = True,
    ) -> None:  # fmt: skip
        self.branch = branch
        self.dirfd = dirfd
        """The branch's .wh..wh.plnk directory, where the home is kept."""
        self.name = name
        """In that directory."""
        self.identity = identity
        """Of the home."""
        self.source_dev = source_dev
        """Device of the lower file it was copied from; None until that is recognised."""
        self.source_ino = source_ino
        """Inode number of that file."""
        self.pending = pending
        """How many names still live on lower branches only."""
        self.links = links
        """The most names that the lower file was seen to have."""
        self.counted = counted
        """False while `pending` is a guess, because an earlier mount made the pseudo-link."""


def unkept(fd: int) -> int:
    """A descriptor that may not be used, as its branch does not answer: a number below -1; and back."""
    return -2 - fd if fd != -1 else -1


Target = tuple[int, bytes]
"""Where the kernel was told that a symbolic link leads, and the ctime (ns) it had then; 0: another one may have it."""

XATTR_BITS = {
    b"security.capability": 1,
    b"security.selinux": 2,
    b"system.posix_acl_access": 4,
    b"system.posix_acl_default": 8,
}
"""Extended attributes that are asked for again and again (`ls -l`, each write), and hardly any file has."""


class Node:
    """One inode of the mount that is not a directory, or the common part of a directory."""

    __slots__ = (
        "aliases", "branch", "busy", "dead", "dev", "handles", "id", "ino", "kind", "lacks",
        "name", "nlink_extra", "nlookup", "orphan_fd", "parent", "place", "plink", "seen", "sent",
    )  # fmt: skip

    mtime_offset = 0
    ttl = 0.0

    def __init__(self, node_id: int, kind: int, branch: Branch, dev: int, ino: int) -> None:
        self.id = node_id
        """By which the kernel knows it, and st_ino."""
        self.kind = kind
        """File type bits of st_mode."""
        self.branch = branch
        """Where its data is."""
        self.dev = dev
        """With `ino`: who it is there."""
        self.ino = ino
        self.parent: Dir | None = None
        """With `name`: the name it was last reached by. None: of the root, and when no name is known."""
        self.name = b""
        self.nlookup = 0
        """References of the kernel; `InodeTable.refer` adds one."""
        self.place = 0
        """Where these are in the record (Record.count); 0: nowhere."""
        self.nlink_extra = 0
        """What is added to the st_nlink that the branch says."""
        self.dead = False
        """No name is left; only descriptors reach it."""
        self.aliases: set[tuple[Dir, bytes]] | None = None
        """All names, where a hard link has further ones."""
        self.handles: list[OpenFile] | None = None
        self.lacks: tuple[int, object] | None = None
        """Extended attributes that it was found not to have, as bits of XATTR_BITS, and the `Hooks.known_state` it had
        then."""
        self.plink: Plink | None = None
        """The pseudo-link its data is reached by."""
        self.orphan_fd = -1
        """Its copy without a name, made after the last one was removed; below -1: `unkept` of it."""
        self.busy: object = None
        """The copy-up of it that is under way, if there is one (edge/waiting.py)."""
        self.seen: Stamp | Target | None = None
        """Its state at the last open, or its target: what the kernel may keep pages of."""
        self.sent: Stamp | None = None
        """The state whose attributes the kernel may keep (coherence/sent.py); None: it was given none to keep."""
        garbage.pass_over(self)

    @property
    def identity(self) -> Identity:
        return (self.dev, self.ino)

    def is_dir(self) -> bool:
        return self.kind == st_mod.S_IFDIR

    def names(self) -> list[tuple[Dir, bytes]]:
        """Every (directory, name) this node is known by."""
        known = [] if self.parent is None else [(self.parent, self.name)]
        if self.aliases:
            known += [pair for pair in self.aliases if pair != (self.parent, self.name)]
        return known


class Layer:
    """One branch directory that is merged into a directory of the mount."""

    __slots__ = ("below", "branch", "dev", "fd", "ino", "nlink")

    def __init__(self, branch: Branch, dev: int, ino: int, nlink: int, fd: int) -> None:
        self.branch = branch
        self.dev = dev
        self.ino = ino
        self.nlink = nlink
        self.fd = fd
        self.below: bytes | None = None
        """The path from the root under which the branches below this one have it, where a redirect says so, here or
        on the way here. None: the one its parent's layer on this branch has there, and its name."""
        garbage.pass_over(self)

    @property
    def identity(self) -> Identity:
        return (self.dev, self.ino)


Number = int
"""A node id, or what the kernel says is one."""

Hit = int | tuple[int, ...]
"""What a view knows of a name: branch index of a non-directory, all branch indices of a directory."""


Listing = tuple[int, int, list[bytes] | None]
"""A snapshot of a directory: the position it begins at, how many names it has, and these unless they were let go."""

POSITIONS = (0, 1 << 31)
"""Within these are the positions in listings: more, and programs with an off_t of 32 bits get EOVERFLOW."""


class Dir(Node):
    """A directory of the mount."""

    __slots__ = (
        "cached_opens",
        "children",
        "floor",
        "hot",
        "layers",
        "listed",
        "listings",
        "load_at",
        "moved",
        "mtime_offset",
        "negatives",
        "offline",
        "opaque",
        "probes",
        "quiet",
        "resolved",
        "room",
        "stacked",
        "sure",
        "times",
        "trusted",
        "ttl",
        "version",
        "view",
    )

    def __init__(self, node_id: int, layers: list[Layer]) -> None:
        top = layers[0]
        super().__init__(node_id, st_mod.S_IFDIR, top.branch, top.dev, top.ino)
        self.layers = layers
        """Branch directories in visible range, top first (semantics 4.1)."""
        self.offline: list[Layer] | None = None
        """What it has, or may have, on branches that do not answer, top first. These are no `layers`, unless there is
        nothing else. An inode number of 0: not known whether it is there."""
        self.opaque: int | None = None
        """Index of the branch whose opaque mark ends the layers."""
        self.floor = 0
        """The lowest branch index at which something created here would be visible: opaque marks and whiteouts of this
        directory and its ancestors."""
        self.moved = False
        """A redirect says where some of its layers are, or would be: more than its parent and its name decides."""
        self.children: dict[bytes, Node] = {}
        """Nodes by the names they are known by here."""
        self.view: dict[bytes, Hit | None] | None = None
        """Merged names; None: not loaded. UNKNOWN entries have to be looked at again."""
        self.stacked: dict[bytes, None] | None = None
        """What else is in the layers: names that have a whiteout, or that are in several layers, or had or were
        since the view was loaded. None: it could be any. Mostly it is empty, and as a set three times as large."""
        self.negatives: set[bytes] | None = None
        """Names that the kernel was told not to exist, and may remember."""
        self.trusted = False
        """Layers and view may be used without asking the branches. Set by coherence/base.py alone."""
        self.ttl = 0.0
        """Seconds the kernel may keep entries of this directory. Set by coherence/base.py alone."""
        self.probes = 0
        """Branches asked for single names since the view was lost."""
        self.load_at = LOAD_AT_LEAST
        """How many of these cost less than loading the view."""
        self.hot = True
        """Used since its descriptors or watches were last looked at for some to give up."""
        self.listed = False
        """The kernel may have a listing."""
        self.mtime_offset = 0
        """Nanoseconds added to mtime so that the kernel looks again."""
        self.listings: tuple[Listing, ...] = ()
        """Snapshots that a position may belong to, newest last."""
        self.room = POSITIONS
        """Where positions of the next snapshot may lie."""
        self.cached_opens = 0
        """Handles that may be answered from the kernel's listing."""
        self.times: list[Stamp] | None = None
        """Of a directory that is not trusted: the times its branch directories had when it was last asked. None: they
        tell nothing."""
        self.quiet = False
        """Its branch directories are watched, and have the names they had when it was last asked, as of the last
        `Hooks.catch_up`. Set by union/times.py, taken away by coherence/silence.py and by whoever gives it other
        layers."""
        self.sure = -1
        """`Superblock.version` when it and every directory above it were seen to be quiet, with the layers that they
        have; no version has been given since when it is the same."""
        self.version = 0
        """A number that is raised when these differ."""
        self.resolved = -1
        """Its parent's `version` when its own layers were found."""

    def forget_names(self) -> None:
        """Drop what is known of the names in it. Whether its layers are trusted is another question."""
        self.view = None
        self.times = None
        self.quiet = False
        self.sure = -1
        self.resolved = -1

    def note_stacked(self, name: bytes) -> None:
        """A name got a whiteout, or came to be in several layers, or may have."""
        stacked = self.stacked
        if stacked is not None:
            stacked[name] = None
            if len(stacked) > MAX_STACKED:
                self.stacked = None

    def doubt(self, name: bytes) -> None:
        """A branch has under this name what the view does not know: whoever asks for it next, as the kernel will, must
        not be told what was before, in whatever mode."""
        if self.view is not None:
            self.view[name] = None
        self.note_stacked(name)

    def layer(self, index: Index) -> Layer | None:
        """The layer on the branch with this index, if the directory exists there."""
        layers = self.layers
        position = min(index, len(layers) - 1)  # sorted by branch: there, or above when some lack the directory
        while position >= 0:
            layer = layers[position]
            here = layer.branch.index
            if here <= index:
                return layer if here == index else None
            position -= 1
        return None


class TableStatistics(NamedTuple):
    nodes: int
    directories: int
    views: int
    view_names: int
    directory_fds: int


class Census:
    """What nodes there are. untrusted: directories."""

    __slots__ = ("directories", "untrusted", "view_names", "views")

    def __init__(self) -> None:
        self.directories = self.untrusted = self.views = self.view_names = 0

    def count(self, nodes: Iterable[Node]) -> None:
        """Add these."""
        directories = untrusted = views = view_names = 0
        for node in nodes:
            if type(node) is Dir:
                directory: Dir = node  # as compiled, that is quicker: there may be a million
                directories += 1
                untrusted += not directory.trusted
                if directory.view is not None:
                    views += 1
                    view_names += len(directory.view)
        self.directories += directories
        self.untrusted += untrusted
        self.views += views
        self.view_names += view_names


class InodeTable:
    """Node ids to nodes, and the references the kernel holds on them."""

    def __init__(self, root: Dir, max_fds: int, files: Sized = (), all_fds: int = sys.maxsize) -> None:
        """max_fds: how many directory descriptors may be held before `trim` closes cold ones; all_fds: how many
        together with those of the open `files`."""
        self.root = root
        self.nodes: dict[int, Node] = {ROOT_ID: root}
        self.open_fds = len(root.layers)
        self._max_fds = max_fds
        self._files = files
        self._all_fds = all_fds
        self.unread: Unread | None = None
        """Nodes that a predecessor knew and that are not in `nodes` yet. None: there are none."""
        self.doubted: Callable[[Node], object] | None = None
        """Called with each node that is asked for by its id; None: what is known of them is as it was."""
        self.record: Record | None = None
        """Where it is written what there is, and what changes; replaced by journal.py."""
        self._trim_below = 0
        """Number of nodes below which memory is given back; raised with the number there was."""
        self._fd_dirs: OrderedDict[int, Dir] = OrderedDict()
        """Directories whose descriptors may be closed, oldest first. (A dict would look for the first one through
        the places of all that were taken out before it.)"""

    def node(self, node_id: int) -> Node:
        """The node of an id the kernel gave us. Raises ESTALE for one it should not know any more."""
        node = self.find(node_id)
        if node is None:
            raise estale()
        return node

    def find(self, node_id: Number) -> Node | None:
        """The node of an id. Whoever has an id asks here, and not `nodes`: it may have to be made first."""
        node = self.nodes.get(node_id) if self.unread is None else self.unread.find(node_id)
        if self.doubted is not None and node is not None:
            self.doubted(node)
        return node

    def has(self, node_id: int) -> bool:
        return node_id in self.nodes or (self.unread is not None and self.unread.has(node_id))

    def read_some(self) -> bool:
        """Make some of the nodes that nobody has asked for yet, for half a millisecond; False when all are made."""
        if self.unread is None:
            return False
        until = perf_counter() + _PORTION_SECONDS
        with garbage.unsearched(lambda: len(self.nodes)):
            while self.unread is not None and perf_counter() < until:
                if not self.unread.some(_PORTION):
                    self.unread = None
        return self.unread is not None

    def read_all(self) -> None:
        """The same for all of them: who looks at nodes that he has no id of comes here first."""
        while self.read_some():
            pass

    def directory(self, node_id: Number) -> Dir:
        node = self.find(node_id)
        if type(node) is not Dir:
            raise estale()
        return node

    def changed(self, one: Node | Plink) -> None:
        """What the record says of a node, or of a home, is not so any more.

        To be called by whoever changes one of those that journal.py writes, but for the names, in the same operation.
        """
        if self.record is not None:
            self.record.changed.add(one)

    def refer(self, node: Node) -> None:
        """The kernel is about to get a reference on a node."""
        node.nlookup += 1
        record = self.record
        if record is not None:
            words = record.words
            if words is not None and node.place:
                words[node.place] = node.nlookup  # as Record.count, for this is a step of every lookup
            else:
                changed = record.changed
                changed.add(node)

    def add(self, node: Node) -> None:
        self.nodes[node.id] = node
        if self.record is not None:
            changed = self.record.changed
            changed.add(node)
        if len(self.nodes) > MANY and len(self.nodes) > 4 * self._trim_below:
            self._trim_below = len(self.nodes) // 4

    def add_file(self, node: Node, parent: Dir, name: bytes) -> Node:
        """Add a new node that is no directory, under a name that no node had."""
        node.parent, node.name = parent, name
        parent.children[name] = node
        self.add(node)
        return node

    def attach(self, node: Node, parent: Dir, name: bytes) -> None:
        """Record that (parent, name) is this node; an earlier node of that name lets go of it."""
        old = parent.children.get(name)
        if old is node:
            if type(node) is not Dir and (node.parent is not parent or node.name != name):
                node.parent, node.name = parent, name
                self.changed(node)
            return
        if old is not None:
            self.detach(old, parent, name)
        if node.parent is not None and (node.parent is not parent or node.name != name):
            if type(node) is Dir:
                # A directory has one name: it was moved.
                if node.parent.children.get(node.name) is node:
                    del node.parent.children[node.name]
                    self._release(node.parent)
            else:
                if not node.aliases:
                    node.aliases = {(node.parent, node.name)}
                node.aliases.add((parent, name))
        node.parent, node.name = parent, name
        parent.children[name] = node
        self.nodes.setdefault(node.id, node)  # it may have left the table with its last name
        self.changed(node)
        if type(node) is Dir:
            self._fd_dirs[node.id] = node  # it can be opened by name again, so `trim` may close it again

    def detach(self, node: Node, parent: Dir, name: bytes) -> None:
        """(parent, name) is not this node any more; another known name, if any, takes its place."""
        if parent.children.get(name) is node:
            del parent.children[name]
        if node.aliases:
            node.aliases.discard((parent, name))
        if node.parent is parent and node.name == name:
            if node.aliases:
                node.parent, node.name = next(iter(node.aliases))
            else:
                node.parent = None
        self.changed(node)
        self._release(parent)
        # A node that the kernel was never told of (or has forgotten) has nothing else to keep it.
        if node.parent is None:
            self._release(node)

    def forget(self, node_id: int, count: int) -> None:
        """The kernel dropped `count` references; FORGET of an id we do not have is ignored."""
        node = self.find(node_id)
        if node is None or node_id == ROOT_ID:
            return
        node.nlookup -= count
        if self.record is not None and (node.nlookup > 0 or node.handles or type(node) is Dir):
            self.record.count(node)  # else it leaves the table
        if node.nlookup <= 0:
            if type(node) is Dir:
                self._release_untold(node)
            self._release(node)
            if len(self.nodes) < self._trim_below:
                self._give_back()

    def _give_back(self) -> None:
        """Return freed memory to the system, after most of what was known has been forgotten, and of the rest again."""
        self._trim_below //= 8
        self.nodes = dict(self.nodes)  # a dictionary never shrinks by itself
        self._fd_dirs = OrderedDict(self._fd_dirs)
        self.on_shrink()
        garbage.give_back(len(self.nodes))

    def _release_untold(self, node: Dir) -> None:
        """Children the kernel was never told of must not keep a directory that it has forgotten.

        There are few: an entry that did not fit into a listing's reply, a replacement that an event led to.
        """
        for child in list(node.children.values()):
            if child.nlookup <= 0:
                if type(child) is Dir:
                    self._release_untold(child)
                self._release(child)

    def not_sent(self, node: Node) -> None:
        """The kernel does not get the entry that a node was made for: so it will never forget it."""
        if node.nlookup <= 0:
            if type(node) is Dir:
                self._release_untold(node)
            self._release(node)

    def release_handles(self, node: Node) -> None:
        """Called after the last open file of a node is gone."""
        if node.nlookup <= 0:
            self._release(node)

    def _release(self, node: Node | None) -> None:
        while node is not None and node.nlookup <= 0 and node.id != ROOT_ID and not node.handles:
            if type(node) is Dir:
                if node.children:
                    return
                self.close_layers(node)
            if self.nodes.get(node.id) is not node:
                return
            del self.nodes[node.id]
            record = self.record
            if record is not None:
                if record.words is not None and node.place:
                    record.words[node.place] = DROPPED  # as Record.drop
                else:
                    record.changed.add(node)
            self.on_drop(node)
            if node.orphan_fd >= 0:
                syscalls.close_quietly(node.orphan_fd)
                node.orphan_fd = -1
            parents = {parent for parent, _ in node.names()}
            for parent, name in node.names():
                if parent.children.get(name) is node:
                    del parent.children[name]
            node.aliases = None
            last = node.parent
            node.parent = None
            for parent in parents:
                if parent is not last:
                    self._release(parent)
            node = last

    def on_drop(self, node: Node) -> None:
        """A node left the table; replaced by the coherence strategy, which holds watches for it."""

    def on_shrink(self) -> None:
        """Most nodes have left the table; replaced as above."""

    # -- directory descriptors ----------------------------------------------------------------

    def note_fds(self, node: Dir) -> None:
        """Directory descriptors were opened for this node."""
        self.changed(node)
        self._fd_dirs[node.id] = node
        node.hot = True

    def close_layers(self, node: Dir) -> None:
        self._fd_dirs.pop(node.id, None)
        for layer in node.layers:
            if layer.fd >= 0:
                self.close_layer(layer)

    def close_layer(self, layer: Layer) -> None:
        """Close the descriptor of one branch directory; `Superblock.layer_fd` opens it again."""
        os.close(layer.fd)
        layer.fd = -1
        self.open_fds -= 1

    def over_budget(self) -> bool:
        """Whether `trim` is due. Asked before each request, so that it does not matter which operation opened them."""
        return self.open_fds > self._max_fds or self.open_fds + len(self._files) > self._all_fds

    def trim(self) -> None:
        """Close descriptors of directories not used lately (second chance), the root's never.

        Precondition: no operation is under way that took a descriptor from a node.
        """
        self._close_cold(min(self._max_fds, max(self._all_fds - len(self._files), LEAST_FDS)))

    def shed(self) -> bool:
        """Close all that can be opened again, because no descriptor was to be had (EMFILE); False when there was none.

        Precondition as for `trim`.
        """
        before = self.open_fds
        self._close_cold(0)
        return self.open_fds < before

    def _close_cold(self, most: int) -> None:
        while self.open_fds > most and self._fd_dirs:
            node_id, node = self._fd_dirs.popitem(last=False)
            if node.hot:
                node.hot = False
                self._fd_dirs[node_id] = node
            else:
                self.close_idle(node)

    def close_idle(self, node: Dir) -> None:
        """Close the descriptors of a directory that can be opened again.

        Any other is all that is left of a directory that was removed or taken away, but is somebody's current one. It
        stays until the directory is forgotten, and is not looked at again, unless descriptors are opened for it.
        """
        self._fd_dirs.pop(node.id, None)
        if node.dead or node.parent is None:
            return
        for layer in node.layers:
            if layer.fd >= 0 and self.leads_back(node, layer):
                self.close_layer(layer)

    def leads_back(self, node: Dir, layer: Layer) -> bool:
        """Whether the name of a directory still leads to this branch directory; replaced by the tree, which can ask."""
        return True

    def census(self) -> Census:
        """Of all nodes, at once."""
        census = Census()
        census.count(self.nodes.values())
        return census

    def statistics(self, census: Census | None = None) -> TableStatistics:
        """census: of all nodes, where that was made already."""
        if census is None:
            census = self.census()
        nodes = len(self.nodes) if self.unread is None else max(len(self.nodes), len(self.unread))
        return TableStatistics(nodes, census.directories, census.views, census.view_names, self.open_fds)
