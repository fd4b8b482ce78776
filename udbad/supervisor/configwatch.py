"""Noticing that a file of the configuration has changed: asyncinotify on the supervisor's event loop.

Events are hints that it is time to look; what the files hold decides, so a touch is no change, and an event
too many or too few does no harm. Watched are directories, not files: editors put a new file in the place of
the old one, conf.d may appear later, and a symbolic link on the way may be swapped (as Kubernetes does).
Without inotify the files are looked at once a second.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path

from asyncinotify import Inotify, Mask

from udbad.settings.file import config_files, read_file

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.2
"""How long the files must have stayed the same: editors write in pieces. Also the least time between two looks."""
POLL_SECONDS = 1.0
"""Between two looks without inotify."""
SAFETY_SECONDS = 30.0
"""Between two looks without an event: network file systems send none, and directories further up are not watched."""

_MASK = (
    Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO | Mask.MODIFY | Mask.CLOSE_WRITE
    | Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.ONLYDIR
)  # fmt: skip
_MAX_LINKS = 40  # MAXSYMLINKS (linux/namei.h)
_MAX_TURNS = 10

Signature = tuple[tuple[str, bytes], ...]


def signature(path: Path) -> Signature:
    """What the files of a configuration hold; equal when load() would find the same."""
    return tuple((str(file), _state(file)) for file in config_files(path))


def _state(file: Path) -> bytes:
    try:
        return hashlib.sha256(read_file(str(file))).digest()
    except OSError as error:
        return b"%d" % (error.errno or 0)


class ConfigWatch:
    """Waits for changes of one configuration. Event loop only; `close` when done.

    seen: what the files held when they were last read or reported; whoever reads them sets it before.
    """

    def __init__(self, path: Path, seen: Signature) -> None:
        """path: absolute, of the main file."""
        self.path = path
        self.seen = seen
        self._inotify: Inotify | None = None
        self._armed: frozenset[tuple[str, int, int]] = frozenset()
        self._complained = False

    async def changed(self) -> None:
        """Return when the files hold something else than `seen`, and have settled; that is `seen` from then on."""
        before: Signature | None = None
        while True:
            self._arm()  # before the look: what happens after it is an event
            now = signature(self.path)
            if now == self.seen:
                before = None
                await self._hint()
                # A directory where much happens must not keep us busy.
                await asyncio.sleep(SETTLE_SECONDS)
                self._drain()
            elif now != before:
                before = now
                await asyncio.sleep(SETTLE_SECONDS)
            else:
                self.seen = now
                return

    async def _hint(self) -> None:
        if self._inotify is None:
            await asyncio.sleep(POLL_SECONDS)
            return
        try:
            async with asyncio.timeout(SAFETY_SECONDS):
                await self._inotify.get()
        except TimeoutError:
            return

    def _drain(self) -> None:
        while self._inotify is not None and self._inotify.sync_get() is not None:
            pass

    def _arm(self) -> None:
        """Watch the directories that matter now."""
        for _ in range(_MAX_TURNS):  # again when one was exchanged meanwhile
            places = _places(self.path)
            if places == self._armed and self._inotify is not None:
                return
            self.close()
            try:
                self._inotify = Inotify(sync_timeout=0)
                for directory, _, _ in places:
                    self._inotify.add_watch(directory, _MASK)
            except FileNotFoundError:
                continue
            except OSError as error:
                self.close()
                if not self._complained:
                    log.warning("no inotify for the configuration (%s): it is looked at every %g s",
                                error.strerror, POLL_SECONDS)  # fmt: skip
                self._complained = True
                return
            self._armed = places
            self._complained = False

    def close(self) -> None:
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None
        self._armed = frozenset()


def _places(path: Path) -> frozenset[tuple[str, int, int]]:
    """(path, st_dev, st_ino) of the directories in which something decides which files are read."""
    found = set()
    for file in (*config_files(path), path.parent / "conf.d" / "new"):
        for directory in _on_the_way(str(file)):
            try:
                st = os.stat(directory)
            except OSError:
                continue
            found.add((directory, st.st_dev, st.st_ino))
    return frozenset(found)


def _on_the_way(file: str) -> set[str]:
    """The directories that have a symbolic link on the way to a file, and the one where the way ends."""
    todo = [part for part in file.split("/") if part][::-1]
    place = ""
    links = 0
    found = set()
    while todo:
        part = todo.pop()
        if part == "..":
            place = os.path.dirname(place).rstrip("/")
            continue
        step = f"{place}/{part}"
        try:
            target = os.readlink(step)
        except OSError:
            if todo and os.path.isdir(step):
                place = step
                continue
            break  # the file itself, there or not, or a directory that is not there
        found.add(place or "/")
        links += 1
        if links > _MAX_LINKS:
            break
        if target.startswith("/"):
            place = ""
        todo += [piece for piece in target.split("/") if piece not in ("", ".")][::-1]
    return found | {place or "/"}
