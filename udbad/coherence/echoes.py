"""Events of our own changes: which are on their way to us, and which of those that have come they are.

inotify(7) does not say who has made a change. But it tells within the system call, so the event of one of ours is in
the queue when that returns, and is read with the next ones: as many of them tell nothing new as were sent.
"""

from __future__ import annotations

from udbad import compiled
from udbad.branch import listing

Event = tuple[int, int, bytes]
"""Watch descriptor, mask, name."""


class Expected:
    """Events of inotify that system calls of ours have sent, and that were not read yet. Event loop only."""

    __slots__ = ("_sent",)

    def __init__(self) -> None:
        self._sent: dict[Event, int] = {}

    def __len__(self) -> int:
        return sum(self._sent.values())

    def add(self, watch: int | bytes, mask: int, name: bytes) -> None:
        """One was sent by a watch. mask: of the event, which says how a name changed. bytes: none that comes here."""
        if type(watch) is int:
            key = (watch, mask, name)
            self._sent[key] = self._sent.get(key, 0) + 1

    def clear(self) -> None:
        """What has not come by now was lost, and must not stand for another."""
        self._sent.clear()

    def sift(self, data: bytes) -> tuple[int, list[Event], dict[int, int]]:
        """What read(2) has brought: how many events; those that were not expected, in their order; and of those that
        were, how many for each watch. Each stands for one that was sent by that watch, with this mask and this name."""
        others: list[Event] = []
        echoes: dict[int, int] = {}
        events = listing.events(data)
        for event in events:
            count = self._sent.get(event, 0)
            if not count:
                others.append(event)
                continue
            if count > 1:
                self._sent[event] = count - 1
            else:
                del self._sent[event]
            echoes[event[0]] = echoes.get(event[0], 0) + 1
        return len(events), others, echoes


if not compiled.why_not():
    from udbad.coherence.cechoes import Expected  # noqa: F401  # the same, in C
