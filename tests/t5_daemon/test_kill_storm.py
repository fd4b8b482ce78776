"""kill -9 of mount processes again and again under load: the others miss nothing, and the killed one comes back.

UDBAD_KILLS: how often each of the three is killed (default 3, in make soak 8). The time from the kill until the
mount answers again is reported (pytest -s), and in the properties of the test; it is no verdict, machines differ.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.profile import scaled
from tests.t5_daemon.daemon import DEADLINE, Daemon, until

pytestmark = [pytest.mark.fuse, pytest.mark.stress]

KILLS = int(os.environ.get("UDBAD_KILLS", scaled("3", "8")))
DEAD = {errno.ENOTCONN, errno.ECONNABORTED}


class Load:
    """Reads, lists, writes and removes through one mount, in a thread, and checks each answer."""

    def __init__(self, point: Path) -> None:
        self.point = point
        self.operations = 0
        self.unavailable = 0
        self.wrong: list[str] = []
        self.may_die = False
        self.turns = 0
        self._answers: deque[tuple[float, float]] = deque(maxlen=100_000)
        """Begin and end of every operation that succeeded (time.monotonic)."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()

    def _work(self) -> None:
        while not self._stop.is_set():
            self.turns += 1
            for step in (self._list, self._read, partial(self._write, self.turns)):
                # Asked before: an error after the time of the kills is an error.
                may_die = self.may_die
                try:
                    began = time.monotonic()
                    step()
                except OSError as error:
                    if may_die and (error.errno in DEAD or (error.errno == errno.ENOENT and step is not self._list)):
                        self.unavailable += 1
                        continue
                    self.wrong.append(f"{error!r}")
                else:
                    self.operations += 1
                    self._answers.append((began, time.monotonic()))

    def first_after(self, begin: float) -> float | None:
        """When the first operation that began after `begin` had its answer."""
        return next((end for began, end in list(self._answers) if began > begin), None)

    def _list(self) -> None:
        names = os.listdir(self.point)
        if "file" not in names:
            self.wrong.append(f"listed {names}")

    def _read(self) -> None:
        text = (self.point / "file").read_text()
        if text != "base":
            self.wrong.append(f"read {text!r}")

    def _write(self, turn: int) -> None:
        path = self.point / f"new{turn % 7}"
        path.write_text(str(turn))
        if path.read_text() != str(turn):
            self.wrong.append(f"{path} lost {turn}")
        path.unlink()


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not: its state in proc_pid_stat(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextmanager
def loads(points: dict[str, Path]) -> Iterator[dict[str, Load]]:
    running = {name: Load(point) for name, point in points.items()}
    for load in running.values():
        load.__enter__()
    try:
        yield running
    finally:
        for load in running.values():
            load.__exit__()


@pytest.mark.asyncio
async def test_kill_each_mount_process_under_load(
    daemon: Daemon, record_property: Callable[[str, object], None]
) -> None:
    # Being killed once a second is not what the waiting time between restarts is made for.
    daemon.settings.update(healthy_after=0, log_level="info")
    points = {name: daemon.add(name, udba="reval") for name in "abc"}
    for name in points:
        (daemon.branch(name, "base") / "file").write_text("base")
    await asyncio.to_thread(daemon.start)
    times: list[float] = []
    with loads(points) as running:
        for name, load in running.items():
            load.may_die = True
            begun = load.turns
            # What is under way was begun under the other rule.
            await asyncio.to_thread(until, lambda: load.turns > begun + 1, "the next turn")  # noqa: B023 - awaited in this turn
            others = [other for other in running if other != name]
            before = {other: running[other].operations for other in others}
            for _ in range(KILLS):
                state = await asyncio.to_thread(daemon.wait_for, name)
                os.kill(state["pid"], signal.SIGKILL)
                killed = time.monotonic()
                await asyncio.to_thread(until, lambda: gone(state["pid"]), "the end of the process")  # noqa: B023 - as above
                dead = time.monotonic()
                answered = await asyncio.to_thread(until, lambda: load.first_after(dead), f"{name} answers")  # noqa: B023 - as above
                times.append(answered - killed)
                after = await asyncio.to_thread(daemon.wait_for, name, "serving", state["pid"])
                assert after["restarts"] == state["restarts"] + 1
            load.may_die = False
            for other in others:
                assert not running[other].wrong, (other, running[other].wrong[:5])
                assert running[other].operations > before[other]
            assert not load.wrong, (name, load.wrong[:5])
    assert not any(load.wrong for load in running.values()), {n: load.wrong[:5] for n, load in running.items()}
    times.sort()
    p99 = times[min(len(times) - 1, round(0.99 * len(times)))]
    figures = {"kills": len(times), "p50": statistics.median(times), "p99": p99, "max": times[-1],
               "operations": sum(load.operations for load in running.values())}  # fmt: skip
    for key, value in figures.items():
        record_property(key, value)
    print("kill to serving:", ", ".join(f"{key} {value:.3g}" for key, value in figures.items()))
    await asyncio.to_thread(daemon.stop)
