"""What of inotify(7) is to be known without watching anything: kinds of events, and limits of the system."""

from __future__ import annotations

NAMES, CONTENT, ATTRIBUTES, GONE = 1, 2, 4, 8
"""What a change concerns, as bits."""

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
