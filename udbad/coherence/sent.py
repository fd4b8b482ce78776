"""Which attributes the kernel was given with a time-out, so that it is told only when they are others by now.

One stamp a node is enough (`Node.sent`, of branch/state.py): an event, or a change of our own that comes back as one,
is compared with it. Event loop only.
"""

from __future__ import annotations

import os
import stat as st_mod
from typing import Final

from udbad.branch.state import lasting_stamp, same_content
from udbad.branch.syscalls import fstat, stat_at
from udbad.coherence.base import KernelNotifier
from udbad.inodes.handles import backing_id, note_id_bits, written_behind
from udbad.inodes.node import Dir, Node
from udbad.union.superblock import Superblock, is_object

Fd = int

UNKNOWN: Final = b""
"""As a stamp: the kernel may hold attributes, but whether they are still right cannot be told."""


class SentAttributes:
    __slots__ = ("_notifier", "_sb")

    def __init__(self, sb: Superblock, notifier: KernelNotifier) -> None:
        self._sb = sb
        self._notifier = notifier

    def is_as_sent(self, node: Dir, name: bytes) -> bool:
        """Whether a name, which no event says was made or removed, stands for what it did, with the attributes that the
        kernel was given of it, or that it has none of (as `compare`). False also when it takes more to know."""
        child = node.children.get(name)
        if type(child) is Dir:
            return node.trusted and not node.dead and self._is_directory_as_sent(child)
        if child is None or child.dead or child.plink is not None or not node.trusted:
            return False
        layer = node.layer(child.branch.index)
        if layer is None or layer.fd < 0 or node.dead:
            return False
        try:
            st = stat_at(layer.fd, name)
        except OSError:
            return False
        if not is_object(child, st):
            return False
        sent = child.sent
        return written_behind(child) if sent is None else lasting_stamp(child.branch, st) == sent

    def _is_directory_as_sent(self, node: Dir) -> bool:
        """The same of a directory whose names have changed, as each copy-up puts its times back."""
        if node.dead or not node.trusted:
            return False
        for layer in node.layers:
            if layer.branch.overlay or layer.branch.id in self._sb.redirecting:
                return False  # an attribute may have made it opaque, or say where it is below
        sent = node.sent
        top = node.layers[0]
        if sent is None or top.fd < 0:
            return sent is None
        return lasting_stamp(top.branch, fstat(top.fd)) == sent

    def compare(self, node: Node, st: os.stat_result, content: bool) -> bool:
        """Tell the kernel when the attributes of a node, which is what it was, differ from those it was given.

        st: its status now. content: whether its content may be another one although the stamp does not show it.
        True when they are the same, so that there was nothing to tell.
        """
        sent = node.sent
        if sent is None:
            return written_behind(node)  # the kernel has no attributes of it
        if node in self._sb.changing:
            return True  # by a thread of ours, whose end is recorded as an own change
        now = lasting_stamp(node.branch, st)
        if now == sent and now is not None:
            return True
        if written_behind(node):
            node.sent = None
            self._notifier.attributes(node.id)
            return False
        node.sent = now or UNKNOWN
        if node.handles:
            note_id_bits(node, st)
        if node.kind == st_mod.S_IFLNK:
            self._notifier.data(node.id)  # another one may have got its number, and the kernel keeps targets
            return False
        pages = type(node) is not Dir and (self._sb.kernel_opens or (node.handles and not backing_id(node)))
        if pages and (content or not sent or now is None or not same_content(now, sent)):
            self._notifier.data(node.id)
        else:
            self._notifier.attributes(node.id)
        return False

    def doubt(self, node: Node) -> None:
        """Whatever the kernel was given of a node, the next comparison finds a difference."""
        if node.sent is not None:
            node.sent = UNKNOWN

    def before_own(self, node: Node, fd: Fd) -> None:
        """Before an own change that will be recorded as sent: a foreign one not handled yet must not hide in it."""
        sent = node.sent
        if not sent:
            return
        try:
            now = lasting_stamp(node.branch, self._stat(node, fd))
        except OSError:
            return
        if now != sent:
            self._notifier.data(node.id)

    def own_data(self, node: Node, content: bool, st: os.stat_result | None, fd: Fd) -> None:
        """After an own change: the kernel knows the attributes that it has led to. Parameters: Hooks.own_data."""
        sent = node.sent
        if not sent:
            return
        now = None
        if not node.dead or node.handles:
            try:
                now = lasting_stamp(node.branch, self._stat(node, fd) if st is None else st)
            except OSError:
                pass
        if now is not None and not content and not same_content(now, sent) and type(node) is not Dir:
            self._notifier.data(node.id)  # only a foreign change can have done that
        node.sent = now or UNKNOWN

    def _stat(self, node: Node, fd: Fd) -> os.stat_result:
        """By descriptor where there is one: for each write of a big file, the name would have to be looked for."""
        return fstat(fd) if fd >= 0 else self._sb.stat(node)
