"""Whether the bus lets this host do what it has to, before anybody relies on it. Nothing is published."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from udbad.hosts.bus import Bus, BusError, BusSettings, connect, subject
from udbad.hosts.tasks import end, ready_or_failed


async def refusals(settings: BusSettings, heard: Iterable[str], told: Iterable[str]) -> list[str]:
    """What is not permitted, for people. heard, told: names of branches whose changes are read, or published.

    Raises BusError, UserError: nobody can be asked.
    """
    found: list[str] = []
    bus = await connect(settings)
    try:
        for branches, reads, publishes in ((heard, "changes", "marks"), (told, "marks", "changes")):
            for branch in branches:
                for attempt in (
                    _may_read(bus, subject(settings.prefix, branch, reads)),
                    bus.may_publish(subject(settings.prefix, branch, publishes)),
                ):
                    try:
                        await attempt
                    except BusError as error:
                        found.append(str(error))
    finally:
        await bus.close()
    return found


async def _may_read(bus: Bus, place: str) -> None:
    ready = asyncio.Event()

    async def read() -> None:
        async for _ in bus.read(place, None, ready.set):
            pass

    reading = asyncio.create_task(read())
    try:
        await ready_or_failed(ready, reading)
    finally:
        await end(reading)
