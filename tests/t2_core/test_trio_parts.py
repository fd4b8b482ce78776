"""The parts of trio that are not public, but let the reader know whether trio has something to do."""

from __future__ import annotations

import select

import trio

from udbad.kernel.reader import trios


def readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def test_they_are_there_and_tell() -> None:
    """Without them all works, but slower: a new version of trio that has moved them is worth knowing."""
    assert trios() == ((), -1)

    async def look() -> None:
        tasks, descriptor = trios()
        assert descriptor >= 0
        assert not tasks
        assert not readable(descriptor)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.checkpoint)
            assert len(tasks) == 1
        trio.lowlevel.current_trio_token().run_sync_soon(lambda: None)
        assert readable(descriptor)

    trio.run(look)
