"""Changes on a file server, told by a message bus: a branch that sends no events is as good as one that does, for as
long as somebody vouches for it.

The branch is a real sshfs. Publishers and subscribers run in the test; what dies here dies in ways that a process can.
What the mount believes is found by counting requests: a warm look costs none.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.bus import SECONDS, Server, bus_server, is_believed, sshfs
from tests.helpers.mount import Mount, mounted
from udbad.hosts import message
from udbad.hosts.bus import BusSettings, connect
from udbad.hosts.link import MountLink
from udbad.hosts.nats_bus import NatsBus
from udbad.hosts.redis_bus import RedisBus
from udbad.hosts.serving import Watched
from udbad.hosts.subscriber import Following, Subscriber

pytestmark = [pytest.mark.fuse, pytest.mark.asyncio]

BOUND = 1.0
LOG = "nobody vouches for it any more"


@dataclass
class Place:
    """An export that is watched where it is, and a mount that has it as a branch by sshfs."""

    server: Server
    export: Path
    branch: Path
    mount: Mount

    @property
    def settings(self) -> BusSettings:
        return BusSettings((self.server.url,), seconds=1.0)

    def subscriber(self, **words: object) -> Subscriber:
        following = Following("share", str(self.branch), BOUND, **{"settle": 0.0, **words})  # type: ignore[arg-type]
        return Subscriber(self.settings, following, MountLink("", "m", str(self.branch), str(self.mount.control_path)))

    def watched(self, host: str = "server") -> Watched:
        return Watched(self.settings, "share", host, str(self.export), "inotify")

    async def wipe(self) -> None:
        """Take away everything that the bus has kept."""
        bus = await connect(self.settings)
        try:
            if isinstance(bus, NatsBus):
                await bus._js.delete_stream("udbad")
            elif isinstance(bus, RedisBus):
                await bus._client.flushall()
        finally:
            await bus.close()

    def believed(self) -> bool:
        """Whether the kernel needs to ask nothing about what it has been told."""
        return is_believed(self.mount)


@pytest.fixture(scope="module", params=["nats", "redis"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("hosts")
    export = root / "export"
    (export / "d").mkdir(parents=True)
    (export / "d/old").write_text("old")
    (root / "top").mkdir()
    with (
        bus_server(request.param, root / "bus") as server,
        sshfs(export, root / "far") as far,
        mounted([f"{root / 'top'}=rw", f"{far}=ro"], root / "mnt", "notify", "", allow_log=LOG) as mount,
    ):
        yield Place(server, export, far, mount)


@pytest.fixture
def may_be_lost(caplog: pytest.LogCaptureFixture) -> None:
    """The connection, which is a warning; whether it is depends on who waits for what just then."""
    caplog.set_level(logging.ERROR, "udbad.hosts.retry")


@asynccontextmanager
async def running(*parts: Watched | Subscriber) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for part in parts:
            if isinstance(part, Watched):
                part.close()


async def until(done: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(SECONDS):
        while not done():  # noqa: ASYNC110  # a state of other processes, which sends nothing
            await asyncio.sleep(0.02)


async def told(subscriber: Subscriber) -> None:
    await until(lambda: subscriber.readings.state == "told", "lease")


async def test_changes_on_the_server_are_seen(place: Place) -> None:
    subscriber = place.subscriber()
    assert not place.believed()
    async with running(place.watched(), subscriber):
        await told(subscriber)
        assert place.believed()
        seen, far = place.mount.path / "d", place.export / "d"
        assert not (seen / "new").exists()
        (far / "new").write_text("1")
        (far / "old").write_text("longer")
        assert await subscriber.catch_up(SECONDS) == []
        assert (seen / "new").read_text() == "1"
        assert (seen / "old").read_text() == "longer"
        assert sorted(os.listdir(seen)) == ["new", "old"]
        (far / "new").unlink()
        (far / "old").chmod(0o600)
        (far / "sub/deeper").mkdir(parents=True)
        (far / "sub/deeper/f").touch()
        assert await subscriber.catch_up(SECONDS) == []
        assert not (seen / "new").exists()
        assert (seen / "old").stat().st_mode & 0o777 == 0o600
        assert not (seen / "moved").exists()
        assert (seen / "sub/deeper/f").exists()
        os.rename(far / "sub", far / "moved")
        (far / "moved/deeper/g").touch()
        assert await subscriber.catch_up(SECONDS) == []
        assert (seen / "moved/deeper/g").exists()
        assert not (seen / "sub").exists()
        os.rename(far / "moved", place.export / "gone")
        assert await subscriber.catch_up(SECONDS) == []
        assert sorted(os.listdir(seen)) == ["old"]
        assert place.believed()
    assert not place.believed(), "nobody hears of changes any more"


class SlowLink(MountLink):
    """To a mount that takes its time."""

    def __init__(self, place: Place) -> None:
        super().__init__("", "m", str(place.branch), str(place.mount.control_path))
        self.answers = asyncio.Event()
        self.answers.set()
        self.asked: list[set[str]] = []
        """Names that were told, by request."""

    async def hints(self, changes: Sequence[message.Change]) -> None:
        self.asked.append({path for path, _ in changes})
        await self.answers.wait()
        await super().hints(changes)


async def test_what_comes_meanwhile_is_told_in_one_go(place: Place) -> None:
    """Else whoever is slower than the changes are is late for ever."""
    link = SlowLink(place)
    subscriber = Subscriber(place.settings, Following("share", str(place.branch), SECONDS, settle=0.0), link)
    watched = place.watched()
    async with running(watched, subscriber):
        await told(subscriber)
        link.answers.clear()
        for number in range(10):
            before = watched.publisher.published
            (place.export / f"d/{number}").touch()
            await until(lambda before=before: watched.publisher.published > before, "message")  # type: ignore[misc]
        link.answers.set()
        assert await subscriber.catch_up(SECONDS) == []
        assert link.asked[0] == {"d/0"}
        assert set().union(*link.asked) == {f"d/{number}" for number in range(10)}
        assert len(link.asked) <= 3  # the last message may have come after the second request
        for number in range(10):
            (place.export / f"d/{number}").unlink()
        assert await subscriber.catch_up(SECONDS) == []


async def told_again(place: Place, subscriber: Subscriber, gaps: int) -> None:
    """After a fault: the branch was not believed, and is again, and changes are seen."""
    await until(lambda: subscriber.readings.gaps > gaps, "gap")
    await told(subscriber)
    await check_seen(place, subscriber)
    await until(place.believed, "lease")


async def check_seen(place: Place, subscriber: Subscriber) -> None:
    seen, far = place.mount.path / "d/fresh", place.export / "d/fresh"
    assert not seen.exists()
    far.touch()
    assert await subscriber.catch_up(SECONDS) == []
    assert seen.exists()
    far.unlink()
    assert await subscriber.catch_up(SECONDS) == []
    assert not seen.exists()


async def unbelieved(place: Place) -> None:
    """The mount has stopped to believe the branch, and so sees what nobody tells."""
    await until(lambda: not place.believed(), "end of the lease")
    seen, far = place.mount.path / "d/untold", place.export / "d/untold"
    assert not seen.exists()
    far.touch()
    assert seen.exists()
    far.unlink()
    assert not seen.exists()


async def test_a_publisher_dies(place: Place) -> None:
    subscriber = place.subscriber()
    async with running(subscriber):
        async with running(place.watched()):
            await told(subscriber)
            gaps = subscriber.readings.gaps
        await unbelieved(place)
        async with running(place.watched()):
            await told_again(place, subscriber, gaps)


async def test_a_publisher_ends(place: Place) -> None:
    subscriber = place.subscriber()
    async with running(subscriber):
        watched = place.watched()
        async with running(watched):
            await told(subscriber)
            (place.export / "d/last").touch()
            watched.end()
            await until(lambda: subscriber.readings.state == "doubtful", "goodbye")
            assert (place.mount.path / "d/last").exists()
            (place.export / "d/last").unlink()
        await unbelieved(place)


@pytest.mark.usefixtures("may_be_lost")
async def test_the_subscriber_is_stopped(place: Place) -> None:
    """Nothing of it runs: neither does it renew, nor give back."""
    async with running(place.watched()):
        subscriber = place.subscriber()
        async with running(subscriber):
            await told(subscriber)
            while place.believed():
                time.sleep(0.05)  # noqa: ASYNC251  # the event loop stands still
            far, seen = place.export / "d/meanwhile", place.mount.path / "d/meanwhile"
            far.touch()
            assert seen.exists()
            far.unlink()
            await until(place.believed, "lease")
            await check_seen(place, subscriber)


@pytest.mark.usefixtures("may_be_lost")
async def test_the_bus_is_killed(place: Place) -> None:
    subscriber = place.subscriber()
    async with running(place.watched(), subscriber):
        await told(subscriber)
        place.server.kill()
        await unbelieved(place)
        (place.export / "d/during").touch()
        place.server.start()
        await until(lambda: subscriber.readings.state == "told" and place.believed(), "lease")
        assert (place.mount.path / "d/during").exists()
        (place.export / "d/during").unlink()
        await check_seen(place, subscriber)


async def test_the_bus_stops_for_a_moment(place: Place) -> None:
    """As a network that is cut for less than the bound: nothing is lost, and nobody notices."""
    subscriber = place.subscriber()
    async with running(place.watched(), subscriber):
        await told(subscriber)
        gaps = subscriber.readings.gaps
        place.server.signal(signal.SIGSTOP)
        (place.export / "d/during").touch()
        await asyncio.sleep(BOUND / 4)
        place.server.signal(signal.SIGCONT)
        assert await subscriber.catch_up(SECONDS) == []
        assert (place.mount.path / "d/during").exists()
        (place.export / "d/during").unlink()
        await check_seen(place, subscriber)
        assert subscriber.readings.gaps == gaps


@pytest.mark.usefixtures("may_be_lost")
async def test_the_bus_stops_for_long(place: Place) -> None:
    subscriber = place.subscriber()
    async with running(place.watched(), subscriber):
        await told(subscriber)
        place.server.signal(signal.SIGSTOP)
        await unbelieved(place)
        (place.export / "d/during").touch()
        place.server.signal(signal.SIGCONT)
        await until(place.believed, "lease")
        assert await subscriber.catch_up(SECONDS) == []
        assert (place.mount.path / "d/during").exists()
        (place.export / "d/during").unlink()
        await check_seen(place, subscriber)


@pytest.mark.usefixtures("may_be_lost")
async def test_what_was_kept_is_wiped(place: Place) -> None:
    subscriber = place.subscriber()
    async with running(place.watched(), subscriber):
        await told(subscriber)
        await place.wipe()
        await until(place.believed, "lease")
        await check_seen(place, subscriber)


async def test_a_message_is_lost(place: Place) -> None:
    """Whatever cannot be read, has another number than the next one, or comes from another process is a gap."""
    subscriber, watched = place.subscriber(), place.watched()
    async with running(watched, subscriber):
        bus = await connect(place.settings)
        try:
            for forged in (
                b"nonsense",
                message.Message("changes", bus.identity, "server", "other boot", 9, "share").encode(),
                message.Message("changes", "other stream", "server", "boot", 9, "share").encode(),
                message.Message(
                    "changes", bus.identity, "server", "x", 7, "share", changes=[("../../etc/passwd", "")]
                ).encode(),
            ):
                await told(subscriber)
                gaps = subscriber.readings.gaps
                await bus.publish("udbad.share.changes", forged)
                await told_again(place, subscriber, gaps)
        finally:
            await bus.close()
