"""sd_notify(3): tell the service manager what the supervisor does; nothing happens without NOTIFY_SOCKET."""

from __future__ import annotations

import logging
import os
import socket
import time

log = logging.getLogger(__name__)


def notify(*words: str, timeout: float = 1.0) -> None:
    """Send assignments such as READY=1. Failing is never a reason not to go on.

    timeout: seconds that the event loop may stand still for a service manager that is slow to read; a state
    that is not told would be missed for good.
    """
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(timeout)
            sock.sendto("\n".join(words).encode(), address)
    except BlockingIOError:
        return  # a sign of life that found no room
    except OSError as error:
        log.warning("sd_notify: %s", str(error) or type(error).__name__)


def reloading() -> None:
    """systemd's Type=notify-reload wants to know when the reload began."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def alive() -> None:
    """A sign of life. Not waited for: the next one comes soon."""
    notify("WATCHDOG=1", timeout=0.0)


def watchdog_interval() -> float | None:
    """Seconds between signs of life that the service manager wants; None when it wants none of this process."""
    try:
        microseconds = int(os.environ.get("WATCHDOG_USEC", "0"))
        pid = int(os.environ.get("WATCHDOG_PID", str(os.getpid())))
    except ValueError:
        return None
    return microseconds / 2e6 if microseconds > 0 and pid == os.getpid() else None
