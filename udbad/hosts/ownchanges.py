"""Publishes what is changed through a mount, where nobody watches the files.

The mount collects it (mount/publishing.py), for as long as its process lives. Another process has another "boot": what
the one before had collected is lost then, so that anything may have changed.

Nobody says goodbye here: the mount goes on, and nobody tells what is changed through it while nothing is published.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from udbad.hosts.bus import BusSettings
from udbad.hosts.link import MountLink
from udbad.hosts.publisher import Publisher
from udbad.hosts.retry import Retry
from udbad.hosts.subscriber import MountGone
from udbad.hosts.tasks import end

_PAUSE: Final = 0.01
"""Seconds in which changes gather."""


class OwnChanges:
    """Those of one mount, on each of its branches that others have as well."""

    def __init__(self, settings: BusSettings, host: str, link: MountLink, branches: Mapping[str, str]) -> None:
        """host: the name of the mount among all publishers. branches: paths, by what hosts call them."""
        self._link = link
        self._paths = list(branches.values())
        self._publishers = [Publisher(settings, branch, host, "mount", self.drain) for branch in branches]
        self._boot = ""
        self._asking = asyncio.Lock()
        self._retry = Retry(f"{host}: its own changes are not told")

    async def run(self) -> None:
        """Until it is cancelled."""
        tasks = [asyncio.create_task(publisher.run()) for publisher in self._publishers]
        tasks.append(asyncio.create_task(self._follow()))
        try:
            await asyncio.gather(*tasks)
        finally:
            await end(*tasks)

    async def _follow(self) -> None:
        while True:
            try:
                await self._link.published(self._paths, True)
                await self._take()
                self._retry.done()
                await asyncio.sleep(_PAUSE)
            except MountGone as error:
                await self._retry.wait(str(error))

    async def drain(self) -> bool:
        """As for `Publisher`."""
        try:
            await self._take()
        except MountGone:
            return False
        return True

    async def _take(self) -> None:
        # One after the other: what an answer has must be handed on before a mark that came later is passed on.
        async with self._asking:
            boot, self._boot = self._boot, ""  # should the answer be lost, so is what was in it
            answer = await self._link.published(self._paths, False)
            everything = answer["all"] or answer["boot"] != boot
            for publisher in self._publishers:
                if everything:
                    publisher.everything()
                    continue
                for path, words in answer["changes"]:
                    publisher.changed(path, words)
            self._boot = str(answer["boot"])
