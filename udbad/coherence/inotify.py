"""What of inotify(7) is to be known without watching anything: kinds of events, and limits of the system."""

from __future__ import annotations

NAMES, CONTENT, ATTRIBUTES, GONE = 1, 2, 4, 8
"""What a change concerns, as bits."""

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
