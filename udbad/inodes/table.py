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
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sized
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from udbad.branch import datacalls
from udbad.errors import estale
from udbad.inodes import byid, garbage
from udbad.inodes.garbage import MANY
from udbad.inodes.node import Dir, Layer, Node, Plink
from udbad.inodes.record import DROPPED, Record
from udbad.types import ROOT_ID

if TYPE_CHECKING:
    from udbad.inodes.cunread import Unread

LEAST_FDS = 64
"""Descriptors that directories may have however many files are open: with fewer, each question would open its path."""


_PORTION_SECONDS = 0.0005
_PORTION = 64
"""Nodes."""

Number = int
"""A node id, or what the kernel says is one."""


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
        self.nodes = byid.ById()
        self.nodes.add(root)
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

    def node(self, node_id: Number) -> Node:
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
            if record.words is not None and node.place:
                record.words[node.place] = node.nlookup  # as Record.count, for this is a step of every lookup
            else:
                changed = record.changed
                changed.add(node)

    def add(self, node: Node) -> None:
        self.nodes.add(node)
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
        if self.nodes.get(node.id) is None:
            self.nodes.add(node)  # it may have left the table with its last name
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
        self.nodes = self.nodes.shrunk()
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
            self.nodes.remove(node)
            record = self.record
            if record is not None:
                if record.words is not None and node.place:
                    record.words[node.place] = DROPPED  # as Record.drop
                else:
                    record.changed.add(node)
            self.on_drop(node)
            if node.orphan_fd >= 0:
                datacalls.close_quietly(node.orphan_fd)
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
