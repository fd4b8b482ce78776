"""When a mount that serves imports what it did not need for that: when nobody asks for anything, or at last."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from udbad.mount import later


def loaded_after(monkeypatch: pytest.MonkeyPatch, busy_seconds: float) -> list[float]:
    """Seconds after which each module was imported, while there were requests for so long."""
    times: list[float] = []
    clock = MockClock(autojump_threshold=0.05)  # not while a thread imports
    monkeypatch.setattr(later, "import_module", lambda name: times.append(clock.current_time()))

    async def run() -> None:
        start = trio.current_time()
        await later.load_in_thread(lambda: int(min(trio.current_time() - start, busy_seconds) * 1000))
        times[:] = [time - start for time in times]

    trio.run(run, clock=clock)
    return times


def test_it_waits_for_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    times = loaded_after(monkeypatch, 1.0)
    assert len(times) == 4
    assert 1.0 < times[0] < 2.0


def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    times = loaded_after(monkeypatch, 1e6)
    assert len(times) == 4
    assert 4.0 < times[0] < 6.0
