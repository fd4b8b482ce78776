"""A storm on a file server: what two clients, which believe what they are told, see of it in the end."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.helpers.merge import diff, merge, snapshot
from tests.helpers.profile import scaled
from tests.helpers.site import Site, Sshfs, site
from tests.stress.storm import ALLOWED_LOG, operations, perform, probe, together

pytestmark = [pytest.mark.fuse, pytest.mark.stress]

SEED = int(os.environ.get("UDBAD_STORM_SEED", str(random.SystemRandom().getrandbits(32))))
ROUNDS = int(os.environ.get("UDBAD_STORM_ROUNDS", scaled("1", "8")))
OPERATIONS = 400
LAYOUT = {"top": "rw", "middle": "ro+wh", "base": "ro"}


def storms(here: Site) -> None:
    """Operations on the branches, on the server, while others look through the mounts of the clients."""
    print(f"UDBAD_STORM_SEED={SEED}")
    for number in range(ROUNDS):
        seed = SEED + 100 * number
        roots = [(branch, "branch") for branch in here.branches]
        roots += [(client.mount.path, "looks") for client in here.clients]
        together(roots, seed, OPERATIONS)
        truth = here.shown(merge(zip(here.branches, (True, True, False), strict=True)))
        for client in here.clients:
            client.catch_up()
            found = diff(truth, probe(client.mount.path, truth)) + diff(truth, snapshot(client.mount.path))
            assert client.mount.control({"op": "stats"})["bugs"] == 0
            assert not found, f"UDBAD_STORM_SEED={SEED} (this storm: {seed}):\n" + "\n".join(found)


def branches(root: Path) -> dict[Path, str]:
    """With something in them."""
    found = {root / "export" / name: permission for name, permission in LAYOUT.items()}
    for number, branch in enumerate(found):
        branch.mkdir(parents=True)
        for op in operations(SEED - number, 200, True):
            perform(op, branch, True)
    return found


def test_on_a_server(tmp_path: Path) -> None:
    with site(tmp_path, Sshfs(tmp_path), branches(tmp_path), options="noplink", allow_log=ALLOWED_LOG) as here:
        storms(here)
