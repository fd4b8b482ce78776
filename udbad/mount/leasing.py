"""The control operation `lease`, and the end of leases that nobody renews (coherence/leases.py)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import trio

from udbad.coherence import leases
from udbad.control.protocol import Message, flag_of, number_of, text_of
from udbad.mount import rebranch

if TYPE_CHECKING:
    from udbad.mount.mountproc import MountProcess


class Leasing:
    """That of one mount process."""

    def __init__(self, process: MountProcess) -> None:
        self._process = process
        self._given = trio.Event()
        self._watching = False
        self._subscribers: dict[bytes, str] = {}

    async def lease(self, request: Message) -> dict[str, Any]:
        """Somebody vouches for "branch" until "until" (seconds of CLOCK_BOOTTIME; 0: not any more), and sends a hint
        (`feed`) of each change before he does so again. "anew": whatever is believed so far may be wrong. After the
        answer it is so. "by": the socket where he answers (`subscribers`); none: nowhere, or not any more."""
        process = self._process
        until, by = number_of(request, "until"), text_of(request, "by", "")
        branch = await rebranch.find(process.sb.branches, os.fsencode(text_of(request, "branch")))
        # After this: another set of branches may be in use, whose coherence knows of no lease.
        leased = False
        for one in process.sb.branches.branches:
            if one.id == branch.id:
                if flag_of(request, "anew"):
                    process.coherence.lease(one, 0.0)
                leased = process.coherence.lease(one, until)
        if by:
            self._subscribers[branch.path] = by
        else:
            self._subscribers.pop(branch.path, None)
        if leased and not self._watching:
            self._watching = True
            process.beside.nursery.start_soon(self._watch)
        self._given.set()
        await trio.to_thread.run_sync(process.invalidator.flush)
        return {"leased": leased, "fs_type": branch.fs_type}

    async def subscribers(self, request: Message) -> dict[str, Any]:
        """Where those answer who vouch for branches, or have done so and have not left, by the path of the branch."""
        paths = [branch.path for branch in self._process.sb.branches.branches]
        self._subscribers = {path: by for path, by in self._subscribers.items() if path in paths}
        return {"subscribers": {os.fsdecode(path): by for path, by in self._subscribers.items()}}

    async def _watch(self) -> None:
        while True:
            self._given = trio.Event()
            until = self._process.coherence.leased_until
            # At least once for each lease: a strategy that takes over has none, until the next request.
            with trio.move_on_after(leases.LONGEST if until is None else max(until - leases.now(), 0.0)):
                await self._given.wait()
            self._process.coherence.end_leases()
