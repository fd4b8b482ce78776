"""What `udbad watch` and `udbad subscribe` do until they are told to end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from udbad.control.asyncserver import AsyncServer
from udbad.errors import ExitCode, UserError
from udbad.hosts import barrier
from udbad.hosts.bus import BusSettings
from udbad.hosts.ownchanges import OwnChanges
from udbad.hosts.publisher import Publisher
from udbad.hosts.subscriber import Subscriber
from udbad.hosts.tasks import end
from udbad.hosts.tree import Tree

_PATIENCE: Final = 5.0
"""Seconds to tell what is left, at the end."""


class Watched:
    """A directory, and who publishes what changes in it."""

    def __init__(self, settings: BusSettings, branch: str, host: str, top: str, by: str) -> None:
        """Raises UserError where it cannot be watched."""
        self.publisher = Publisher(settings, branch, host, "watch", self._drained)
        self._top = top
        try:
            self._tree = Tree(top, self.publisher.changed, self.publisher.everything, by)
        except OSError as error:
            raise self._refused(error) from None
        self.directories = len(self._tree)

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"{self._top}: {error.strerror}", ExitCode.FAILURE)

    def _drain(self) -> None:
        try:
            self._tree.drain()
        except OSError as error:
            raise self._refused(error) from None

    async def _drained(self) -> bool:
        self._drain()
        return True

    def end(self) -> None:
        """Have `run` return once everything was told that has happened up to now. Raises UserError, too."""
        self._drain()
        self.publisher.end()

    async def run(self) -> None:
        """Until it is cancelled, or `end`. Raises UserError when the directory has gone."""
        loop = asyncio.get_running_loop()
        failed: asyncio.Future[None] = loop.create_future()
        watching = -1

        def take() -> None:
            nonlocal watching
            try:
                self._tree.take()
            except OSError as error:
                loop.remove_reader(watching)
                if not failed.done():
                    failed.set_exception(self._refused(error))
                return
            if self._tree.fd != watching:
                loop.remove_reader(watching)
                watching = self._tree.fd
                loop.add_reader(watching, take)

        watching = self._tree.fd
        loop.add_reader(watching, take)
        publishing = asyncio.create_task(self.publisher.run())
        try:
            await asyncio.wait((publishing, failed), return_when=asyncio.FIRST_COMPLETED)
            (publishing if publishing.done() else failed).result()
        finally:
            failed.cancel()
            loop.remove_reader(watching)
            await end(publishing)

    def close(self) -> None:
        self._tree.close()


async def watch(
    settings: BusSettings, host: str, directories: Mapping[str, str], by: str, on_ready: Callable[[int], None]
) -> None:
    """Publish what changes in directories, by the names of their branches, until SIGINT or SIGTERM.

    by: the mount option `watch`. on_ready: called when everything is watched, with how many directories that are.
    Raises UserError.
    """
    watched: list[Watched] = []
    try:
        for branch, top in directories.items():
            watched.append(Watched(settings, branch, host, top, by))
        on_ready(sum(one.directories for one in watched))
        tasks = [asyncio.ensure_future(one.run()) for one in watched]

        def finish() -> None:
            for one, task in zip(watched, tasks, strict=True):
                one.end()
                loop.call_later(_PATIENCE, task.cancel)  # the bus may not be reached

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, finish)
        await _together(tasks)
    finally:
        for one in watched:
            one.close()


async def subscribe(
    subscribers: Sequence[Subscriber], sock: socket.socket, on_ready: Callable[[], None], lifeline: int = -1,
    own: Sequence[OwnChanges] = (),
) -> None:  # fmt: skip
    """Until SIGINT or SIGTERM. sock: where barrier.py answers. own: publishes what is changed through the mount.

    lifeline: a descriptor at whose end it ends, too; -1: none. Raises UserError.
    """
    server = AsyncServer(barrier.commands(subscribers))
    await server.start(sock)
    loop = asyncio.get_running_loop()
    tasks = [asyncio.ensure_future(run) for run in (*(one.run() for one in subscribers), *(one.run() for one in own))]

    def finish() -> None:
        if lifeline >= 0:
            loop.remove_reader(lifeline)
        for task in tasks:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, finish)
    if lifeline >= 0:
        loop.add_reader(lifeline, finish)  # nothing is written to it
    on_ready()
    try:
        await _together(tasks)
    finally:
        await server.close()


async def _together(tasks: Sequence[asyncio.Future[None]]) -> None:
    """Until all have ended; the first that fails ends the others."""
    done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    await end(*rest)
    for task in done:
        if not task.cancelled():
            task.result()
