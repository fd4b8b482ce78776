"""What an operation did to the names and objects of the union: the one place that draws all consequences.

An operation changes a branch and then says here what it has done. In the one right order, the directory's view, the
inode table, the numbers of inodes and the coherence strategy follow. A view comes before the strategy, which may read
it; an event is announced before anything else that could fail; a link count is what is left after the change.

What was found rather than done, a direct change, is said here as well: `found`, `found_gone`, `lost`.
Nothing else in union/ and tools/ talks to the strategy. Event loop only, no system calls but for link counts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from udbad.branch.branches import Branch
from udbad.inodes.names import Hit
from udbad.inodes.node import Dir, Node
from udbad.types import MADE, MOVED_FROM, MOVED_TO, OF_DIRECTORY, REMOVED

if TYPE_CHECKING:
    from udbad.union.superblock import Superblock


class Hooks(Protocol):
    """What the coherence strategy is told (coherence/base.py has the full interface)."""

    by_times: bool
    """Whether a directory that is not trusted stays so, and need not be resolved while its times are the same."""

    def known_state(self, node: Node) -> object | None:
        """Something that is different after each change of others to this node's attributes that can be noticed.

        None where nobody would tell of one. Own changes may leave it as it is.
        """

    def catch_up(self) -> None:
        """Before a directory that is not trusted is asked: take `Dir.quiet` from those that others have changed."""

    def listen(self, node: Dir) -> bool:
        """Have `catch_up` tell from now on when others change the names of a directory; False when it cannot."""

    def adopt(self, node: Dir, changed: bool) -> None:
        """A directory's layers were resolved; set `trusted` and `ttl`. changed: they differ from before."""

    def dropped(self, node: Node) -> None:
        """The node left the table."""

    def shrink(self) -> None:
        """Most nodes have left the table: give back the room that what was held for them has taken."""

    def own_event(self, node: Dir, branch: Branch, name: bytes, event: int) -> None:
        """A system call of ours has changed a name in one branch directory.

        It succeeded, so that it has sent exactly one event, `event` (types.MADE and the like; of a directory,
        OF_DIRECTORY, too). What the name stands
        for now is told by `own_change`.
        """

    def own_change(self, node: Dir, name: bytes, st: os.stat_result | None = None, moved: bool = False) -> None:
        """An operation through the mount changed this name; the view is up to date already.

        st: attributes of what the name stands for now, if they are known. moved: a rename gave it to that.
        """

    def before_own(self, node: Node, fd: int = -1) -> None:
        """An operation through the mount is about to change content or times of this node.

        fd: a descriptor of it, if there is one.
        """

    def own_data(
        self, node: Node, content: bool = False, st: os.stat_result | None = None, fd: int = -1, mtime: bool = False
    ) -> None:
        """An operation through the mount changed attributes of this node; content: or content, or times.

        st: its attributes now, if they are known. fd: a descriptor of it, if there is one. mtime: it was set.
        """

    def drop_dentry(self, node: Dir, name: bytes, lost: Node | None = None) -> None:
        """This name stands for another object than before, or for none, without an operation on it.

        A link left behind; or a direct change that was found before its event came, which then finds nothing to tell.
        lost: what had the name, and may be open still.
        """

    def drop_attributes(self, node: Node, soon: bool = False) -> None:
        """Attributes of this node changed without the kernel knowing (of a directory, by a copy-up).

        soon: they may be shown as they were for some milliseconds more.
        """


class _CatchUp(Protocol):
    def __call__(self) -> None: ...


class _Listen(Protocol):
    def __call__(self, node: Dir) -> bool: ...


class _KnownState(Protocol):
    def __call__(self, node: Node) -> object | None: ...


class _BeforeData(Protocol):
    def __call__(self, node: Node, fd: int = -1) -> None: ...


class _Data(Protocol):
    def __call__(
        self, node: Node, content: bool = False, st: os.stat_result | None = None, fd: int = -1, mtime: bool = False
    ) -> None: ...


class Changes:
    """The changes of one mount's union."""

    by_times: bool
    """As in `Hooks`."""
    known_state: _KnownState
    """As in `Hooks`."""
    catch_up: _CatchUp
    """As in `Hooks`, and so is the next. Without a step in between: it is called for each request."""
    listen: _Listen
    before_data: _BeforeData
    """Content or times of a node are about to be changed. Without a step in between: it is called for each write."""
    data: _Data
    """Content or attributes of a node were changed, as in `Hooks.own_data`."""

    def __init__(self, sb: Superblock) -> None:
        self._sb = sb
        self._table = sb.table
        self._inomap = sb.inomap
        self.hooks: Hooks

    def attach_hooks(self, hooks: Hooks) -> None:
        """Bind the coherence strategy; called once before the first operation and when the mode changes."""
        self.hooks = hooks
        self.by_times = hooks.by_times
        self.known_state = hooks.known_state
        self.catch_up = hooks.catch_up
        self.listen = hooks.listen
        self.before_data = hooks.before_own
        self.data = hooks.own_data
        self._table.on_drop = hooks.dropped  # type: ignore[method-assign]  # the table's callbacks
        self._table.on_shrink = hooks.shrink  # type: ignore[method-assign]

    # -- names that operations change ---------------------------------------------------------------

    def made(self, parent: Dir, name: bytes, hit: Hit, branch: Branch | None = None) -> None:
        """An object was made, for which there was nothing before; that it has its node, `updated` says next.

        hit: of the view. branch: where a system call of ours made it.
        """
        if branch is not None:
            self.hooks.own_event(parent, branch, name, MADE if type(hit) is int else MADE | OF_DIRECTORY)
        if parent.view is not None:
            parent.view[name] = hit

    def linked(self, node: Node, parent: Dir, name: bytes, sent: bool = False) -> None:
        """A file got a further name on the branch it is on; sent: by a system call of ours."""
        if sent:
            self.hooks.own_event(parent, node.branch, name, MADE)
        if parent.view is not None:
            parent.view[name] = node.branch.index
        self._table.attach(node, parent, name)
        self.hooks.own_change(parent, name)
        self.hooks.own_data(node)

    def removed(
        self, parent: Dir, name: bytes, node: Node | None, branch: Branch | None = None, whited: bool = False
    ) -> None:
        """A name was removed, which was one of `node`, and the last one of a directory.

        branch: from which a system call of ours took it. whited: a whiteout was made for the name.
        Of a file, what is left of its names is for `unlinked` to say.
        """
        if branch is not None:
            self.hooks.own_event(parent, branch, name, REMOVED | OF_DIRECTORY if type(node) is Dir else REMOVED)
        if whited:
            parent.note_stacked(name)
        if parent.view is not None:
            parent.view.discard(name)
        if node is not None:
            self.replaced(parent, name, node)
            if type(node) is Dir and node.branch is not parent.branch:  # a status says how many the top one has
                self._sb.count_links(parent)
        self.hooks.own_change(parent, name)

    def replaced(self, parent: Dir, name: bytes, node: Node) -> None:
        """A name that is going to another object is not `node` any more. As in `removed`."""
        self._table.detach(node, parent, name)
        if type(node) is Dir:
            self._bury(node)

    def unlinked(self, node: Node, last: bool) -> None:
        """A file has a name less; last: it has none."""
        if last:
            self._bury(node)
        self.hooks.own_data(node)

    def _bury(self, node: Node) -> None:
        """No name is left. The branch may reuse the inode number as soon as no descriptor holds it."""
        node.dead = True
        self._table.changed(node)
        self._inomap.drop(node.dev, node.ino)

    def moved(self, node: Node, src_dir: Dir, src: bytes, dst_dir: Dir, dst: bytes, branch: Branch) -> None:
        """A system call of ours has renamed an object on `branch`. What has the names now, `updated` says next: of
        both for a directory, of the new one for a file."""
        if type(node) is Dir:
            self._table.attach(node, dst_dir, dst)
            return
        self.hooks.own_event(src_dir, branch, src, MOVED_FROM)
        self.hooks.own_event(dst_dir, branch, dst, MOVED_TO)
        self._table.detach(node, src_dir, src)
        self._table.attach(node, dst_dir, dst)
        # A file is on one branch, and what was below its old name has been hidden: no need to ask every branch again.
        if src_dir.view is not None:
            src_dir.view.discard(src)
        self.hooks.own_change(src_dir, src)

    def exchanged(self, src_node: Node, src_dir: Dir, src: bytes, dst_node: Node, dst_dir: Dir, dst: bytes) -> None:
        """Two names were exchanged. What has them now, `updated` says next."""
        self._table.detach(src_node, src_dir, src)
        self._table.detach(dst_node, dst_dir, dst)
        self._table.attach(src_node, dst_dir, dst)
        self._table.attach(dst_node, src_dir, src)

    def updated(
        self, parent: Dir, name: bytes, st: os.stat_result | None = None, links: bool = False, moved: bool = False
    ) -> None:
        """A name was looked up again after an operation on it; node and view have what was found, st its attributes.

        links: a directory came or went with it. moved: a rename gave the name to what it stands for.
        """
        if links:
            self._sb.count_links(parent)
        self.hooks.own_change(parent, name, st, moved)

    def copied_up(self, node: Node, parent: Dir, name: bytes, as_link: bool = False, event: int = MOVED_TO) -> None:
        """A system call of ours has put the data of a node that is no directory under this name of a branch above,
        where the node is now. as_link: that is a further name of it. event: as for `Hooks.own_event`.
        """
        self.hooks.own_event(parent, node.branch, name, event)
        parent.note_stacked(name)
        if parent.view is not None:
            parent.view[name] = node.branch.index
        if as_link:
            self._table.attach(node, parent, name)
        self.hooks.own_data(node)
        # Its names and times are what they were, but for ctime. To tell at once would cost each of many files that are
        # copied up one after the other as much as the copy does, and a request for the attributes.
        self.hooks.drop_attributes(parent, soon=True)

    def directory_copied_up(self, node: Dir, parent: Dir) -> None:
        """A directory was made on a further branch; its layers are the new ones."""
        parent.note_stacked(node.name)
        if parent.view is not None:
            parent.view[node.name] = tuple(layer.branch.index for layer in node.layers)
        self._sb.count_links(node)
        self._sb.count_links(parent)
        self.hooks.adopt(node, False)
        self.hooks.drop_attributes(node)
        self.hooks.drop_attributes(parent)

    # -- objects that operations change ---------------------------------------------------------------

    def attributes(self, node: Node) -> None:
        """A request changed attributes of which the kernel does not know that they change with it."""
        self.hooks.drop_attributes(node)

    def behind(self, node: Node, content: bool = False) -> None:
        """A node was changed behind the kernel's back, by us: the state it has now is ours. content: or times."""
        self.hooks.own_data(node, content)
        self.hooks.drop_attributes(node)

    # -- what was found --------------------------------------------------------------------------------

    def resolved(self, node: Dir, changed: bool) -> None:
        """A directory's layers were resolved, as in `Hooks.adopt`."""
        self.hooks.adopt(node, changed)

    def found(self, node: Node, parent: Dir, name: bytes) -> None:
        """A name stands for this node."""
        old = parent.children.get(name)
        above, before = node.parent, node.name
        self._table.attach(node, parent, name)
        if old is not None and old is not node:
            self.hooks.drop_dentry(parent, name, old)
        if type(node) is Dir and above is not None and (above is not parent or before != name):
            self.hooks.drop_dentry(above, before)  # moved directly; its event will find nothing to tell

    def found_gone(self, parent: Dir, name: bytes) -> None:
        """A name turned out to be gone: its node, if any, is not reachable by it any more."""
        node = parent.children.get(name)
        if node is not None:
            self.lost(node, parent, name)

    def lost(self, node: Node, parent: Dir, name: bytes) -> None:
        """A name of a node stands for another object, or for none: which, has to be looked up."""
        self._table.detach(node, parent, name)
        self.hooks.drop_dentry(parent, name, node)

    def mistaken(self, parent: Dir, name: bytes, old: Node | None = None) -> None:
        """The kernel takes a name for `old`, which had been replaced directly before the operation on it."""
        self.hooks.drop_dentry(parent, name, old)

    def left(self, node: Node) -> None:
        """Nothing of a node is on any branch of the mount. The caller has the kernel forget everything."""
        for parent, name in node.names():
            self._table.detach(node, parent, name)
        node.dead = True
        self._table.changed(node)
