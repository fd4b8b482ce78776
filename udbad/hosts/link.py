"""The mount that a subscriber tells: by its control socket, whichever process serves it at the moment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from udbad.control import client
from udbad.control.asyncclient import ask_async
from udbad.control.protocol import Message
from udbad.errors import UserError
from udbad.hosts.message import Change
from udbad.hosts.subscriber import Leased, MountGone, Readings

_SECONDS: Final = 10.0


class MountLink:
    """One branch of one mount."""

    def __init__(self, run_dir: str, mount: str, branch: str, control: str | None = None, own: str = "") -> None:
        """mount: its name, or a path in it. branch: path. control: its control socket, where that is known.

        own: where the subscriber answers (barrier.py), if it does.
        """
        self._run_dir = run_dir
        self._mount = mount
        self._branch = branch
        self._control = control
        self._own = own

    async def hints(self, changes: Sequence[Change]) -> None:
        """Raises MountGone."""
        await self._ask({"op": "feed", "hints": [list(change) for change in changes]})

    async def lease(self, until: float, anew: bool) -> Leased:
        """Raises MountGone."""
        answer = await self._lease(until, anew, self._own)
        return Leased(answer["leased"] is True, str(answer["fs_type"]))

    async def leave(self) -> None:
        """Raises MountGone."""
        await self._lease(0.0, True, "")

    async def heard(self, readings: Readings | None) -> None:
        """Raises MountGone."""
        request: Message = {"op": "heard", "branch": self._branch}
        if readings is not None:
            known = {name: passed for name, passed in readings.hosts.items() if passed is not None}
            request |= {"gaps": readings.gaps, "told": readings.hints, "last": readings.heard, "hosts": known}
        await self._ask(request)

    async def published(self, branches: Sequence[str], wait: bool) -> Message:
        """What was changed through the mount (mount/publishing.py). Raises MountGone."""
        return await self._ask({"op": "published", "branches": list(branches), "wait": wait})

    async def _lease(self, until: float, anew: bool, by: str) -> Message:
        return await self._ask({"op": "lease", "branch": self._branch, "until": until, "anew": anew, "by": by})

    async def _ask(self, request: Message) -> Message:
        control = self._control
        try:
            if control is None:
                entry, _ = await asyncio.to_thread(client.locate, self._run_dir, self._mount)
                control = entry.control
            answer = await ask_async(control, request, _SECONDS)
        except UserError as error:
            raise MountGone(error.message) from None
        except OSError as error:
            raise MountGone(f"{self._mount}: {error.strerror or type(error).__name__}") from None
        if not answer.get("ok"):
            raise MountGone(f"{self._mount}: {answer.get('error')}")
        return answer
