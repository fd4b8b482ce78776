"""Storms in which the mount process is killed at random: no client meets an error, and nothing is wrong afterwards.

UDBAD_STORM_SEED repeats the operations of a run and the times of its kills; UDBAD_KILL_ROUNDS: the number of storms in
each mode and layout. The time from a kill until the next process serves is printed (pytest -s); it is no verdict.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.killing import killing
from tests.helpers.profile import scaled
from tests.stress.storm import ALLOWED_LOG, LAYOUTS, MODES, Arena, arena, fill
from tests.stress.test_storm import SEED, judge
from tests.t5_daemon.daemon import until
from udbad.mount import keeper

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.stress,
    pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not())),
]

ROUNDS = int(os.environ.get("UDBAD_KILL_ROUNDS", scaled("1", "10")))
OPERATIONS = 300


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
            with killing(here.mount, seed) as kills:
                here.storm(seed, OPERATIONS)
            print(kills)
            if kills.pauses:
                until(lambda: swept(here), "the end of sweeping")
            judge(here.check(fresh=False), seed)
