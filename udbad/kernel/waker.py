"""Keeping the event loop from sleeping inside read(2) on /dev/fuse.

pyfuse3 waits until the descriptor is readable and then reads, blocking. When the client of the only
pending request is killed between the two, the request is taken off the queue (request_wait_answer in
fs/fuse/dev.c) and the read waits for the next one, which on an idle mount may be hours away; until
then no event, no control request and no signal is handled. So a thread watches a heartbeat of the
loop, and when that stops it asks the mount for its statfs: a request without locks, which ends the read.
"""

from __future__ import annotations

import os
import threading
from time import monotonic

import trio

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 2.5


class Waker:
    """Heartbeat of one event loop, and the thread that listens to it."""

    def __init__(self, mount_point: bytes) -> None:
        self._mount_point = mount_point
        self._last = monotonic()
        self._stop = threading.Event()
        self.woken = 0
        """How often the loop had to be woken, or was busy with one operation for that long."""
        self._thread = threading.Thread(target=self._listen, name="waker", daemon=True)

    async def beat(self) -> None:
        """Run as a task of the loop until cancelled."""
        self._last = monotonic()
        self._thread.start()
        try:
            while True:
                await trio.sleep(BEAT_SECONDS)
                self._last = monotonic()
        finally:
            # A thread that asks just now waits for the mount, which is about to end: it is not joined.
            self._stop.set()

    def _listen(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            if monotonic() - self._last > SILENCE_SECONDS:
                self.woken += 1
                try:
                    os.statvfs(self._mount_point)
                except OSError:
                    pass  # unmounted or aborted: there is nothing to wake
