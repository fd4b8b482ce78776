"""inotify on branch directories: the only module that knows trio-asyncio, and asyncinotify for branches.

A watch is put on the directory we opened, through /proc/self/fd, never on a path that may mean another
directory by now, and is mapped back by its watch object, never by path. Events are handed on in bursts: the
descriptor is waited for once, then drained synchronously, which is what keeps up with a busy tree. No decisions
here: what an event means is for notify.py, and the branch's state decides that.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

import trio
import trio_asyncio
from asyncinotify import Inotify, Mask, Watch

from udbad.branch import syscalls

log = logging.getLogger(__name__)

_DIRECTORY = (
    Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO | Mask.MODIFY | Mask.ATTRIB | Mask.CLOSE_WRITE
    | Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.ONLYDIR | Mask.EXCL_UNLINK
)  # fmt: skip
_FILE = Mask.MODIFY | Mask.ATTRIB | Mask.CLOSE_WRITE
_NAMES = Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO
_CONTENT = Mask.MODIFY | Mask.CLOSE_WRITE
_GONE = Mask.IGNORED | Mask.UNMOUNT
_READ_EVENTS = 256
"""How many full-size events one read(2) may bring."""

NAMES, CONTENT, ATTRIBUTES, GONE = 1, 2, 4, 8
"""What a change concerns, as bits."""

_BURST = 256

_SETTINGS = "/proc/sys/fs/inotify/"


class WatchLimit(Exception):
    """No more watches may be had (fs.inotify.max_user_watches, or memory)."""


@dataclass(slots=True)
class Change:
    """One event: the handle its watch was added with, the name inside a directory (b"" for itself), and kind bits."""

    handle: object
    name: bytes
    kinds: int


class Watcher:
    """Watches for one mount. Event loop only.

    on_changes: called with each burst; read_at: when its first event was read (time.monotonic). on_overflow:
    events were lost (IN_Q_OVERFLOW).
    """

    def __init__(self, on_changes: Callable[[list[Change]], None], on_overflow: Callable[[], None]) -> None:
        """Raises OSError (EMFILE) when no inotify instance can be had."""
        self._inotify = Inotify(cache_size=_READ_EVENTS, sync_timeout=0)
        self._handles: dict[Watch, list[object]] = {}
        self.read_at = 0.0
        self._on_changes = on_changes
        self._on_overflow = on_overflow
        self._closed = False
        self._loop: trio_asyncio.BaseTrioEventLoop | None = None

    def __len__(self) -> int:
        return len(self._handles)

    def watch_directory(self, fd: int, handle: object) -> Watch:
        """Watch the directory behind an O_PATH descriptor. Raises WatchLimit, OSError."""
        return self._add(fd, _DIRECTORY, handle)

    def watch_file(self, fd: int, handle: object) -> Watch:
        """Watch one file itself: it may change through names in directories nobody watches. Raises as above."""
        return self._add(fd, _FILE, handle)

    def _add(self, fd: int, mask: Mask, handle: object) -> Watch:
        try:
            watch = self._inotify.add_watch(syscalls.proc_path(fd), mask)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise WatchLimit from None
            raise
        # An inode has one watch (inotify_add_watch(2)). While a directory moves from one node to another,
        # both have it: the one that lets go must not take it from the other.
        self._handles.setdefault(watch, []).append(handle)
        return watch

    def unwatch(self, watch: Watch, handle: object) -> None:
        """Let go of a watch added with this handle; one that the kernel has dropped already is fine."""
        handles = self._handles.get(watch, [])
        if handle not in handles:
            return
        handles.remove(handle)
        if handles:
            return
        del self._handles[watch]
        try:
            self._inotify.rm_watch(watch)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    async def run(self) -> None:
        """Hand on events until cancelled.

        asyncinotify's own get() keeps what it has read in a future, out of reach of `drain`, which would
        then return too early; so the asyncio loop only tells us that there is something to read.
        """
        async with trio_asyncio.open_loop() as loop:
            if self._closed:
                return  # while the loop was opened
            self._loop = loop
            loop.add_reader(self._inotify.fd, self._readable)
            try:
                await trio.sleep_forever()
            finally:
                self._leave_loop()

    def _leave_loop(self) -> None:
        """Before the descriptor is closed, which may be before `run` is cancelled."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.remove_reader(self._inotify.fd)

    def _readable(self) -> None:
        if self._loop is None:
            return
        try:
            # Under a storm, handling must not wait for its end; and what asyncinotify has read already
            # does not make the descriptor readable again.
            if self._hand_on(_BURST) == _BURST and self._loop is not None:
                self._loop.call_soon(self._readable)
        except Exception:
            # Whatever went wrong, events may be lost: doubt widens.
            log.exception("handling branch events failed")
            self._on_overflow()

    def drain(self) -> None:
        """Hand on everything that has happened up to now, without waiting for the loop."""
        remaining = queue_limit() + _READ_EVENTS * 32  # what the kernel's queue and one read can hold
        while remaining > 0:
            handled = self._hand_on(_BURST)
            if handled < _BURST:
                return
            remaining -= handled

    def _hand_on(self, most: int) -> int:
        """One burst of at most `most` events; how many there were."""
        changes: list[Change] = []
        handled = 0
        self.read_at = monotonic()
        event = self._inotify.sync_get()
        while event is not None:
            mask = event.mask
            if mask & Mask.Q_OVERFLOW:
                # What was read before it is covered by what the overflow makes us do.
                changes.clear()
                self._on_overflow()
            else:
                watch = event.watch
                handles = None if watch is None else self._handles.get(watch)
                if handles is not None and watch is not None:
                    name = b"" if event.name is None else os.fsencode(event.name)
                    kinds = _kinds(mask)
                    changes += [Change(handle, name, kinds) for handle in handles]
                    if mask & Mask.IGNORED:
                        del self._handles[watch]
            handled += 1
            if handled >= most:
                break
            event = self._inotify.sync_get()
        if changes:
            self._on_changes(changes)
        return handled

    def close(self) -> None:
        self._handles.clear()
        self._leave_loop()
        self._closed = True
        self._inotify.close()


def _kinds(mask: Mask) -> int:
    kinds = 0
    if mask & _NAMES:
        kinds |= NAMES
    if mask & _CONTENT:
        kinds |= CONTENT
    if mask & (Mask.ATTRIB | Mask.DELETE_SELF | Mask.MOVE_SELF):
        kinds |= ATTRIBUTES
    if mask & _GONE:
        kinds |= GONE
    return kinds


def watch_limit() -> int:
    """fs.inotify.max_user_watches."""
    return _setting("max_user_watches")


def queue_limit() -> int:
    """fs.inotify.max_queued_events."""
    return _setting("max_queued_events")


def _setting(name: str) -> int:
    with open(_SETTINGS + name) as file:
        return int(file.read())
