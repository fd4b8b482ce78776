"""Storms in which the mount process is killed at random: no client meets an error, and nothing is wrong afterwards.

UDBAD_STORM_SEED repeats the operations of a run and the times of its kills; UDBAD_KILL_ROUNDS: the number of storms in
each mode and layout. The time from a kill until the next process serves is printed (pytest -s); it is no verdict.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.mount import Mount
from tests.helpers.profile import scaled
from tests.stress.storm import ALLOWED_LOG, LAYOUTS, MODES, Arena, arena, fill
from tests.stress.test_storm import SEED, judge
from tests.t5_daemon.daemon import DEADLINE, until
from udbad.mount import keeper

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.stress,
    pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not())),
]

ROUNDS = int(os.environ.get("UDBAD_KILL_ROUNDS", scaled("1", "10")))
OPERATIONS = 300
BETWEEN = 0.1, 2.0
"""Seconds between two kills, nearer to the first."""


@contextmanager
def killing(mount: Mount, seed: int) -> Iterator[list[float]]:
    """Kill the mount process again and again; the list gets the seconds from each kill until the next one answers."""
    draw = random.Random(seed)
    pauses: list[float] = []
    enough = threading.Event()

    def kill() -> None:
        pid = mount.control({"op": "status"})["pid"]
        while not enough.wait(draw.triangular(*BETWEEN, BETWEEN[0])):
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            pid = mount.control({"op": "status"})["pid"]
            pauses.append(time.monotonic() - began)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield pauses
    finally:
        enough.set()
        thread.join(DEADLINE)


def swept(here: Arena) -> bool:
    """Whether the last process has taken away what those before it have left."""
    _, _, last = here.mount.log().rpartition("goes on in process")
    return last.count(": swept ") == here.layout.count("rw")


@pytest.mark.parametrize("layout", LAYOUTS, ids=":".join)
@pytest.mark.parametrize("udba", MODES)
def test_a_storm(tmp_path: Path, udba: str, layout: tuple[str, ...]) -> None:
    print(f"UDBAD_STORM_SEED={SEED}")
    with arena(tmp_path, udba, layout, "noplink,survive=on", f"{ALLOWED_LOG}|another one takes over") as here:
        fill(here, SEED, 200)
        for number in range(ROUNDS):
            seed = SEED + 100 * number
            with killing(here.mount, seed) as pauses:
                here.storm(seed, OPERATIONS)
            if pauses:
                print(f"{len(pauses)} kills, pause {min(pauses) * 1000:.0f} to {max(pauses) * 1000:.0f} ms")
                until(lambda: swept(here), "the end of sweeping")
            judge(here.check(fresh=False), seed)
