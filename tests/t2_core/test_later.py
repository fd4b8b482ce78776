"""When a mount that serves imports what it did not need for that: when nobody asks for anything, or at last."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from udbad.mount import later


class Clock:
    """A time that passes when somebody waits, and what was done at which time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.done: list[tuple[float, str]] = []

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def note(self, what: str) -> None:
        self.done.append((self.now - 100.0, what))


class Poll:
    """select.poll of a world in which nothing else happens."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._fds: list[int] = []

    def register(self, fd: int, events: int) -> None:
        self._fds.append(fd)

    def poll(self, milliseconds: float) -> list[int]:
        ready = [fd for fd in self._fds if os.eventfd_read(fd)] if self._fds else []
        if not ready:
            self._clock.wait(milliseconds / 1000)
        return ready


def loaded(monkeypatch: pytest.MonkeyPatch, busy_seconds: float, *wanted: int) -> list[tuple[float, str]]:
    """What was imported after how many seconds, and when the rest could begin, while requests came for so long."""
    clock = Clock()
    monkeypatch.setattr(later, "import_module", clock.note)
    monkeypatch.setattr(later, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.wait))
    monkeypatch.setattr(later, "select", SimpleNamespace(poll=lambda: Poll(clock), POLLIN=1))
    requests = lambda: int(min(clock.now - 100.0, busy_seconds) * 1000)  # noqa: E731
    later._load(requests, wanted, lambda: clock.note("begin"))
    assert [what for _, what in clock.done] == [later._BESIDE, "begin", *later._MODULES]
    return clock.done


def test_it_waits_for_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1.0 < loaded(monkeypatch, 1.0)[0][0] < 2.0


def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [seconds for seconds, _ in loaded(monkeypatch, 1e6)]
    assert times[0] > 4.0
    assert times[-1] < 6.0


def test_it_does_not_let_anybody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has a command for the mount; the rest has time."""
    fd = os.eventfd(1)
    try:
        done = loaded(monkeypatch, 1.0, fd)
    finally:
        os.close(fd)
    assert [seconds for seconds, _ in done[:2]] == [0.0, 0.0]
    assert 1.0 < done[2][0] < 2.0


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), ImportError("Too many open files")], ids=repr)
def test_it_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expect_log: Callable[[str], None],
    error: Exception,
) -> None:
    expect_log("beside is not to be had.*tried again: .*Too many open files")
    failures = [error] * 3
    attempts: list[str] = []

    def import_module(name: str) -> None:
        attempts.append(name)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(later, "import_module", import_module)
    monkeypatch.setattr(later, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda seconds: None))
    later._load(lambda: 0, (), lambda: attempts.append("begin"))
    assert attempts == [later._BESIDE] * 4 + ["begin", *later._MODULES]
    assert len(caplog.records) == 1
