"""Watches on branch directories for udba=reval, whose silence is proof: what nobody has reported has not changed.

inotify queues an event before the system call that caused it returns (fsnotify() in fs/notify/fsnotify.c is called by
vfs_create(), vfs_unlink(), vfs_rename() and the rest). So one poll(2) after a request has come tells whether any
direct change has returned before it was made, in all directories watched, however deep and on however many branches;
asking each of them is left for those that an event names. It takes no part of what reval promises away, which inotify
read a moment later, as in notify, would.

Names alone are watched: attributes and contents are asked for at each use anyway. Directories that are used again get
a watch; those that were watched first make room when there are too many. Event loop only.
"""

from __future__ import annotations

import errno
import logging
import select
from collections import OrderedDict
from typing import TYPE_CHECKING

from udbad.branch.branches import Branch
from udbad.coherence.inotify import GONE, watch_limit
from udbad.inodes.inomap import Identity
from udbad.inodes.node import Dir, Node
from udbad.types import Perm
from udbad.union.superblock import Superblock

if TYPE_CHECKING:
    from udbad.coherence.watcher import Change, Echo, Watch, Watcher

log = logging.getLogger(__name__)

_SHARE = 8
"""A mount takes at most this part of fs.inotify.max_user_watches, which are for all programs of the user."""


def tells(branch: Branch) -> bool:
    """Whether every change of a name on a branch, whoever makes it, is an event here."""
    return branch.local


class Silence:
    """The watches of one mount. Owns `Dir.quiet` of directories that are watched."""

    def __init__(self, sb: Superblock) -> None:
        self._sb = sb
        self._watched: OrderedDict[int, tuple[Dir, list[tuple[Watch, Identity]]]] = OrderedDict()
        """By node id: the directory, and its watches, each with the branch directory it is on; oldest first."""
        self._most = watch_limit() // _SHARE
        self._watcher: Watcher | None = None
        """None: nothing was to be watched yet, no inotify instance is to be had, or it is closed."""
        self._poll = select.poll()
        self._may_watch = True

    def __len__(self) -> int:
        return 0 if self._watcher is None else len(self._watcher)

    def catch_up(self) -> None:
        """Take notice of all that has happened up to now: `Dir.quiet` is right afterwards."""
        if self._watcher is not None and self._poll.poll(0):
            self._watcher.drain()

    def listen(self, node: Dir) -> bool:
        """Have a directory watched from now on; False when not every change to its names would be told."""
        watcher = self._start() if self._watcher is None else self._watcher  # an empty one is false
        if watcher is None:
            return False
        wanted = [layer for layer in node.layers if layer.branch.perm is not Perm.RR]
        known = self._watched.get(node.id)
        if known is not None:
            if known[0] is node and [one for _, one in known[1]] == [layer.identity for layer in wanted]:
                return True
            self._leave(node.id)
        if not all(tells(layer.branch) for layer in wanted):
            return False
        while self._watched and len(watcher) + len(wanted) > self._most:
            self._leave(next(iter(self._watched)))
        watches: list[tuple[Watch, Identity]] = []
        try:
            for layer in wanted:
                # A redirect is an attribute, and so is the opaque mark of overlayfs; that of aufs is a name.
                attributes = layer.branch.overlay or layer.branch.id in self._sb.redirecting
                watch = watcher.watch_names(self._sb.layer_fd(node, layer), node, attributes)
                watches.append((watch, layer.identity))
        except OSError as error:
            for watch, _ in watches:
                watcher.unwatch(watch, node)
            if error.errno == errno.ENOSPC:  # the others have them
                self._most = len(watcher) // 2
            return False
        self._watched[node.id] = node, watches
        return True

    def _start(self) -> Watcher | None:
        """Begin to watch, when the first directory is to be: a mount that is not used twice need not have the means."""
        if not self._may_watch:
            return None
        from udbad.coherence.watcher import Watcher

        try:
            self._watcher = Watcher(self._on_changes, self._on_echoes, self._on_overflow)
        except OSError as error:
            self._may_watch = False
            log.info("no inotify instance to be had (%s); directories are asked one by one", error.strerror)
            return None
        self._poll.register(self._watcher.fd, select.POLLIN)
        return self._watcher

    def expect(self, node: Dir, branch: Branch, name: bytes, event: int) -> None:
        """A system call of ours has sent this event (`Hooks.own_event`)."""
        known = self._watched.get(node.id)
        if known is None or known[0] is not node or self._watcher is None:
            return
        layer = node.layer(branch.index)
        for watch, identity in known[1]:
            if layer is not None and identity == layer.identity:
                self._watcher.expect(watch, event, name)

    def forget(self, node: Node) -> None:
        """The node has left the table."""
        known = self._watched.get(node.id)
        if known is not None and known[0] is node:
            self._leave(node.id)

    def shrink(self) -> None:
        """Give back the room that many watches have taken."""
        self._watched = OrderedDict(self._watched)
        if self._watcher is not None:
            self._watcher.shrink()

    def close(self) -> None:
        for node, _ in self._watched.values():
            node.quiet = False
        self._watched.clear()
        self._may_watch = False
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None

    def _leave(self, node_id: int) -> None:
        node, watches = self._watched.pop(node_id)
        self._stir(node)
        assert self._watcher is not None
        for watch, _ in watches:
            self._watcher.unwatch(watch, node)

    def _stir(self, node: Dir) -> None:
        if node.quiet:
            node.quiet = False
            self._sb.next_version()

    def _on_changes(self, changes: list[Change]) -> None:
        for node, _, kinds in changes:
            assert type(node) is Dir
            self._stir(node)
            if kinds & GONE and node.id in self._watched and self._watched[node.id][0] is node:
                self._leave(node.id)

    def _on_echoes(self, echoes: list[Echo]) -> None:
        pass  # the view has been brought up to date by whoever made the change

    def _on_overflow(self) -> None:
        for node, _ in self._watched.values():
            self._stir(node)
