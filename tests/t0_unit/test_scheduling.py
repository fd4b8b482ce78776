"""Turns of a thread on its processor (kernel/scheduling.py), as the kernel says them: sched_getattr(2)."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.syscalls import counted
from tests.helpers.turns import CAN_BE_ASKED_FOR, turns
from udbad import compiled
from udbad.branch import copydata, datacalls
from udbad.edge.loop import Loop
from udbad.edge.waiting import Waiting
from udbad.kernel import scheduling
from udbad.kernel.scheduling import SHORTEST, take_turns

pytestmark = pytest.mark.skipif(not CAN_BE_ASKED_FOR, reason="ok: this kernel lets nobody ask")


def in_thread(call: Callable[[], object]) -> None:
    """Let this process's own threads keep theirs."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result(10)


def test_short_turns_and_back() -> None:
    def check() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 3)
        usual = turns()
        assert usual[2] > SHORTEST
        take_turns(SHORTEST)
        assert turns() == (os.SCHED_OTHER, 3, SHORTEST)
        take_turns(0)
        assert turns() == usual

    in_thread(check)


def test_another_policy_stays() -> None:
    def check() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        before = turns()
        take_turns(SHORTEST)
        assert turns() == before

    in_thread(check)


def test_unknown_machines_and_refusals_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        before = turns()
        monkeypatch.setattr(scheduling, "_SYS_SCHED_SETATTR", 100_000)  # ENOSYS
        take_turns(SHORTEST)
        monkeypatch.setattr(scheduling, "_SYS_SCHED_GETATTR", None)
        take_turns(SHORTEST)
        assert turns() == before

    in_thread(check)


def test_who_serves_has_short_turns_and_who_reads_and_copies_beside_it() -> None:
    def serve() -> None:
        loop = Loop()
        try:
            loop.run(main, lambda begin: None)
            assert turns()[2] == SHORTEST
            waiting = Waiting(None, loop.post)  # type: ignore[arg-type]  # which asks no union
            assert waiting._readers.submit(turns).result(10)[2] == SHORTEST
            assert waiting._copiers.submit(turns).result(10)[2] == SHORTEST
            waiting.close()
        finally:
            loop.close()

    async def main() -> None:
        raise AssertionError("nothing is served, so it ends at once")

    in_thread(serve)


@pytest.mark.skipif(bool(compiled.why_not()), reason="ok: only in C does it give way")
@pytest.mark.parametrize("nanoseconds", [SHORTEST, 0])
def test_who_copies_gives_way_where_turns_are_short(tmp_path: Path, nanoseconds: int) -> None:
    (tmp_path / "source").write_bytes(bytes(copydata.KERNEL_CHUNK))

    def copy() -> Counter[str]:
        take_turns(nanoseconds)
        with (tmp_path / "source").open("rb") as source, (tmp_path / "copy").open("wb") as target:
            with counted() as calls:
                datacalls.copy_in_turns(source.fileno(), target.fileno(), copydata.KERNEL_CHUNK, 0, 0)
            assert os.fstat(target.fileno()).st_size == copydata.KERNEL_CHUNK
        return calls

    with ThreadPoolExecutor(1) as pool:
        calls = pool.submit(copy).result(60)
    if nanoseconds:
        assert calls["copy_file_range"] > 1
    else:  # to give way would be to give the rest of a long turn away
        assert calls["copy_file_range"] == 1
    assert calls["sched_yield"] == calls["copy_file_range"] - 1
