"""What of inotify(7) is to be known without watching anything: kinds of events, and limits of the system."""

from __future__ import annotations

from typing import Final

from udbad.types import MADE, MOVED_FROM, MOVED_TO, OF_DIRECTORY, REMOVED

NAMES, CONTENT, ATTRIBUTES, GONE = 1, 2, 4, 8
"""What a change concerns, as bits."""
KIND_BITS: Final = 4
KINDS: Final = (1 << KIND_BITS) - 1
"""All of these."""

MODIFIED, CLOSED, TOUCHED = 0x10, 0x20, 0x400
"""Which event told of it, for who shows it to others (coherence/replays.py): IN_MODIFY, IN_CLOSE_WRITE, IN_ATTRIB. Of
names, the numbers of udbad/types.py, which are those of the events."""
OF_NAMES = MOVED_FROM | MOVED_TO | MADE | REMOVED | OF_DIRECTORY

SILENT_FS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "afs", "lustre", "gfs2", "ocfs2", "vboxsf"}
)
"""File systems on which others can change things without an inotify event here; so can all of FUSE."""

_SETTINGS = "/proc/sys/fs/inotify/"


def watch_limit() -> int:
    """fs.inotify.max_user_watches."""
    return _setting("max_user_watches")


def queue_limit() -> int:
    """fs.inotify.max_queued_events."""
    return _setting("max_queued_events")


def _setting(name: str) -> int:
    with open(_SETTINGS + name) as file:
        return int(file.read())
