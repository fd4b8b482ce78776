"""SIGKILL of the mount process in a storm of changes: what was acknowledged holds, and no debris is left.

UDBAD_CRASH_ROUNDS: rounds over all modes together (default 20, in make soak 200). UDBAD_CRASH_SEED: repeats the choices
of a run (the moments of the kills are never quite the same); the seed is printed.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.merge import diff, merge, snapshot
from tests.helpers.mount import REPOSITORY, Mount, mounted
from tests.helpers.profile import scaled
from tests.system.storm import DIRECTORIES, NAMES, RECORD, State, read_state, record, replay
from tests.system.support import MODES, OTHERS_LOG, clean_env, each_mode, unchanged
from tests.t5_daemon.daemon import until

pytestmark = [pytest.mark.system, pytest.mark.fuse, pytest.mark.stress]

ROUNDS = int(os.environ.get("UDBAD_CRASH_ROUNDS", scaled("20", "200")))
SEED = int(os.environ.get("UDBAD_CRASH_SEED", str(random.SystemRandom().getrandbits(32))))
ROUNDS_PER_TREE = 10
"""After so many rounds the layers are made anew, or all would end up in the top layer."""
LONGEST_STORM = 0.35
"""Seconds from the first operation to the latest kill."""
CLIENTS = ("a", "b")
"""Each storms a directory of this name, so that requests of two clients are in flight."""
DEADLINE = 20.0

TEMPORARY = re.compile(rb"\.wh\.\.wh\..*\.[0-9a-f]{4,}", re.DOTALL)
# NAME beside .wh.NAME, which a crash may leave, is worth a warning to the daemon.
ALLOWED_LOG = r"and its whiteout are both in branch|" + OTHERS_LOG


def make_layers(directory: Path, random_: random.Random) -> tuple[Path, Path, Path]:
    """Three layers below `directory`: an empty top, a middle with whiteouts and opaque directories, a base."""
    top, middle, base = (directory / name for name in ("top", "middle", "base"))
    top.mkdir(parents=True)
    for client in CLIENTS:
        for layer in (base, middle):
            for place in ["", *DIRECTORIES, *(f"{name}/n0" for name in DIRECTORIES)]:
                (layer / client / place).mkdir(parents=True, exist_ok=True)
                for name in NAMES[1:]:
                    if random_.random() < 0.4:
                        size = RECORD * random_.choice((0, 1, 5, 5, 5, 1500))
                        data = record(f"{layer.name}/{client}/{place}/{name}") * (size // RECORD)
                        (layer / client / place / name).write_bytes(data)
                    elif layer == middle and random_.random() < 0.3:
                        (layer / client / place / f".wh.{name}").touch(0o444)
        (middle / client / DIRECTORIES[1] / ".wh..wh..opq").touch(0o444)
    return top, middle, base


@contextmanager
def clients(root: Path, journals: dict[str, Path], seed: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The storming processes; leaving the block waits for them, which end when the mount dies."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.system.storm", root / name, journal, str(seed + n), str(DEADLINE)],
            cwd=REPOSITORY,
            env=clean_env(),
            stderr=subprocess.PIPE,
        )
        for n, (name, journal) in enumerate(journals.items())
    ]
    try:
        yield processes
        for process in processes:
            _, errors = process.communicate(timeout=DEADLINE)
            assert process.returncode == 0, errors.decode(errors="replace")
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=DEADLINE)


def wait_started(journals: dict[str, Path], processes: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + DEADLINE
    for journal in journals.values():
        while not journal.exists() or journal.stat().st_size == 0:
            assert time.monotonic() < end, "the storm does not begin"
            assert all(process.poll() is None for process in processes), "a client ended before the storm began"
            time.sleep(0.002)


def explain(actual: State, without: State, with_: State) -> str:
    """Where a state differs from both states that it may be."""
    lines = []
    for path in sorted(actual.keys() | without.keys() | with_.keys()):
        nodes = [state.get(path) for state in (actual, without, with_)]
        if nodes[0] not in nodes[1:]:
            shown = [None if node is None else (node.mode, node.content and node.content[:40]) for node in nodes]
            lines.append(f"{path}: is {shown[0]}, may be {shown[1]} or {shown[2]}")
    return "\n".join(lines) or "a mixture of the state before and after the operation in doubt"


def debris(*branches: Path) -> list[bytes]:
    """Temporary names anywhere in the branches."""
    return [
        os.path.join(directory, name)
        for branch in branches
        for directory, directories, files in os.walk(os.fsencode(branch))
        for name in directories + files
        if TEMPORARY.fullmatch(name)
    ]


def crash_once(mount: Mount, states: dict[str, State], scratch: Path, random_: random.Random) -> None:
    """One storm, one kill, one look at what is left; `states` is brought up to date."""
    journals = {name: scratch / f"journal-{name}" for name in CLIENTS}
    with clients(mount.path, journals, random_.getrandbits(32)) as processes:
        wait_started(journals, processes)
        time.sleep(random_.uniform(0, LONGEST_STORM))  # the random moment
        mount.kill()
    mount.remount()
    for name, journal in journals.items():
        without, with_, doubt = replay(states[name], journal)
        actual = read_state(mount.path / name)
        assert actual in (without, with_), f"{name}, in doubt {doubt}:\n{explain(actual, without, with_)}"
        states[name] = actual
        journal.unlink()
    top, middle, base = mount.branches
    assert diff(snapshot(mount.path), merge([(top, True), (middle, True), (base, False)])) == []
    until(lambda: not debris(top, middle, base), "the sweep, which begins beside the mount")


@each_mode
def test_kill_in_a_storm(udba: str, tmp_path: Path) -> None:
    random_ = random.Random(f"{SEED} {udba}")
    rounds = -(-ROUNDS // len(MODES))
    print(f"UDBAD_CRASH_SEED={SEED}, {rounds} rounds under udba={udba}")
    done = 0
    while done < rounds:
        top, middle, base = make_layers(tmp_path / f"after{done}", random_)
        branches = [f"{top}=rw", f"{middle}=ro+wh", f"{base}=ro"]
        with unchanged(middle, base), mounted(branches, tmp_path / "mnt", udba, allow_log=ALLOWED_LOG) as mount:
            states = {name: read_state(mount.path / name) for name in CLIENTS}
            for _ in range(min(ROUNDS_PER_TREE, rounds - done)):
                done += 1
                try:
                    crash_once(mount, states, tmp_path, random_)
                except BaseException as error:
                    error.add_note(f"in round {done} of UDBAD_CRASH_SEED={SEED}, layers {top.parent}")
                    raise
