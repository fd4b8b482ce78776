"""Has a mount hear of what others change on one of its branches, and vouches for that as long as it is so.

By marks (message.py): one is published now and then, with the moment noted, and when each publisher that counts has
passed it on, everything changed before that moment has been told. The mount then believes the branch until `bound`
later, not longer (coherence/leases.py). After a gap it is told at once that it must not; when a later mark has come
back it may again, and what it believes then begins anew.

The branch's own file system has caches, too: what it says just after a change may be older. So each path is looked at
here first, in the ways that make NFS ask its server, and the mount is told twice: at once, and when no cache of that
file system can be that old any more (`settle`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from udbad.coherence.leases import now
from udbad.hosts import message
from udbad.hosts.bus import Bus, BusError, BusSettings, Delivery, connect, subject
from udbad.hosts.freshen import freshen
from udbad.hosts.message import EVERYTHING, Change, Message, Sequences, Unreadable, Verdict
from udbad.hosts.retry import Retry
from udbad.hosts.tasks import end, ready_or_failed
from udbad.hosts.tree import LINKS

log = logging.getLogger(__name__)

_MARKS_IN_BOUND: Final = 4
"""Marks published in the time of `bound`."""
_AHEAD: Final = 1000
"""Messages that wait here while the mount is told; more wait on the bus."""


class MountGone(Exception):
    """The mount does not answer at the moment; the message is for people."""


class Leased(NamedTuple):
    """used: whether the branch is believed. fs_type: that of its file system."""

    used: bool
    fs_type: str


class Link(Protocol):
    """The mount that is told. All raise MountGone."""

    async def hints(self, changes: Sequence[Change]) -> None:
        """Each access after this sees what was changed."""

    async def lease(self, until: float, anew: bool) -> Leased:
        """`udbad.mount.leasing`. anew: whatever is believed so far may be wrong."""

    async def leave(self) -> None:
        """Nobody vouches for the branch any more, nor answers for it."""

    async def heard(self, readings: Readings | None) -> None:
        """For its metrics, until it is told again. None: nobody listens any more."""


@dataclass(slots=True)
class Following:
    """How a branch is followed. branch: what hosts call it. path: where it is here.

    bound: seconds for which it is believed after the last moment that is known to be covered. settle: seconds for which
    its file system may keep what it has asked for. publishers: the names of all that must be heard; none: whoever
    watches it.
    """

    branch: str
    path: str
    bound: float = 10.0
    settle: float = 60.0
    publishers: Sequence[str] = ()
    ignore: str = ""
    """The name under which the mount itself publishes: it knows."""


@dataclass(slots=True)
class _Host:
    role: str
    passed: float | None = None
    """Everything that it saw before this moment has been told."""


@dataclass(slots=True)
class Readings:
    """For `udbad status` and the metrics."""

    state: str = "waiting"
    """waiting: for the bus; doubtful: for publishers; told: the branch is believed; unused: it need not be believed, or
    must not."""
    reason: str = ""
    gaps: int = 0
    hints: int = 0
    heard: float = 0.0
    """When anything was heard (`leases.now`)."""
    covered: float | None = None
    """Everything before this moment (`leases.now`) has been told."""
    hosts: dict[str, float | None] = field(default_factory=dict)
    """By publisher, the same."""


class Subscriber:
    """That of one branch of one mount."""

    def __init__(self, settings: BusSettings, following: Following, link: Link) -> None:
        self.readings = Readings()
        self._settings = settings
        self._following = following
        self._link = link
        self._token = secrets.token_hex(8)
        self._count = 0
        self._epoch = ""
        self._position: str | None = None
        self._sequences = Sequences(following.branch, "")
        self._hosts: dict[str, _Host] = {}
        self._silent: set[str] = set()
        """Publishers that have not been heard since all was begun anew, and have not said goodbye."""
        self._sent: dict[str, float] = {}
        """Marks on their way, and when they were made."""
        self._since = now()
        """When the last gap ended, and caches of the branch's file system with it: only marks made later count."""
        self._anew = True
        self._later: deque[tuple[float, dict[str, str]]] = deque()
        self._heard = now()
        self._hides_links = True
        """A file with several names does not show on the branch that it has: sftp knows no link counts."""
        self._caches_apart = False
        """The branch's file system has caches in a process of its own, which nobody can have emptied (freshen.py)."""
        self._hurry = asyncio.Event()
        """A mark is wanted at once."""
        self._progress = asyncio.Event()
        self._retry = Retry(f"{following.branch}: changes are not told")

    @property
    def branch(self) -> str:
        """What hosts call it."""
        return self._following.branch

    async def catch_up(self, seconds: float) -> list[str]:
        """Have the mount hear everything that has been changed up to now; the publishers that have not told it after so
        long, or what else is the matter."""
        moment = now()
        self._hurry.set()
        try:
            async with asyncio.timeout(seconds):
                while self._behind(moment):
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            pass
        return self._behind(moment)

    def _behind(self, moment: float) -> list[str]:
        """Who has not told everything up to then."""
        known = {**dict.fromkeys((*self._following.publishers, *sorted(self._silent))), **self._hosts}
        if not known:
            return [self.readings.reason or "no publisher"]
        late = [name for name, host in known.items() if host is None or (host.passed or 0.0) < moment]
        # After a gap, until the mount has taken a lease anew: what it was not told of is in none of their marks.
        return late or (
            [self.readings.reason or self.readings.state] if self._anew or self.readings.covered is None else []
        )

    async def run(self) -> None:
        """Until it is cancelled; the mount then believes the branch no more."""
        aside = [asyncio.create_task(self._look_again()), asyncio.create_task(self._report())]
        try:
            while True:
                try:
                    bus = await connect(self._settings)
                    try:
                        await self._follow(bus)
                    finally:
                        await bus.close()
                except (BusError, MountGone) as error:
                    if isinstance(error, MountGone):
                        self._anew = True  # a hint was lost, perhaps: begin anew at the next lease
                        self._since = now() + self._following.settle
                        self._forget_marks()
                    self._note("waiting", str(error))
                    await self._retry.wait(str(error))
        finally:
            await end(*aside)
            try:
                await self._link.leave()
                await self._link.heard(None)
            except MountGone:
                pass

    def _note(self, state: str, reason: str = "") -> None:
        if state != self.readings.state:
            log.info("%s: %s%s", self._following.branch, state, f": {reason}" if reason else "")
        self.readings.state, self.readings.reason = state, reason

    async def _follow(self, bus: Bus) -> None:
        if bus.identity != self._epoch or self._position is None:
            reason = "no publisher has answered yet" if bus.identity == self._epoch else "begins with another stream"
            self._epoch, self._position = bus.identity, None
            self._sequences = Sequences(self._following.branch, bus.identity)
            self._silent.update(self._hosts)
            self._hosts.clear()
            await self._gap(reason)
        ready = asyncio.Event()
        received: asyncio.Queue[Delivery] = asyncio.Queue(_AHEAD)
        asking = asyncio.create_task(self._ask(bus, ready))
        receiving = asyncio.create_task(self._receive(bus, ready, received))
        taking = asyncio.create_task(self._take_all(received))
        tasks = (taking, receiving, asking)
        try:
            self._heard = now()
            await ready_or_failed(ready, receiving)
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            await end(*tasks)

    async def _ask(self, bus: Bus, ready: asyncio.Event) -> None:
        """Publish marks; and give the connection up when nobody answers: another one may do better."""
        bound = self._following.bound
        await ready.wait()
        while True:
            moment = now()
            self._count += 1
            mark = f"{self._token}-{self._count}"
            self._sent[mark] = moment
            for old in [one for one, at in self._sent.items() if at < moment - bound]:
                del self._sent[old]
            await bus.publish(
                subject(self._settings.prefix, self._following.branch, "marks"), message.encode_mark(mark)
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(bound / _MARKS_IN_BOUND):
                    await self._hurry.wait()
            self._hurry.clear()
            if now() - self._heard > 2 * bound:
                self._position = None  # perhaps there is no such place any more
                raise BusError("no publisher answers")

    async def _receive(self, bus: Bus, ready: asyncio.Event, received: asyncio.Queue[Delivery]) -> None:
        place = subject(self._settings.prefix, self._following.branch, "changes")
        async for delivery in bus.read(place, self._position, ready.set):
            await received.put(delivery)

    async def _take_all(self, received: asyncio.Queue[Delivery]) -> None:
        """What has come while the mount was told of what came before is told in one go: to ask it costs as much for
        one path as for many, and whoever was told message by message would fall behind for ever."""
        while True:
            deliveries = [await received.get()]
            while not received.empty():
                deliveries.append(received.get_nowait())
            await self._take([delivery.data for delivery in deliveries])
            self._position = deliveries[-1].position

    async def _take(self, messages: Sequence[bytes]) -> None:
        """Raises MountGone."""
        changes: dict[str, str] = {}
        marks: list[tuple[_Host, Sequence[str]]] = []
        for data in messages:
            told = await self._accept(data)
            if told is None:
                continue
            host = self._hosts.setdefault(told.host, _Host(told.role))
            host.role = told.role
            if told.kind == "changes":
                self._gather(changes, told)
            elif told.kind == "passed":
                marks.append((host, told.marks))
            elif told.kind == "bye":
                del self._hosts[told.host]
                if not self._counting():
                    await self._gap(f"{told.host} has ended")
        if changes:
            await self._tell(changes)
        # Not before: all that was told ahead of a mark is known to the mount when it counts. Nor one from before a gap,
        # which is among those that `_gap` has forgotten.
        ours = [self._note_passed(host, passed) for host, passed in marks]
        if any(ours):
            await self._renew()
            self._progress.set()

    async def _accept(self, data: bytes) -> Message | None:
        """None: there is nothing new in it. Raises MountGone."""
        try:
            told = message.decode(data)
        except Unreadable as error:
            await self._gap(f"a message that cannot be read: {error}")
            return None
        self._heard = self.readings.heard = now()
        verdict = self._sequences.see(told)
        if verdict is Verdict.REPEATED:
            return None
        if verdict is Verdict.GAP:
            await self._gap(f"messages of {told.host} are missing")
        self._silent.discard(told.host)
        return told

    def _gather(self, changes: dict[str, str], told: Message) -> None:
        if told.host == self._following.ignore:
            return
        for path, words in told.changes:
            if LINKS in words.split(",") and self._hides_links:
                message.gather(changes, EVERYTHING, "")
            else:
                message.gather(changes, path, words)

    async def _tell(self, changes: dict[str, str]) -> None:
        if EVERYTHING in changes:
            changes = {EVERYTHING: ""}
        if self._following.settle:
            self._later.append((now() + self._following.settle, dict(changes)))
        await self._hand_on(changes)

    async def _hand_on(self, changes: dict[str, str]) -> None:
        """Takes them out. Raises MountGone."""
        while changes:
            portion = message.portion(changes)
            if not self._caches_apart:
                await asyncio.to_thread(freshen, self._following.path, [path for path, _ in portion])
            await self._link.hints(portion)
            self.readings.hints += len(portion)
            for path, _ in portion:
                del changes[path]

    async def _look_again(self) -> None:
        """Tell the mount once more what it was told when the branch's own file system might not have known it yet."""
        while True:
            if not self._later:
                await asyncio.sleep(min(self._following.settle, 1.0) or 1.0)
                continue
            due, changes = self._later[0]
            await asyncio.sleep(max(due - now(), 0.0))
            try:
                await self._hand_on(changes)
            except MountGone:
                self._anew = True
            self._later.popleft()

    async def _report(self) -> None:
        """Tell the mount how it stands, for its metrics."""
        while True:
            with contextlib.suppress(MountGone):
                await self._link.heard(self.readings)
            await asyncio.sleep(self._following.bound / _MARKS_IN_BOUND)

    def _note_passed(self, host: _Host, marks: Sequence[str]) -> bool:
        """Whether any of the marks is one of ours."""
        moments = [self._sent[mark] for mark in marks if mark in self._sent]
        if moments:
            host.passed = max(moments)
        return bool(moments)

    def _counting(self) -> list[_Host | None]:
        """The publishers that must be heard; None for one that is not known yet."""
        names = self._following.publishers
        if names:
            return [self._hosts.get(name) for name in names]
        return [host for host in self._hosts.values() if host.role == "watch"]

    async def _renew(self) -> None:
        self.readings.hosts = {name: host.passed for name, host in self._hosts.items()}
        moments = [None if host is None else host.passed for host in self._counting()]
        known = [moment for moment in moments if moment is not None]
        if not known or len(known) < len(moments) or min(known) < self._since:
            return
        covered = min(known)
        anew, self._anew = self._anew, False
        if anew:
            self.readings.covered = None
        try:
            leased = await self._link.lease(covered + self._following.bound, anew)
        except MountGone:
            self._anew = True
            raise
        self.readings.covered = covered
        self._hides_links = leased.fs_type.startswith("fuse")
        self._caches_apart = leased.fs_type == "fuse.sshfs"
        self._note("told" if leased.used else "unused")
        self._retry.done()

    async def _gap(self, reason: str) -> None:
        """Something may have been missed up to now: the branch must be asked, until a later mark has come back."""
        self.readings.gaps += 1
        self._anew = True
        self._since = now() + self._following.settle
        self._forget_marks()
        self._note("doubtful", reason)
        await self._link.lease(0.0, True)

    def _forget_marks(self) -> None:
        self._sent.clear()
        for host in self._hosts.values():
            host.passed = None
        self.readings.covered = None
