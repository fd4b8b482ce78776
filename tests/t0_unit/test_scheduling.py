"""Turns of a thread on its processor (kernel/scheduling.py), as the kernel says them: sched_getattr(2)."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from udbad.edge.loop import Loop
from udbad.edge.waiting import Waiting
from udbad.kernel import scheduling
from udbad.kernel.scheduling import _ATTRIBUTES, _SYS_SCHED_GETATTR, SHORTEST, take_turns

pytestmark = pytest.mark.skipif(
    _SYS_SCHED_GETATTR is None or tuple(map(int, os.uname().release.split(".")[:2])) < (6, 12),
    reason="ok: this kernel lets nobody ask",
)


def turns() -> tuple[int, int, int]:
    """Policy, niceness and turns (ns) of the calling thread."""
    had = ctypes.create_string_buffer(_ATTRIBUTES.size)
    assert not ctypes.CDLL(None).syscall(_SYS_SCHED_GETATTR, 0, had, len(had), 0)
    _, policy, _, nice, _, runtime, _, _ = _ATTRIBUTES.unpack(had.raw)
    return policy, nice, runtime


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


def test_who_serves_has_short_turns_and_who_copies_the_usual_ones() -> None:
    def serve() -> None:
        usual = turns()
        loop = Loop()
        try:
            loop.run(main, lambda begin: None)
            assert turns()[2] == SHORTEST
            waiting = Waiting(None, loop.post)  # type: ignore[arg-type]  # which asks no union
            assert waiting._readers.submit(turns).result(10)[2] == SHORTEST
            assert waiting._copiers.submit(turns).result(10) == usual
            waiting.close()
        finally:
            loop.close()

    async def main() -> None:
        raise AssertionError("nothing is served, so it ends at once")

    in_thread(serve)
