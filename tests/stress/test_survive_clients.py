"""The mount process is killed at random under clients that know exactly what they must find: none meets an error.

UDBAD_STORM_SEED repeats the times of the kills of a run; UDBAD_KILLS: how many there are in each mode.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from tests.helpers.killing import Kills, killing
from tests.helpers.mount import REPOSITORY, UnionFactory
from tests.helpers.profile import scaled
from tests.stress.clients import CLIENTS, make_lower
from tests.stress.storm import ALLOWED_LOG
from tests.stress.test_storm import SEED
from udbad.mount import keeper

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.stress,
    pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not())),
]

KILLS = int(os.environ.get("UDBAD_KILLS", scaled("6", "500")))
SECONDS = 300.0
"""For a round of a client to end."""
ALLOWED = f"{ALLOWED_LOG}|another one takes over"
COMBINATIONS = (("notify", "requests"), ("reval", "passthrough"), ("none", "cached"))
"""Mode and io; each of either is among them, cached needs files that nobody changes directly."""


def start(names: Iterable[str], directory: Path) -> dict[str, subprocess.Popen[str]]:
    return {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.stress.clients", name, str(directory)],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    }


def under_kills(mount_kills: Kills, clients: Mapping[str, subprocess.Popen[str]], kills: int) -> list[str]:
    """Wait for the kills, and for the clients to finish; how many rounds of each there were."""
    rounds = []
    try:
        while mount_kills.count < kills and all(client.poll() is None for client in clients.values()):
            time.sleep(0.1)
        for client in clients.values():
            client.terminate()
        for name, client in clients.items():
            output, errors = client.communicate(timeout=SECONDS)
            assert client.returncode == 0, f"{name}: {errors}"
            rounds.append(f"{name} {output.strip()}")
    finally:
        for client in clients.values():
            if client.poll() is None:
                client.kill()
                client.communicate()
    return rounds


@pytest.mark.parametrize(("udba", "io"), COMBINATIONS)
def test_no_client_meets_an_error(union: UnionFactory, tmp_path: Path, udba: str, io: str) -> None:
    print(f"UDBAD_STORM_SEED={SEED}")
    make_lower(tmp_path / "base")
    mount = union(udba=udba, options=f"survive=on,io={io}", allow_log=ALLOWED, watchdog=3600)
    with killing(mount, SEED) as kills:
        rounds = under_kills(kills, start(CLIENTS, mount.path), KILLS)
    print(f"udba={udba},io={io}: {kills}; rounds: {', '.join(rounds)}")
    mount.remount()
