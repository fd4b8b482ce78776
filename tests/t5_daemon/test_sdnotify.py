"""sd_notify(3) alone; that the daemon says the right things at the right time is in test_daemon.py."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from udbad.supervisor import sdnotify


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """What systemd listens on: an abstract socket, whose name begins with @ in the environment."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    listening.bind(f"\0udbad-test-{os.getpid()}")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@udbad-test-{os.getpid()}")
    return listening


def test_words_arrive_in_one_message(manager: socket.socket) -> None:
    with manager:
        sdnotify.notify("READY=1", "STATUS=all is well")
        assert manager.recv(4096) == b"READY=1\nSTATUS=all is well"
        sdnotify.reloading()
        first, second = manager.recv(4096).decode().split("\n")
        assert (first, second.partition("=")[0]) == ("RELOADING=1", "MONOTONIC_USEC")
        assert int(second.partition("=")[2]) > 0
        sdnotify.alive()
        assert manager.recv(4096) == b"WATCHDOG=1"


def test_a_manager_that_does_not_read_holds_up_nobody(
    manager: socket.socket, expect_log: Callable[[str], None]
) -> None:
    with manager:
        # unix(7): a datagram queue has net.unix.max_dgram_qlen messages; signs of life past it are dropped.
        for _ in range(2000):
            sdnotify.alive()
        expect_log("sd_notify: timed out")
        sdnotify.notify("READY=1", timeout=0.01)


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    sdnotify.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    expect_log("sd_notify: .*No such file")
    sdnotify.notify("READY=1")


@pytest.mark.parametrize(
    ("microseconds", "pid", "interval"),
    [
        (None, None, None), ("0", None, None), ("often", None, None), ("3000000", None, 1.5), ("3000000", "own", 1.5),
        ("3000000", "1", None), ("-1", None, None),
    ],
)  # fmt: skip
def test_how_often_a_sign_of_life_is_wanted(
    monkeypatch: pytest.MonkeyPatch, microseconds: str | None, pid: str | None, interval: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert sdnotify.watchdog_interval() == interval
