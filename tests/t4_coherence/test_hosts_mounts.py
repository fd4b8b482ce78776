"""What is changed through a mount, told by the mount itself, as nobody watches the files (mount/publishing.py).

One mount has a directory as its branch, the other one the same by sshfs, which it believes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bus import SECONDS, bus_server, is_believed, sshfs
from tests.helpers.mount import Mount, UnionFactory, mounted
from udbad.hosts.bus import BusSettings
from udbad.hosts.link import MountLink
from udbad.hosts.ownchanges import OwnChanges
from udbad.hosts.subscriber import Following, Subscriber
from udbad.mount.publishing import MOST_BYTES

pytestmark = [pytest.mark.fuse, pytest.mark.asyncio]


@dataclass
class Pair:
    """far changes files; near believes what it is told of that."""

    settings: BusSettings
    export: Path
    branch: Path
    far: Mount
    near: Mount

    def take(self) -> dict[str, Any]:
        return self.far.control({"op": "published", "branches": [str(self.export)], "wait": False})

    def changed(self) -> set[str]:
        answer = self.take()
        assert not answer["all"]
        return {path for path, _ in answer["changes"]}

    @asynccontextmanager
    async def told(self) -> AsyncIterator[tuple[Subscriber, OwnChanges]]:
        """While the near mount believes what the far one tells."""
        link = MountLink("", "far", "", str(self.far.control_path))
        own = OwnChanges(self.settings, "far", link, {"share": str(self.export)})
        following = Following("share", str(self.branch), SECONDS, 0.0, ["far"])
        near = MountLink("", "near", str(self.branch), str(self.near.control_path))
        subscriber = Subscriber(self.settings, following, near)
        tasks = [asyncio.create_task(own.run()), asyncio.create_task(subscriber.run())]
        try:
            assert await subscriber.catch_up(SECONDS) == []
            assert self.is_believed()
            yield subscriber, own
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def is_believed(self) -> bool:
        return is_believed(self.near)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("mounts")
    export = root / "export"
    (export / "d").mkdir(parents=True)
    (export / "d/old").write_text("old")
    base = root / "base"
    (base / "low/sub").mkdir(parents=True)
    for name in ("low/kept", "low/gone", "low/sub/f"):
        (base / name).write_text("low")
    with (
        bus_server("nats", root / "bus") as server,
        sshfs(export, root / "ssh") as branch,
        mounted([f"{export}=rw", f"{base}=ro"], root / "far", "notify", "io=requests") as far,
        mounted(
            [f"{branch}=ro+wh", f"{base}=ro"], root / "near", "notify", allow_log="nobody vouches for it any more"
        ) as near,
    ):
        yield Pair(BusSettings((server.url,), seconds=1.0), export, branch, far, near)


async def test_changes_through_another_mount_are_seen(pair: Pair) -> None:
    far, near = pair.far.path / "d", pair.near.path / "d"
    async with pair.told() as (subscriber, _):

        async def heard() -> None:
            assert await subscriber.catch_up(SECONDS) == []

        assert not (near / "new").exists()
        (far / "new").write_text("1")
        await heard()
        assert (near / "new").read_text() == "1"
        with (far / "new").open("a") as file:
            file.write("2")
            file.flush()
            await heard()
            assert (near / "new").read_text() == "12"
            assert pair.is_believed()
        (far / "new").chmod(0o600)
        await heard()
        assert (near / "new").stat().st_mode & 0o777 == 0o600
        assert not (near / "moved").exists()
        (far / "new").rename(far / "moved")
        await heard()
        assert sorted(os.listdir(near)) == ["moved", "old"]
        assert (near / "moved").read_text() == "12"
        (far / "moved").unlink()
        await heard()
        assert sorted(os.listdir(near)) == ["old"]
        assert not (near / "a").exists()
        (far / "a/b/c").mkdir(parents=True)
        (far / "a/b/c/f").touch()
        await heard()
        assert (near / "a/b/c/f").exists()
        (far / "a").rename(far / "z")
        await heard()
        assert (near / "z/b/c/f").exists()
        assert not (near / "a").exists()
        (far / "z/b/c/f").unlink()
        for path in ("z/b/c", "z/b", "z"):
            (far / path).rmdir()
        await heard()
        assert not (near / "z").exists()
        assert pair.is_believed()


async def test_copy_ups_and_whiteouts_are_seen(pair: Pair) -> None:
    """What hides, on the branch that both have, what both have below it."""
    far, near = pair.far.path / "low", pair.near.path / "low"
    async with pair.told() as (subscriber, _):

        async def heard() -> None:
            assert await subscriber.catch_up(SECONDS) == []

        assert sorted(os.listdir(near)) == ["gone", "kept", "sub"]
        assert [(near / name).read_text() for name in ("gone", "kept", "sub/f")] == ["low"] * 3
        (far / "sub/f").write_text("copied up")
        await heard()
        assert (near / "sub/f").read_text() == "copied up"
        (far / "kept").chmod(0o600)
        await heard()
        assert (near / "kept").stat().st_mode & 0o777 == 0o600
        (far / "gone").unlink()
        await heard()
        assert not (near / "gone").exists()
        (far / "sub/f").unlink()
        (far / "sub").rmdir()
        await heard()
        assert not (near / "sub").exists()
        (far / "sub").mkdir()
        await heard()
        assert os.listdir(near / "sub") == []
        assert sorted(os.listdir(near)) == ["kept", "sub"]


async def test_what_is_written_to_is_told_alone(pair: Pair) -> None:
    """By sshfs nobody sees that a file has other names: so all that is known may be of it, once it has."""
    far, near = pair.far.path / "d", pair.near.path / "d"
    async with pair.told() as (subscriber, _):

        async def lookups_after_a_write() -> int:
            (near / "old").stat()
            before = pair.near.requests()["lookup"]
            (far / "written").write_text("1")
            assert await subscriber.catch_up(SECONDS) == []
            (near / "old").stat()
            return pair.near.requests()["lookup"] - before

        (far / "written").touch()
        assert await subscriber.catch_up(SECONDS) == []
        assert await lookups_after_a_write() == 0
        os.link(far / "written", far / "linked")
        assert await lookups_after_a_write() > 0
        for name in ("written", "linked"):
            (far / name).unlink()
        assert await subscriber.catch_up(SECONDS) == []


async def test_what_a_dead_process_had_collected(pair: Pair) -> None:
    """Nobody will tell of it: it may be anything."""
    async with pair.told() as (subscriber, own):
        near = pair.near.path / "d/lost"
        assert not near.exists()
        async with own._asking:
            (pair.far.path / "d/lost").touch()
            pair.take()  # as if the process had died with it
            own._boot = "of that process"
        assert await subscriber.catch_up(SECONDS) == []
        assert near.exists()
        (pair.far.path / "d/lost").unlink()
        assert await subscriber.catch_up(SECONDS) == []
        assert not near.exists()


async def test_what_is_collected(pair: Pair) -> None:
    """Only what was changed, each path once; of a file that is open for writing once more when it is closed."""
    far = pair.far.path / "d"
    pair.take()
    (far / "old").stat()
    os.listdir(far)
    assert pair.changed() == set()
    file = os.open(far / "old", os.O_WRONLY)
    try:
        assert pair.changed() == set()
        for _ in range(5):
            os.write(file, b"old")
        assert pair.changed() == {"d/old"}
        assert pair.changed() == {"d/old"}
    finally:
        os.close(file)
    pair.far.control({"op": "flush"})
    pair.changed()
    assert pair.changed() == set()
    (far / "sub").mkdir()
    (far / "sub").rmdir()
    assert {"d/sub", "d/sub/"} <= pair.changed() <= {"d", "d/sub", "d/sub/"}


async def test_too_much_is_everything(pair: Pair) -> None:
    far = pair.far.path / "d"
    pair.take()
    file = os.open(far, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for number in range(MOST_BYTES // 250 // 2 + 1):
            name, other = f"{number:0240}", f"{number:0239}x"
            os.symlink("x", name, dir_fd=file)
            os.rename(name, other, src_dir_fd=file, dst_dir_fd=file)
            os.unlink(other, dir_fd=file)
    finally:
        os.close(file)
    with (far / "old").open("w") as stream:
        stream.write("old")
        stream.flush()
        answer = pair.take()
        assert (answer["all"], answer["changes"]) == (True, [])
        assert pair.changed() == {"d/old"}, "what was written may reach a file server when it is closed"


async def test_another_strategy_is_noticed(pair: Pair) -> None:
    """It is not asked of what was changed before somebody listens to it."""
    boot = pair.take()["boot"]
    assert pair.take()["boot"] == boot
    pair.far.control({"op": "udba", "mode": "reval"})
    pair.far.control({"op": "udba", "mode": "notify"})
    assert pair.take()["boot"] != boot


async def test_what_the_kernel_writes_is_not_known(union: UnionFactory) -> None:
    mount = union({"top": "rw"}, "notify", "io=passthrough")
    answer = mount.control({"op": "published", "branches": [str(mount["top"])], "wait": False})
    assert not answer["ok"]
    assert "needs io=requests" in answer["error"]


async def test_below_a_redirect_it_may_be_anything(union: UnionFactory) -> None:
    """Others may have that under its old name."""
    mount = union({"top": "rw", "base": "ro"}, "notify", "dirren=on,io=requests")
    (mount["base"] / "old").mkdir()
    (mount["base"] / "old/f").touch()
    question = {"op": "published", "branches": [str(mount["base"])], "wait": False}
    mount.control(question)
    (mount.path / "old").rename(mount.path / "new")
    mount.control(question)
    (mount.path / "new/f").write_text("1")
    assert mount.control(question)["all"]


async def test_what_is_moved_down(union: UnionFactory) -> None:
    """With the directories that are made for it."""
    mount = union({"top": "rw", "base": "rw"}, "notify", "io=requests")
    (mount["top"] / "a/b").mkdir(parents=True)
    for name in ("a/b/f", "g"):
        (mount["top"] / name).touch()
    question = {"op": "published", "branches": [str(mount["base"])], "wait": False}
    mount.control(question)
    for name, told in (("a/b/f", {"a", "a/b/"}), ("g", {"./"})):
        assert mount.control({"op": "mvdown", "path": name})["ok"]
        answer = mount.control(question)
        assert told <= {path for path, _ in answer["changes"]}, answer
        assert (mount["base"] / name).exists()
