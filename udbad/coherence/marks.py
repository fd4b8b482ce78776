"""Whole file systems as a source of events (branch/fanotify.py): no watch for each directory, and none of a limit.

All that happens on a file system is told, whoever asked for it and wherever it is; what concerns nobody here is dropped
by its handle. Who made a change is told as well: what this process did itself tells it nothing new.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import os
import termios

from udbad.branch import datacalls, fanotify
from udbad.coherence.holders import hold, let_go

log = logging.getLogger(__name__)


class Marks:
    """The file systems that one mount is told of. Event loop only."""

    def __init__(self) -> None:
        """Raises OSError where fanotify cannot be had (EPERM without CAP_SYS_ADMIN)."""
        self.fd = fanotify.open_group()
        self.handles: dict[bytes, list[object]] = {}
        """Who wants to know, by the handle of a directory or a file."""
        self._ids: dict[int, bytes | None] = {}
        """File system ids by device number; None: its changes are not told in this way."""
        self._own = os.getpid()
        self.taken = 0
        """Bytes read so far."""

    def watch(self, fd: int, handle: object) -> bytes:
        """Be told of what happens to the object behind an O_PATH descriptor, and to the names in it; its handle.

        Raises OSError: EOPNOTSUPP for a file system of which nothing is told.
        """
        device = os.fstat(fd).st_dev
        if device not in self._ids:
            self._ids[device] = self._mark(fd)
        fsid = self._ids[device]
        if fsid is None:
            raise OSError(errno.EOPNOTSUPP, "no file handles")
        key = fanotify.handle_of(fd, fsid)
        hold(self.handles, key, handle)
        return key

    def _mark(self, fd: int) -> bytes | None:
        try:
            fanotify.mark(self.fd, fd)
            fsid = fanotify.file_system_id(fd)
            fanotify.handle_of(fd, fsid)
        except OSError as error:
            log.info("no fanotify for a file system (%s); its directories are watched one by one", error.strerror)
            return None
        return fsid

    def unwatch(self, key: bytes, handle: object) -> None:
        let_go(self.handles, key, handle)

    def read(self, size: int) -> tuple[int, list[fanotify.Event], bool]:
        """Some events, without waiting: how many, those of them that concern somebody, and whether they were all."""
        data = datacalls.read_ready(self.fd, size)
        if not data:
            return 0, [], True
        self.taken += len(data)
        count, events = fanotify.events(data, self.handles)
        return count, events, len(data) <= size - fanotify.MOST_BYTES

    def waiting(self) -> int:
        """Bytes that are to be read."""
        buffer = array.array("i", [0])
        fcntl.ioctl(self.fd, termios.FIONREAD, buffer)
        return buffer[0]

    def is_own(self, event: fanotify.Event) -> bool:
        """Whether this process did it. Events of several processes are never merged (fanotify_should_merge())."""
        return event[3] == self._own

    def shrink(self) -> None:
        """Give up the room that many handles have taken."""
        self.handles = dict(self.handles)

    def close(self) -> None:
        self.handles.clear()
        os.close(self.fd)
