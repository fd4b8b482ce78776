"""Events of branch directories: the only module that knows trio-asyncio.

A watch is put on the directory we opened, through /proc/self/fd, never on a path that may mean another
directory by now, and is mapped back by its watch descriptor, never by path. Events are handed on in bursts: the
descriptor is waited for once, then drained synchronously, which is what keeps up with a busy tree. No decisions
here: what an event means is for events.py, and the branch's state decides that.

inotify has a watch for each directory, of a limited number; fanotify tells of whole file systems (coherence/marks.py).
Both can be in use at a time: a directory is watched by one of them.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import select
from collections.abc import Callable, Collection
from time import monotonic
from typing import TYPE_CHECKING

from udbad.branch import datacalls, fanotify, listing
from udbad.coherence.echoes import Expected
from udbad.coherence.holders import hold, let_go
from udbad.coherence.inotify import (
    ATTRIBUTES,
    CLOSED,
    CONTENT,
    GONE,
    MODIFIED,
    NAMES,
    OF_NAMES,
    TOUCHED,
    queue_limit,
    watch_limit,
)
from udbad.coherence.marks import Marks
from udbad.types import MADE, MOVED_FROM, MOVED_TO, REMOVED

if TYPE_CHECKING:
    import trio_asyncio

log = logging.getLogger(__name__)

# linux/inotify.h; those of names are in udbad/types.py. Plain numbers: an operation on an enum, which asyncinotify has,
# takes longer than all else that is done with an event here.
_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_UNMOUNT, _OVERFLOW, _IGNORED = 0x2000, 0x4000, 0x8000
_ONLYDIR, _EXCL_UNLINK = 0x1000000, 0x4000000

_NAMES = MADE | REMOVED | MOVED_FROM | MOVED_TO
_CONTENT = _MODIFY | _CLOSE_WRITE
_ATTRIBUTES = _ATTRIB | _DELETE_SELF | _MOVE_SELF
_GONE = _IGNORED | _UNMOUNT
_FILE = _CONTENT | _ATTRIB
_DIRECTORY_NAMES = _NAMES | _ONLYDIR
_DIRECTORY = _DIRECTORY_NAMES | _CONTENT | _ATTRIBUTES | _EXCL_UNLINK

_READ_BYTES = 16 << 10
"""What one read(2) may bring: some hundred events, a few milliseconds of work."""
_LONGEST = listing.EVENT.size + 256
"""Bytes of an event with the longest name. When that had found room in a read(2), there were no more events."""


class WatchLimit(OSError):
    """ENOSPC: no more watches may be had (fs.inotify.max_user_watches, or memory), or are for us to take."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "no more watches")


Change = tuple[object, bytes, int]
"""One event: the handle its watch was added with, the name inside a directory (b"" for itself), and kind bits."""
Echo = tuple[object, int, int]
"""Some that were expected: the handle, kind bits, and how many."""

Watch = int | bytes
"""A watch descriptor of inotify, or a handle of fanotify."""


class Watcher:
    """Watches for one mount. Event loop only.

    on_changes: called with each burst; read_at: when its first event was read (time.monotonic). on_echoes: called
    with those that were expected. on_overflow: events were lost (IN_Q_OVERFLOW).
    """

    def __init__(
        self,
        on_changes: Callable[[list[Change]], None],
        on_echoes: Callable[[list[Echo]], None],
        on_overflow: Callable[[], None],
        sources: Collection[str] = ("inotify",),
    ) -> None:
        """sources: what `by` may be below, values of the option `watch`. Raises OSError (EMFILE) when no inotify
        instance can be had."""
        self._inotify = listing.inotify()
        self._handles: dict[int, list[object]] = {}
        """By watch descriptor; no number comes twice (inotify(7))."""
        self._expected = Expected()
        self.read_at = 0.0
        self.room = watch_limit()
        """How many inodes may be watched, whatever the kernel would allow."""
        self._on_changes = on_changes
        self._on_echoes = on_echoes
        self._on_overflow = on_overflow
        self._closed = False
        self._queue = queue_limit() + 1
        """What the kernel's queue can hold, which it keeps for good (inotify_init(2)), and its overflow."""
        self.emptied = False
        """The last burst was all there was when it was read."""
        self._loop: trio_asyncio.BaseTrioEventLoop | None = None
        self._marks: Marks | None = None
        self._no_marks = False
        """They were asked for, and refused."""
        self._both: select.epoll | None = None
        """Readable when one of the two is."""
        if any(by != "inotify" for by in sources):
            self._both = select.epoll()
            self._both.register(self._inotify, select.EPOLLIN)
        if "fanotify" in sources:
            self._begin_marks()

    def __len__(self) -> int:
        """Watches of inotify."""
        return len(self._handles)

    @property
    def handles(self) -> int:
        """How many directories and files are watched by way of their file system."""
        return 0 if self._marks is None else len(self._marks.handles)

    def _begin_marks(self) -> bool:
        """Whether whole file systems can be watched from now on."""
        if self._both is None or self._no_marks:
            return False
        if self._marks is None:
            try:
                self._marks = Marks()
            except OSError as error:
                log.info("no fanotify to be had (%s); directories are watched one by one", error.strerror)
                self._no_marks = True
                return False
            self._both.register(self._marks.fd, select.EPOLLIN)
        return True

    def shrink(self) -> None:
        """Give up the room that many watches have taken; a dictionary never shrinks by itself."""
        self._handles = dict(self._handles)
        if self._marks is not None:
            self._marks.shrink()

    @property
    def fd(self) -> int:
        return self._inotify if self._both is None else self._both.fileno()

    def watch_directory(self, fd: int, handle: object, by: str = "inotify") -> Watch:
        """Watch the directory behind an O_PATH descriptor. Raises WatchLimit, OSError."""
        return self._add(fd, _DIRECTORY, handle, by)

    def watch_names(self, fd: int, handle: object, attributes: bool) -> Watch:
        """Watch which names a directory has, and nothing else of it but `attributes`. Raises as above."""
        mask = _DIRECTORY_NAMES | _ATTRIB if attributes else _DIRECTORY_NAMES
        return self._add_to_inotify(fd, mask, handle)

    def watch_file(self, fd: int, handle: object, by: str = "inotify") -> Watch:
        """Watch one file itself: it may change through names in directories nobody watches. Raises as above."""
        return self._add(fd, _FILE, handle, by)

    def _add(self, fd: int, mask: int, handle: object, by: str) -> Watch:
        if by == "fanotify":
            watch = self._add_to_marks(fd, handle)
            if watch is not None:
                return watch
        try:
            return self._add_to_inotify(fd, mask, handle)
        except WatchLimit:
            watch = None
            if by == "auto":
                if self._marks is None and self._begin_marks():
                    log.info("no more watches to be had than %d: whole file systems are watched from now on", len(self))
                watch = self._add_to_marks(fd, handle)
            if watch is None:
                raise
            return watch

    def _add_to_marks(self, fd: int, handle: object) -> bytes | None:
        """None where that cannot be."""
        if self._marks is None:
            return None
        try:
            return self._marks.watch(fd, handle)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return None

    def _add_to_inotify(self, fd: int, mask: int, handle: object) -> int:
        if len(self) >= self.room:
            raise WatchLimit
        try:
            watch = listing.watch(self._inotify, fd, mask)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise WatchLimit from None
            raise
        hold(self._handles, watch, handle)
        return watch

    def unwatch(self, watch: Watch, handle: object) -> None:
        """Let go of a watch added with this handle; one that the kernel has dropped already is fine."""
        if isinstance(watch, bytes):
            if self._marks is not None:
                self._marks.unwatch(watch, handle)
            return
        if not let_go(self._handles, watch, handle):
            return
        try:
            listing.unwatch(self._inotify, watch)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    def expect(self, watch: Watch, mask: int, name: bytes) -> None:
        """A system call of ours has sent this event, which tells nothing new. mask: one that says how a name changed.
        fanotify says so by itself.

        Sent, so it is in the queue already. Another one that looks like it may be ahead of it, but not be merged with
        it, as a name cannot come twice without going in between: of the two, one is looked at, and after both it
        does not matter which.
        """
        self._expected.add(watch, mask, name)

    async def run(self) -> None:
        """Hand on events until cancelled.

        For an edge whose event loop is not ours (Native.takes_events). The asyncio loop only tells us that there is
        something to read, so that others can read it, too: `drain`.
        """
        import trio
        import trio_asyncio  # not where an edge takes the events itself

        async with trio_asyncio.open_loop() as loop:
            if self._closed:
                return  # while the loop was opened
            self._loop = loop
            loop.add_reader(self.fd, self.take)
            try:
                await trio.sleep_forever()
            finally:
                self._leave_loop()

    def _leave_loop(self) -> None:
        """Before the descriptor is closed, which may be before `run` is cancelled."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.remove_reader(self.fd)

    def take(self) -> bool:
        """Hand on one burst; there may be more. Under a storm, all else must not wait for its end. False when there was
        none."""
        return not self._closed and self._hand_on() > 0

    def drain(self) -> None:
        """Hand on everything that has happened up to now, without waiting for the loop."""
        remaining = self._queue
        until = 0 if self._marks is None else self._marks.taken + self._marks.waiting()
        while True:
            handled = self._hand_on()
            remaining -= handled
            if not handled or self.emptied:
                return
            if remaining <= 0 and (self._marks is None or self._marks.taken >= until):
                return

    def _hand_on(self) -> int:
        """One burst of events; 0 when there is none to read."""
        self.read_at = monotonic()
        try:
            count = self._take_apart(datacalls.read_ready(self._inotify, _READ_BYTES))
            return count if self._marks is None else count + self._take_from_marks(self._marks)
        except Exception:
            # Whatever went wrong, the rest of the burst is lost with it: doubt widens.
            log.exception("handling branch events failed")
            self._on_overflow()
            return 1

    def _take_from_marks(self, marks: Marks) -> int:
        """Hand on what whole file systems tell; how many events that was."""
        count, events, emptied = marks.read(_READ_BYTES)
        self.emptied = self.emptied and emptied
        changes: list[Change] = []
        echoes: list[Echo] = []
        for event in events:
            key, mask, name, _ = event
            if mask & fanotify.Q_OVERFLOW:
                changes.clear()
                self._on_overflow()
                continue
            kinds = _kinds(mask)  # whose bits are those of inotify(7)
            handles = marks.handles.get(key, ())
            if mask & fanotify.DELETE_SELF and not name:
                marks.handles.pop(key, None)
                kinds |= GONE
            elif marks.is_own(event):
                echoes += [(handle, kinds, 1) for handle in handles]
                continue
            changes += [(handle, name, kinds) for handle in handles]
        if echoes:
            self._on_echoes(echoes)
        if changes:
            self._on_changes(changes)
        return count

    def _take_apart(self, data: bytes) -> int:
        """Hand on what read(2) brought; how many events that is."""
        watched: dict[int, list[object]] = self._handles
        count, others, of_watches = self._expected.sift(data)
        echoes: list[Echo] = []
        for watch, times in of_watches.items():
            for handle in watched.get(watch, ()):
                echoes.append((handle, NAMES, times))
        changes: list[Change] = []
        for watch, mask, name in others:
            if mask & _OVERFLOW:
                # What was read before it is covered by what the overflow makes us do.
                changes.clear()
                self._on_overflow()
                continue
            kinds = _kinds(mask)
            for handle in watched.get(watch, ()):
                changes.append((handle, name, kinds))
            if mask & _IGNORED:
                watched.pop(watch, None)
        self.emptied = len(data) <= _READ_BYTES - _LONGEST
        if self.emptied:
            self._expected.clear()  # everything sent was read
        if echoes:
            self._on_echoes(echoes)
        if changes:
            self._on_changes(changes)
        return count

    def close(self) -> None:
        if self._closed:
            return
        self._handles.clear()
        self._leave_loop()
        self._closed = True
        if self._both is not None:
            self._both.close()
        if self._marks is not None:
            self._marks.close()
        os.close(self._inotify)


@functools.lru_cache(256)  # of the few there are
def _kinds(mask: int) -> int:
    kinds = mask & OF_NAMES
    if mask & _NAMES:
        kinds |= NAMES
    if mask & _CONTENT:
        kinds |= CONTENT
        if mask & _MODIFY:
            kinds |= MODIFIED
        if mask & _CLOSE_WRITE:
            kinds |= CLOSED
    if mask & _ATTRIBUTES:
        kinds |= ATTRIBUTES
        if mask & _ATTRIB:
            kinds |= TOUCHED
    if mask & _GONE:
        kinds |= GONE
    return kinds
