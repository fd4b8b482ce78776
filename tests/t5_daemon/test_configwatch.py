"""Noticing changes of the configuration: every way in which people and tools replace files, without a poll's help."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from asyncinotify import Inotify

from tests.t5_daemon.daemon import DEADLINE
from udbad.supervisor import configwatch
from udbad.supervisor.configwatch import ConfigWatch, signature


@pytest.fixture(autouse=True)
def _only_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noticed is noticed by an event."""
    monkeypatch.setattr(configwatch, "SAFETY_SECONDS", 10 * DEADLINE)


@asynccontextmanager
async def watching(path: Path) -> AsyncIterator[ConfigWatch]:
    watch = ConfigWatch(path, signature(path))
    try:
        yield watch
    finally:
        watch.close()


async def noticed(watch: ConfigWatch, act: Callable[[], object]) -> None:
    """Do something once the watch waits; return when it has said so."""
    waits = asyncio.Event()
    hint = watch._hint

    async def tell() -> None:
        waits.set()
        await hint()

    watch._hint = tell  # type: ignore[method-assign]  # a barrier: what follows comes as an event
    task = asyncio.create_task(watch.changed())
    try:
        await asyncio.wait_for(waits.wait(), DEADLINE)
        act()
        await asyncio.wait_for(asyncio.shield(task), DEADLINE)
        assert watch.seen == signature(watch.path)
    finally:
        watch._hint = hint  # type: ignore[method-assign]
        task.cancel()


def replace(path: Path, text: str) -> None:
    """As editors do: a new file with the old name."""
    new = path.with_name(path.name + "~")
    new.write_text(text)
    new.rename(path)


@pytest.mark.asyncio
async def test_a_file_written_over_replaced_removed_and_back(tmp_path: Path) -> None:
    path = tmp_path / "udbad.toml"
    path.write_text("1")
    async with watching(path) as watch:
        await noticed(watch, lambda: path.write_text("2"))
        await noticed(watch, lambda: replace(path, "3"))
        await noticed(watch, lambda: replace(path, "4"))
        await noticed(watch, path.unlink)
        await noticed(watch, lambda: path.write_text("4"))


@pytest.mark.asyncio
async def test_conf_d_comes_changes_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "udbad.toml"
    path.write_text("1")
    more = tmp_path / "conf.d"
    async with watching(path) as watch:

        def together() -> None:
            more.mkdir()
            (more / "a.toml").write_text("a")

        await noticed(watch, together)
        await noticed(watch, lambda: (more / "b.toml").write_text("b"))
        await noticed(watch, lambda: replace(more / "b.toml", "c"))
        await noticed(watch, (more / "b.toml").unlink)
        await noticed(watch, lambda: more.rename(tmp_path / "conf.off"))
        await noticed(watch, lambda: (tmp_path / "conf.off").rename(more))
        await noticed(watch, lambda: (more / "a.toml").write_text("d"))


@pytest.mark.asyncio
async def test_symlinks_are_swapped_as_kubernetes_does(tmp_path: Path) -> None:
    """udbad.toml → ..data/udbad.toml, and ..data → a directory of this version, replaced by a rename."""
    base = tmp_path / "etc"
    base.mkdir()

    def version(name: str) -> None:
        (base / name).mkdir()
        (base / name / "udbad.toml").write_text(name)
        (base / "..tmp").symlink_to(name)
        (base / "..tmp").rename(base / "..data")

    version("..1")
    path = base / "udbad.toml"
    path.symlink_to("..data/udbad.toml")
    async with watching(path) as watch:
        for name in ("..2", "..3"):
            await noticed(watch, lambda: version(name))  # noqa: B023 - called in this turn
        await noticed(watch, lambda: (base / "..3" / "udbad.toml").write_text("changed behind the links"))


@pytest.mark.asyncio
async def test_a_linked_directory_on_the_way_is_swapped(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "versions" / name).mkdir(parents=True)
        (tmp_path / "versions" / name / "udbad.toml").write_text(name)
    (tmp_path / "etc").symlink_to("versions/one")
    path = tmp_path / "etc" / "udbad.toml"

    def swap() -> None:
        (tmp_path / "etc.new").symlink_to(tmp_path / "versions" / "two")
        (tmp_path / "etc.new").rename(tmp_path / "etc")

    async with watching(path) as watch:
        await noticed(watch, swap)
        await noticed(watch, lambda: replace(tmp_path / "versions" / "two" / "udbad.toml", "three"))


@pytest.mark.asyncio
async def test_what_changes_nothing_is_no_change(tmp_path: Path) -> None:
    """Events are hints: other files, a touch, the same text written anew, and what the reader knows already."""
    path = tmp_path / "udbad.toml"
    path.write_text("1")
    async with watching(path) as watch:
        looks: asyncio.Queue[None] = asyncio.Queue()
        hint = watch._hint

        async def count() -> None:
            looks.put_nowait(None)
            await hint()

        def known() -> None:
            path.write_text("2")
            watch.seen = signature(path)

        watch._hint = count  # type: ignore[method-assign]
        task = asyncio.create_task(watch.changed())
        await asyncio.wait_for(looks.get(), DEADLINE)
        for act in (lambda: (tmp_path / "other").write_text("x"), lambda: os.utime(path), lambda: path.write_text("1"),
                    lambda: replace(path, "1"), known, lambda: None):  # fmt: skip
            while not looks.empty():
                looks.get_nowait()
            act()
            (tmp_path / "event").write_text("one that certainly wakes it")
            await asyncio.wait_for(looks.get(), DEADLINE)
            assert not task.done()
        path.write_text("3")
        await asyncio.wait_for(task, DEADLINE)


@pytest.mark.asyncio
async def test_a_file_in_the_writing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "udbad.toml"
    path.write_text("1")
    texts = iter(["1", "half", "whole", "whole"])
    real = configwatch.signature

    def next_look(path_: Path) -> configwatch.Signature:
        text = next(texts, None)
        if text is not None:
            path.write_text(text)
        return real(path_)

    async with watching(path) as watch:
        monkeypatch.setattr(configwatch, "signature", next_look)
        monkeypatch.setattr(configwatch, "SETTLE_SECONDS", 0)
        await asyncio.wait_for(watch.changed(), DEADLINE)
        assert watch.seen == real(path)
        assert next(texts, None) is None, "reported before it had been the same twice"


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC])
async def test_without_inotify_it_is_polled_and_inotify_is_used_when_it_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None], number: int
) -> None:
    path = tmp_path / "udbad.toml"
    path.write_text("1")
    monkeypatch.setattr(configwatch, "POLL_SECONDS", 0.05)
    real = Inotify

    class None_(real):  # type: ignore[misc, valid-type]
        def __init__(self, **words: object) -> None:
            if number == errno.EMFILE:
                raise OSError(number, os.strerror(number))
            super().__init__(**words)

        def add_watch(self, path: object, mask: object) -> object:
            raise OSError(number, os.strerror(number))

    expect_log("no inotify for the configuration")
    monkeypatch.setattr(configwatch, "Inotify", None_)
    async with watching(path) as watch:
        await noticed(watch, lambda: replace(path, "2"))
        await noticed(watch, lambda: replace(path, "3"))
        monkeypatch.setattr(configwatch, "Inotify", real)
        monkeypatch.setattr(configwatch, "POLL_SECONDS", 10 * DEADLINE)
        await noticed(watch, lambda: replace(path, "4"))
    assert configwatch.POLL_SECONDS > DEADLINE


def test_the_signature_is_what_load_would_read(tmp_path: Path) -> None:
    path = tmp_path / "udbad.toml"
    assert [name for name, _ in signature(path)] == [str(path)]
    path.write_text("1")
    first = signature(path)
    (tmp_path / "conf.d").mkdir()
    assert signature(path) == first
    os.mkfifo(tmp_path / "conf.d" / "fifo.toml")
    (tmp_path / "conf.d" / "directory.toml").mkdir()
    (tmp_path / "conf.d" / "dangling.toml").symlink_to("nowhere")
    names = [Path(name).name for name, _ in signature(path)]
    assert names == ["udbad.toml", "dangling.toml", "directory.toml", "fifo.toml"]
