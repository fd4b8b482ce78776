"""The control operation `published`: what was changed through this mount, for whoever tells other hosts of it.

Nothing is collected before somebody has asked: then this puts itself between the union and the coherence strategy
(union/changes.py), which all changes pass. A strategy that takes over does so without this in between; that is found at
the next question, and anything may have changed then.

Paths are those of the union, and so of each branch. On which branch something was changed is not told apart: a name too
many costs whoever hears of it a look.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from udbad.control.protocol import Message, checked_text, flag_of
from udbad.errors import ExitCode, UserError
from udbad.inodes.node import Dir, Node
from udbad.inodes.paths import lineage, path_in
from udbad.mount import rebranch

if TYPE_CHECKING:
    from udbad.inodes.handles import HandleTable
    from udbad.mount.mountproc import MountProcess
    from udbad.union.changes import Hooks

MOST_BYTES: Final = 1 << 20
"""Of paths that wait, with `_OVERHEAD` for each; then it is said that anything may have changed."""
_OVERHEAD: Final = 64
_WAIT: Final = 5.0
"""Seconds that a question waits for a change; who asks waits for twice as long."""
_ATTRIBUTES: Final = "modify,attrib"
_NAME: Final = f"move,{_ATTRIBUTES}"
_LINKED: Final = f"{_NAME},links"


class Collector:
    """The coherence strategy of a mount, as far as the union uses one, with an ear of our own."""

    def __init__(self, hooks: Hooks, handles: HandleTable, stat: Callable[[Node], os.stat_result]) -> None:
        """stat: the status of a node. Raises OSError."""
        self.boot = secrets.token_hex(8)
        """Another one: something may not have been collected."""
        self.some = trio.Event()
        """There is something to take."""
        self._paths: dict[bytes, str] = {}
        self._bytes = 0
        self._all = False
        self._last: Node | None = None
        """Of this node all is noted already."""
        self._written: dict[Node, None] = {}
        """Open files: a network file system may keep what was written until they are closed (nfs(5), close-to-open), so
        that others have to look once more then."""
        self._handles = handles
        self._stat = stat
        self._note_open()
        self._hooks = hooks
        self.by_times = hooks.by_times
        # What is only passed on, without a step in between.
        self.known_state: Any = hooks.known_state
        self.catch_up: Any = hooks.catch_up
        self.listen: Any = hooks.listen
        self.adopt: Any = hooks.adopt
        self.dropped: Any = hooks.dropped
        self.shrink: Any = hooks.shrink
        self.own_event: Any = hooks.own_event
        self.before_own: Any = hooks.before_own
        self.drop_dentry: Any = hooks.drop_dentry

    # -- as the union calls its strategy (union/changes.py, Hooks) -----------------------------------

    def own_change(self, node: Dir, name: bytes, st: os.stat_result | None = None, moved: bool = False) -> None:
        self._hooks.own_change(node, name, st, moved)
        self._last = None
        self._note_name(node, name, type(node.children.get(name)) is Dir)

    def own_data(
        self, node: Node, content: bool = False, st: os.stat_result | None = None, fd: int = -1, mtime: bool = False
    ) -> None:
        self._hooks.own_data(node, content, st, fd, mtime)
        self._note_node(node, False)

    def drop_attributes(self, node: Node, soon: bool = False) -> None:
        self._hooks.drop_attributes(node, soon)
        self._note_node(node, not soon)

    # -- what is noted -------------------------------------------------------------------------------

    def _note_name(self, parent: Dir, name: bytes, directory: bool) -> None:
        path = self._path(parent, name)
        if path is None:
            return
        self._note(path, _NAME)
        if directory:
            self._note(path + b"/", _NAME)

    def _note_node(self, node: Node, names: bool) -> None:
        """names: of a directory, with what is in it: it may have come to be on another branch, or that."""
        if self._all:
            return
        if type(node) is Dir:
            path = self._path(node, b"")
            if path is not None:
                self._note(path, _NAME if names else _ATTRIBUTES)
                if names:
                    self._note(path + b"/", _NAME)
            return
        if node is self._last:
            return
        self._last = node
        if node.handles:
            self._written[node] = None
        words = _LINKED if self._may_have_other_names(node) else _NAME
        for parent, name in node.names():
            path = self._path(parent, name)
            if path is not None:
                self._note(path, words)
        if node.parent is None and not node.dead:
            self.note_all()  # its name was lost by a direct change, and another one is not known

    def _may_have_other_names(self, node: Node) -> bool:
        """Whether others may know a file by a name that was never asked for here.

        By FUSE nobody learns that: sftp has no link counts. NFS has them from the answer to what was changed.
        """
        if node.aliases or node.branch.fs_type.startswith("fuse"):
            return True
        try:
            return self._stat(node).st_nlink > 1
        except OSError:
            return True

    def _path(self, parent: Dir, name: bytes) -> bytes | None:
        """Of a name, or of the directory itself; None: there is none, or others may have it under another one."""
        if any(type(node) is Dir and node.moved for node in lineage(parent)):
            self.note_all()  # by a redirect on a branch that others need not have
            return None
        path = path_in(parent)
        return None if path is None else b"/".join(filter(None, (path, name))) or b"."

    def _note(self, path: bytes, words: str) -> None:
        if self._all:
            return
        had = self._paths.get(path)
        if had is None:
            self._bytes += len(path) + _OVERHEAD
            if self._bytes > MOST_BYTES:
                self.note_all()
                return
        if had is None or len(words) > len(had):  # each has all words of the shorter ones
            self._paths[path] = words
        self.some.set()

    def note_all(self) -> None:
        """Anything may have changed. Nothing is kept from here on, as perhaps nobody asks any more."""
        self._paths.clear()
        self._written.clear()
        self._all = True
        self.some.set()

    def _note_open(self) -> None:
        """Whatever is open may have been written to."""
        self._written.update((handle.node, None) for handle in self._handles.files.values() if handle.writable)

    def take(self) -> tuple[bool, dict[bytes, str]]:
        """What has been changed since this was called last: whether that may be anything; paths, and what they may be
        about, in the words of `udbad feed`."""
        self._last = None
        for node in list(self._written):
            self._note_node(node, False)
            if not any(handle.writable for handle in node.handles or ()):
                del self._written[node]
        taken = self._all, self._paths
        if self._all:
            self._note_open()
        self._all, self._paths, self._bytes, self._last = False, {}, 0, None
        self.some = trio.Event()
        return taken


class Publishing:
    """That of one mount process."""

    def __init__(self, process: MountProcess) -> None:
        self._process = process
        self._collector: Collector | None = None

    async def published(self, request: Message) -> dict[str, Any]:
        """What was changed through the mount since this was asked last, by whoever it was: "all", it may be anything;
        "changes", paths as for `feed`. "wait": take nothing, but answer when there is something, or after some seconds.
        "boot" is another one than before when something may not have been collected. Raises UserError: one of
        "branches", by their paths, is written to by the kernel, which does not tell."""
        process = self._process
        wait = flag_of(request, "wait")
        for path in _paths_of(request):
            branch = await rebranch.find(process.sb.branches, os.fsencode(path))
            if branch.local and process.passthrough is not None:
                raise UserError(
                    f"{branch.describe()}: with io=passthrough nobody hears what is written: needs io=requests",
                    ExitCode.REFUSED,
                )
        collector = self._listening()
        if wait:
            with trio.move_on_after(_WAIT):
                await collector.some.wait()
            return {"boot": collector.boot}
        everything, paths = collector.take()
        return {
            "boot": collector.boot,
            "all": everything,
            "changes": [[os.fsdecode(path), words] for path, words in paths.items()],
        }

    def _listening(self) -> Collector:
        changes = self._process.sb.changes
        if self._collector is None or changes.hooks is not self._collector:
            if self._collector is not None:
                self._collector.some.set()
            self._collector = Collector(changes.hooks, self._process.sb.handles, self._process.sb.stat)
            changes.attach_hooks(cast("Hooks", self._collector))
        return self._collector


def _paths_of(request: Message) -> list[str]:
    """Raises UserError."""
    paths: Any = request.get("branches")
    if not isinstance(paths, list):
        raise UserError("branches must be a list of paths", ExitCode.OPTION)
    return [checked_text(path, "branches") for path in paths]
