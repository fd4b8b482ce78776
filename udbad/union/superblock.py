"""The state that all operations of one mount share, and how branch objects are reached from nodes.

`Superblock` owns the branch set, the inode table, the inode numbers, the policies, and what tells the
coherence strategy of changes. Nothing here decides what is visible; that is resolve.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from udbad.branch import redirect, syscalls
from udbad.branch.branches import Branch, BranchSet
from udbad.branch.policy import CopyUpPolicy, CreatePolicy
from udbad.branch.syscalls import fstat, stat_at
from udbad.errors import GONE, NO_DIRECTORY, eio, estale
from udbad.inodes.handles import HandleTable
from udbad.inodes.inomap import InoMap
from udbad.inodes.node import Dir, Layer, Node, Plink
from udbad.inodes.slot import Slot
from udbad.inodes.table import InodeTable
from udbad.types import ROOT_ID, Trigger
from udbad.union.changes import Changes


class NeedCopyUp(Exception):
    """The operation needs `node` on a writable branch first: copy it up, then start it again."""

    def __init__(
        self,
        node: Node,
        trigger: Trigger,
        length: int | None = None,
        name: tuple[Dir, bytes] | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(node.id, trigger)
        self.node = node
        self.trigger = trigger
        self.length = length
        """How many bytes of content are wanted, for a copy-up that a truncation caused; None: all."""
        self.name = name
        """The name that must exist above, where it matters which of a node's names that is."""
        self.limit = limit
        """The largest branch index at which the copy would do."""
        self.then: Callable[[], Any] | None = None
        """What is left to do where the copy is the whole operation, which must not be started again then; returns what
        the operation would have."""
        self.prepare: Callable[[int], object] | None = None
        """What the operation does to the copy of a regular file, given a descriptor of it, before that has its name: so
        nobody sees it without, and no event tells of it (one of a file that had no name does not say which it has now).
        Raises OSError, and there is no copy then. Where nothing was copied, neither this nor `then` is called."""


class UnionOptions(NamedTuple):
    """The mount options that change what the union does (config.MountOptions has them all)."""

    create: CreatePolicy
    copyup: CopyUpPolicy
    read_only: bool = False
    plink: bool = True
    show_whiteouts: bool = False
    dirwh: int = 3
    watch_reserve: int = 10
    watch: str = "inotify"
    opaque_always: bool = False
    sum_space: bool = False
    acl: bool = True
    xattrs: bool = True
    labels: bool = False
    direct_io: bool = True
    fsync_copyup: bool = True
    dirren: str = "off"
    volatile: bool = False


LAST_DEPTH = 63
"""Lookups that asked this many branches or more are counted together."""


class Counters:
    """Plain counters that metrics read at scrape time; index of depths is branches examined."""

    __slots__ = ("depth_found", "depth_negative", "depth_whiteout")

    def __init__(self) -> None:
        self.depth_found = [0] * (LAST_DEPTH + 1)
        self.depth_negative = [0] * (LAST_DEPTH + 1)
        self.depth_whiteout = [0] * (LAST_DEPTH + 1)


class Notes(Protocol):
    """Who notes, where a crash cannot reach it, what is about to be done (edge/once.py), but for `Slot.intend`."""

    def publish(
        self, node: Node, parent: Dir | None, name: bytes, branch: Branch, made: os.stat_result, as_link: bool,
        names: int, links: int,
    ) -> None:  # fmt: skip
        """The next system call gives a copy of a node, of status `made`, its name on a branch. Arguments as those of
        settle.settle."""


def is_object(node: Node, st: os.stat_result) -> bool:
    """Whether `st` is the status of the object behind a node that is no directory.

    A number may have come round as an object of another type, which would spoil the kernel's inode.
    """
    dev, ino, kind = st.st_dev, st.st_ino, st.st_mode & 0o170000
    return ino == node.ino and dev == node.dev and kind == node.kind


def lower_links(layers: list[Layer]) -> int:
    """What the layers below the top one add to st_nlink: one for each subdirectory (semantics 4.3)."""
    return sum(max(layer.nlink - 2, 0) for layer in layers[1:])


class Superblock:
    """One mounted union. Event loop only; see union/fs.py for the locking rule."""

    def __init__(self, branches: BranchSet, options: UnionOptions, max_fds: int, all_fds: int = sys.maxsize) -> None:
        """max_fds: how many descriptors of directories may be held; all_fds: with those of open files."""
        self.branches = branches
        """Swapped whole when the branches are changed (reconfigure.py)."""
        self.options = options
        self.inomap = InoMap(len({branch.dev for branch in branches.branches}))
        self.handles = HandleTable()
        self.counters = Counters()
        self.plinks: dict[int, list[Plink]] = {}
        """By the inode number, on its own file system, of the home, and of the lower file that it was copied from."""
        self.plink_fds: dict[int, int] = {}
        """Branch id to the descriptor of its .wh..wh.plnk directory."""
        self.warned: set[tuple[int, bytes]] = set()
        """(node id, name) of which the log has said that it is beside its own whiteout."""
        self.trash: list[tuple[Branch, int, bytes]] = []
        """Branch directories out of sight that the background has to remove: (parent descriptor, name)."""
        self.held: dict[Node, tuple[int, float]] = {}
        """Objects that somebody is about to ask for, by an O_PATH descriptor of each (held.py), and until when."""
        self.changing: set[Node] = set()
        """Files whose content a thread is changing for us (ranges.py)."""
        self.kernel_opens = False
        """The kernel opens files without telling (io=cached): any that it knows may be open."""
        self.in_doubt = 0
        """How many `carrying` are under way."""
        self.slot: Slot | None = None
        """Told before each system call that cannot be repeated; None: nobody goes on after a crash."""
        self.notes: Notes | None = None
        """Told before each publication of a copy, likewise."""
        self.redirect_key = redirect.key()
        self.redirecting: set[int] = set()
        """Ids of the branches whose directories may say where they are below."""
        self.bad_redirects = 0
        """How many redirects were met that lead nowhere for what they say."""
        self._free: dict[int, tuple[float, int]] = {}
        self.version = 0
        """The last one that `next_version` has given."""
        layers, offline = [], []
        for branch in branches.branches:
            if branch.offline:
                offline.append(Layer(branch, branch.dev, 0, 0, -1))
                continue
            st = os.fstat(branch.root_fd)
            self.inomap.number(st.st_dev, st.st_ino)  # file systems are numbered in branch order
            layers.append(Layer(branch, st.st_dev, st.st_ino, st.st_nlink, branch.root_fd))
        root = Dir(ROOT_ID, layers or offline)
        root.offline = offline or None
        root.nlink_extra = lower_links(layers)
        root.floor = len(branches) - 1
        root.nlookup = 1
        self.root = root
        self.ask_redirects()
        for layer in layers:
            self.inomap.alias(layer.dev, layer.ino, ROOT_ID)
        self.table = InodeTable(root, max_fds, self.handles.files, all_fds)
        self.table.leads_back = self._leads_back  # type: ignore[method-assign]  # so that the table asks no branch
        self.inomap.in_use = self.table.has
        self.changes = Changes(self)
        """Whoever changes a name or an object, or finds it changed, says so here."""

    def next_version(self) -> int:
        """For Dir.version: no two directories ever have the same, so none is taken for another one's."""
        self.version += 1
        return self.version

    def ask_redirects(self) -> None:
        """See which branches may have redirects: the set of branches is another one."""
        self.redirecting = {
            branch.id
            for branch in self.branches.answering
            if branch.whable and (branch.overlay or redirect.may_have(branch.root_fd))
        }

    # -- reaching branch objects --------------------------------------------------------------

    def layer_fd(self, node: Dir, layer: Layer) -> int:
        """The O_PATH descriptor of a branch directory, re-opened by name when it was trimmed.

        Raises ESTALE when the name does not lead there any more, EIO on a branch that does not answer.
        """
        if layer.fd >= 0:
            return layer.fd
        if layer.branch.offline:
            raise eio()
        missing = [(node, layer)]
        parent = node.parent
        while True:
            # Downwards from the nearest ancestor that is open; not recursive: trees may be deep.
            if parent is None:
                raise estale()
            above = parent.layer(layer.branch.index)
            if above is None:
                raise estale()
            if above.fd >= 0:
                break
            missing.append((parent, above))
            parent = parent.parent
        fd = above.fd
        passed: Layer | None = None
        for child, child_layer in reversed(missing):
            try:
                fd = syscalls.open_dir_at(fd, child.name)
            except NO_DIRECTORY:
                raise estale() from None
            st = os.fstat(fd)
            if (st.st_dev, st.st_ino) != child_layer.identity:
                os.close(fd)
                raise estale()
            child_layer.fd = fd
            self.table.open_fds += 1
            self.table.note_fds(child)
            if passed is not None and self.table.over_budget():
                self.table.close_layer(passed)  # the way down must not cost more than there are; nobody has it yet
            passed = child_layer
        return fd

    @staticmethod
    def _leads_back(node: Dir, layer: Layer) -> bool:
        """Whether `layer_fd` would find a branch directory again: not where a redirect leads. Goes by its own "..", as
        its parent's descriptor may be closed already; that has been looked at when it was."""
        above = None if node.parent is None else node.parent.layer(layer.branch.index)
        try:
            return above is not None and syscalls.is_entry(layer.fd, node.name, above.identity)
        except OSError:
            return False

    @property
    def plink(self) -> bool:
        """Whether names of a file that is copied up are kept together by pseudo-links."""
        return self.options.plink and self.branches.may_plink

    def branch_fd(self, node: Dir, branch: Branch) -> int:
        """The descriptor of a directory on a branch where it exists; ESTALE where it does not, EIO if nobody knows."""
        layer = node.layer(branch.index)
        if layer is None:
            raise eio() if branch.offline else estale()
        return self.layer_fd(node, layer)

    def count_links(self, node: Dir) -> bool:
        """A branch directory of this one got or lost a subdirectory: see how many there are now. True when it shows."""
        layers = node.layers
        if len(layers) == 1:
            return False
        for layer in layers[1:]:
            try:
                layer.nlink = os.fstat(self.layer_fd(node, layer)).st_nlink
            except OSError:
                pass  # gone from where it was; as it was last seen, then
        before, node.nlink_extra = node.nlink_extra, lower_links(layers)
        if node.nlink_extra == before:
            return False
        self.table.changed(node)
        return True

    def locate(self, node: Node) -> tuple[int, bytes]:
        """(directory descriptor, name) of a non-directory's data. Raises ESTALE when no name is known."""
        if node.plink is not None:
            return node.plink.dirfd, node.plink.name
        if node.parent is None or node.dead:
            raise eio() if node.branch.offline else estale()
        return self.branch_fd(node.parent, node.branch), node.name

    def stat(self, node: Node) -> os.stat_result:
        """Attributes of the object behind a node, not of whatever has its name now.

        Raises ESTALE when neither a descriptor nor a name leads there; the kernel then looks the path up again.
        """
        fd = self.held_fd(node)
        if fd >= 0:
            return fstat(fd)
        while True:
            try:
                dirfd, name = self.locate(node)
                st = stat_at(dirfd, name)
            except OSError as error:
                if error.errno not in GONE:
                    raise
            else:
                if is_object(node, st):
                    return st
            self.lost_name(node)

    def open_object(self, node: Node) -> tuple[int, bool]:
        """A descriptor (O_PATH perhaps) of the object behind a node, never of whatever has its name now.

        Also whether it is the caller's to close. Raises ESTALE as `stat`.
        """
        fd = self.held_fd(node)
        if fd >= 0:
            return fd, False
        while True:
            try:
                fd = syscalls.pin_at(*self.locate(node))
            except OSError as error:
                if error.errno not in GONE:
                    raise
            else:
                if is_object(node, fstat(fd)):
                    return fd, True
                os.close(fd)
            self.lost_name(node)

    def held_fd(self, node: Node) -> int:
        """A descriptor of the object that is open anyway; -1 without one."""
        if type(node) is Dir:
            return self.layer_fd(node, node.layers[0])
        if node.orphan_fd >= 0:
            return node.orphan_fd
        if node.handles:
            return node.handles[-1].fd
        return self.held[node][0] if self.held and node in self.held else -1

    def let_go(self, node: Node) -> None:
        """Close what is held of a node, if anything is."""
        if node in self.held:
            os.close(self.held.pop(node)[0])

    def lost_name(self, node: Node) -> None:
        """The node's name stands for another object or for none: go on with another one. Raises ESTALE without one."""
        if node.parent is None or not node.aliases:
            raise estale()
        self.changes.lost(node, node.parent, node.name)

    def move_data(self, node: Node, branch: Branch, st: os.stat_result, fd: int) -> None:
        """From now on the data of a node that is no directory is another object, and its open files go there with it.

        At once, while that object can be reached for certain: its name may be the next thing to go, and natively
        open files and mappings outlive that. st: the object's status. fd: a descriptor of it, of a regular file.
        """
        self.let_go(node)
        node.lacks = None
        node.branch, node.dev, node.ino = branch, st.st_dev, st.st_ino
        self.table.changed(node)
        for handle in node.handles or ():
            handle.reopen(fd, branch.writable)

    # -- what is carried between branches ----------------------------------------------------------

    @contextmanager
    def carrying(self) -> Iterator[None]:
        """While objects are moved down behind the union's names, `Dir.stacked` is not kept, and not believed."""
        self.in_doubt += 1
        try:
            yield
        finally:
            self.in_doubt -= 1
            for node in self.table.nodes.values():
                if type(node) is Dir:
                    node.stacked = None

    # -- space --------------------------------------------------------------------------------

    def free_bytes(self, index: int, max_age: float) -> int:
        """Bytes available on a branch, at most `max_age` seconds old (semantics 7.2)."""
        now = time.monotonic()
        cached = self._free.get(index)
        if cached is not None and now - cached[0] < max_age:
            return cached[1]
        vfs = os.statvfs(syscalls.proc_path(self.branches[index].root_fd))
        free = vfs.f_bavail * vfs.f_frsize
        self._free[index] = (now, free)
        return free

    def forget_space(self) -> None:
        """Ask for free space again (branch indices have changed)."""
        self._free.clear()

    def free_reader(self, max_age: float) -> Callable[[int], int]:
        return lambda index: self.free_bytes(index, max_age)
