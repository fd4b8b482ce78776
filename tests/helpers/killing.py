"""Killing the process of a mount again and again, while others use the mount; and stopping one."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.helpers.mount import DEADLINE, Mount
from udbad.mount import held, keeper

BETWEEN: Final = 0.1, 2.0
"""Seconds between two kills, nearer to the first."""
EARLY: Final = 0.2
"""How many of the kills meet a process that has not taken over yet."""
EARLY_SECONDS: Final = 0.3


@dataclass
class Kills:
    """count: all of them. pauses: seconds from a kill until the next process answers."""

    count: int = 0
    pauses: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.pauses:
            return f"{self.count} kills"
        ordered = sorted(self.pauses)
        at = [ordered[int(part * (len(ordered) - 1))] * 1000 for part in (0.5, 0.99, 1)]
        return f"{self.count} kills, pause {at[0]:.0f} ms, p99 {at[1]:.0f}, at most {at[2]:.0f}"


def workers(guardian: int) -> list[int]:
    """The mount process under a guardian; none while one ends, two while that takes its time."""
    found = []
    with suppress(FileNotFoundError):
        for pid in Path(f"/proc/{guardian}/task/{guardian}/children").read_text().split():
            with suppress(OSError):
                _, name, state = re.split(r" \(|\) ", Path(f"/proc/{pid}/stat").read_text(), maxsplit=2)
                if name not in (keeper.NAME, held.NAME) and state[0] not in "ZX":
                    found.append(int(pid))
    return found


def worker(guardian: int) -> int:
    """The mount process, when those that were killed before it have ended."""
    end = time.monotonic() + DEADLINE
    while len(found := workers(guardian)) != 1:
        assert time.monotonic() < end, f"mount processes: {found}"
        time.sleep(0.01)
    return found[0]


def stop(pid: int) -> None:
    """SIGSTOP, and return when no thread of it runs any more: one on another processor goes on until it is told."""
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + DEADLINE
    while any(
        task.read_text().rpartition(")")[2].split()[0] != "T" for task in Path(f"/proc/{pid}/task").glob("*/stat")
    ):
        assert time.monotonic() < end, f"{pid} does not stop"
        time.sleep(0.001)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process stands still, so that what it has to be told piles up. Nobody may touch its mount meanwhile."""
    stop(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def answered(path: Path) -> None:
    """Return when a request was, at a mount point, one that the kernel can answer by itself in no mode.

    Not a command: it waits for trio as well, which a successor imports afterwards.
    """
    try:
        os.getxattr(path, "user.nothing")
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise


@contextmanager
def killing(mount: Mount, seed: int, between: tuple[float, float] = BETWEEN) -> Iterator[Kills]:
    """Kill the mount process (survive=on) again and again, some before they serve."""
    draw = random.Random(seed)
    kills = Kills()
    enough = threading.Event()
    problems: list[Exception] = []

    def kill() -> None:
        while not enough.wait(draw.triangular(*between, between[0])):
            pid = worker(mount.process.pid)
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            kills.count += 1
            while draw.random() < EARLY:
                time.sleep(draw.uniform(0, EARLY_SECONDS))
                for other in workers(mount.process.pid):
                    with suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
                        kills.count += 1
                began = time.monotonic()
            answered(mount.path)
            kills.pauses.append(time.monotonic() - began)

    def run() -> None:
        try:
            kill()
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield kills
    finally:
        enough.set()
        thread.join(2 * DEADLINE)
    if problems:
        raise problems[0]
