"""A directory and all below it, watched: paths that have changed, where the files are.

Every directory is watched before what is in it is listed, so that a name is either listed or told. A directory that
comes to be, or is moved in, is new with all that is in it. As in a branch, neither mounts inside nor links are entered.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from udbad.branch.beneath import open_directory
from udbad.coherence.inotify import ATTRIBUTES, CONTENT, GONE, NAMES
from udbad.coherence.watcher import Change, Watch, Watcher

log = logging.getLogger(__name__)

_WORDS: Final = ((NAMES, "move"), (CONTENT, "modify"), (ATTRIBUTES, "attrib"))
LINKS: Final = "links"
"""Beside another word: of a file with several names, of which only one is told."""
_PASSING: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.EACCES, errno.ESTALE)


@dataclass(slots=True, eq=False)
class Directory:
    """Handle of a watch."""

    parent: Directory | None
    name: bytes
    watch: Watch | None = None
    below: dict[bytes, Directory] = field(default_factory=dict)

    def names(self) -> list[bytes]:
        """From the top down."""
        names: list[bytes] = []
        one = self
        while one.parent is not None:
            names.append(one.name)
            one = one.parent
        return names[::-1]


class Tree:
    """One watched tree. Event loop only."""

    def __init__(self, top: str, on_change: Callable[[str, str], None], on_lost: Callable[[], None], by: str) -> None:
        """on_change: a path below `top` and what has become of it, in the words of `udbad feed`; on_lost: all may have
        changed. by: the mount option `watch`. Raises OSError: there is no such directory; WatchLimit, EMFILE: it cannot
        be watched.
        """
        self._fd = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._on_change = on_change
        self._on_lost = on_lost
        self._by = by
        self._lost = False
        self._watcher: Watcher | None = None
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """Readable when there is something to `take`; another one after that."""
        assert self._watcher is not None
        return self._watcher.fd

    def __len__(self) -> int:
        assert self._watcher is not None
        return len(self._watcher) + self._watcher.handles

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None
        os.close(self._fd)

    def take(self) -> None:
        """Tell of some of what has happened. Raises OSError as above."""
        assert self._watcher is not None
        self._watcher.take()
        self._heal()

    def drain(self) -> None:
        """Tell of everything that has happened up to now. Raises as above."""
        assert self._watcher is not None
        self._watcher.drain()
        self._heal()

    def _heal(self) -> None:
        """After events were lost: directories may have come that nobody watches."""
        # As we have it open, there is no event of its end (inotify(7), IN_DELETE_SELF).
        if os.fstat(self._fd).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the directory that is watched has gone")
        while self._lost:
            self._lost = False
            log.warning("events were lost: everything may have changed")
            self._begin()
            self._on_lost()

    def _begin(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
        self._watcher = Watcher(self._on_changes, lambda echoes: None, self._note_loss, (self._by,))
        self._top = Directory(None, b"")
        self._cover(self._top)

    def _note_loss(self) -> None:
        self._lost = True

    def _cover(self, first: Directory) -> bool:
        """Watch a directory and all below it. False when it is none (any more)."""
        assert self._watcher is not None
        waiting = [first]
        while waiting:
            one = waiting.pop()
            try:
                fd = open_directory(self._fd, one.names())
            except OSError as error:
                if error.errno not in _PASSING or one is self._top:
                    raise
                if one is first:
                    return False
                if one.parent is not None:
                    one.parent.below.pop(one.name, None)
                continue
            try:
                one.watch = self._watcher.watch_directory(fd, one, self._by)
                with os.scandir(f"/proc/self/fd/{fd}") as entries:
                    names = [os.fsencode(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
                continue
            finally:
                os.close(fd)
            for name in names:
                one.below[name] = Directory(one, name)
                waiting.append(one.below[name])
        return True

    def _forget(self, first: Directory) -> None:
        assert self._watcher is not None
        waiting = [first]
        while waiting:
            one = waiting.pop()
            if one.watch is not None:
                self._watcher.unwatch(one.watch, one)
                one.watch = None
            waiting += one.below.values()
            one.below.clear()

    def _on_changes(self, changes: list[Change]) -> None:
        names: dict[tuple[Directory, bytes], int] = {}
        for handle, name, kinds in changes:
            if isinstance(handle, Directory):
                key = handle, name
                names[key] = names.get(key, 0) | kinds
        for (directory, name), kinds in names.items():
            if directory.watch is None:
                continue  # it is another one's by now, and told of from above
            if kinds & GONE and not name:
                continue
            self._changed(directory, name, kinds)

    def _changed(self, directory: Directory, name: bytes, kinds: int) -> None:
        path = b"/".join([*directory.names(), name] if name else directory.names())
        words = [word for bit, word in _WORDS if kinds & bit]
        if kinds & NAMES and name:
            before = directory.below.pop(name, None)
            if before is not None:
                self._forget(before)
            one = Directory(directory, name)
            directory.below[name] = one
            if self._cover(one):
                self._on_change(os.fsdecode(path), ",".join(words))
                self._on_change(os.fsdecode(path + b"/"), "")
                return
            del directory.below[name]
        if name and self._has_other_names(directory, name):
            words.append(LINKS)
        self._on_change(os.fsdecode(path), ",".join(words))

    def _has_other_names(self, directory: Directory, name: bytes) -> bool:
        try:
            fd = open_directory(self._fd, directory.names())
        except OSError:
            return False
        try:
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
            return st.st_nlink > 1 and name not in directory.below
        except OSError:
            return False
        finally:
            os.close(fd)
