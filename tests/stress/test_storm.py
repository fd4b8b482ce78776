"""Storms of bounded length in every mode; `make soak MINUTES=N` goes on for longer.

UDBAD_STORM_SEED repeats the operations of a run (the seed is printed, and part of every failure);
UDBAD_STORM_ROUNDS is the number of storms in each mode and layout.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.helpers.profile import scaled
from tests.stress.storm import LAYOUTS, MODES, arena, fill

pytestmark = [pytest.mark.fuse, pytest.mark.stress]

SEED = int(os.environ.get("UDBAD_STORM_SEED", str(random.SystemRandom().getrandbits(32))))
ROUNDS = int(os.environ.get("UDBAD_STORM_ROUNDS", scaled("2", "8")))
CLIENT_OPERATIONS = 400
"""Operations of each process in one storm."""
TURNS = 600
"""Operations of one storm in step."""
FRESH_EVERY = 2
"""Storms after which a new mount is compared, too: between them the caches stay warm."""


def judge(found: list[str], seed: int) -> None:
    assert not found, f"UDBAD_STORM_SEED={SEED} (this storm: {seed}):\n" + "\n".join(found)


def storms(tmp_path: Path, udba: str, layout: tuple[str, ...], options: str = "noplink") -> None:
    print(f"UDBAD_STORM_SEED={SEED}")
    with arena(tmp_path, udba, layout, options) as here:
        fill(here, SEED, 200)
        for number in range(ROUNDS):
            seed = SEED + 100 * number
            here.storm(seed, CLIENT_OPERATIONS)
            judge(here.check(fresh=number % FRESH_EVERY == FRESH_EVERY - 1), seed)


@pytest.mark.parametrize("layout", LAYOUTS, ids=":".join)
@pytest.mark.parametrize("udba", MODES)
def test_processes_at_the_same_time(tmp_path: Path, udba: str, layout: tuple[str, ...]) -> None:
    storms(tmp_path, udba, layout)


def test_whole_file_systems_are_watched(tmp_path: Path) -> None:
    storms(tmp_path, "notify", LAYOUTS[0], "noplink,watch=fanotify")


@pytest.mark.parametrize("layout", LAYOUTS, ids=":".join)
@pytest.mark.parametrize("udba", MODES)
def test_in_step(tmp_path: Path, udba: str, layout: tuple[str, ...]) -> None:
    """One operation at a time, looked at often: what fails here fails again with the same seed."""
    print(f"UDBAD_STORM_SEED={SEED}")
    with arena(tmp_path, udba, layout) as here:
        fill(here, SEED, 200)
        for number in range(ROUNDS):
            seed = SEED + 100 * number
            here.in_step(here.turns(seed, TURNS))
            judge(here.check(fresh=number % FRESH_EVERY == FRESH_EVERY - 1), seed)
