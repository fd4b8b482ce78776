"""The changes of the matrix, made on a file server, seen by two clients that believe what they are told.

There is one site for each state, and in it a directory for each case, as in test_matrix. What must be seen is computed
from the branches where they are, on the server. tests/nfs has the same cases for file systems of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.helpers.merge import Tree
from tests.helpers.profile import scaled
from tests.helpers.site import Client, Site, Sshfs, site
from tests.t4_coherence.changes import CHANGES, PERMISSIONS, Case, build_cases
from tests.t4_coherence.test_matrix import Scene

pytestmark = pytest.mark.fuse

STATES = ("positive", "negative", "listed")
"""What is open, or somebody's current directory, and is another object on the server by now, is the affair of the file
system: nothing that anybody tells mends it."""
CASES = [
    Case(change, at, (True, True, False)) for change in CHANGES for at in change.branches if change.branches != (1,)
]
"""But for marks of overlayfs, for which file systems of a network have no place."""
USED = scaled(CASES[::4], CASES)


@dataclass
class SharedScene(Scene):
    """One of two clients."""

    client: Client | None = None
    site: Site | None = None

    @property
    def hides_links(self) -> bool:
        """The client does not see that a file has other names, and is told that anything has changed, therefore."""
        assert self.site is not None
        return self.site.share.hides_links

    def expected(self, case: Case) -> Tree:
        assert self.site is not None
        return self.site.shown(super().expected(case))

    def settle(self) -> None:
        assert self.client is not None
        self.client.catch_up()


def scenes_of(site: Site, state: str) -> list[SharedScene]:
    # A directory that nobody has asked for may be new with the name that is told.
    looks = 1 if state == "positive" else 0
    return [
        SharedScene(client.mount, "notify", state, looks=looks, client=client, site=site) for client in site.clients
    ]


def check(scenes: list[SharedScene], case: Case) -> None:
    """A change on the server is seen by every client, and nothing else is forgotten."""
    with ExitStack() as stack:
        for scene in scenes:
            stack.enter_context(scene.warmed(case))
        case.act(scenes[0].mount.branches)
        for scene in scenes:
            scene.settle()
            if not (case.change.id == "link" and scene.hides_links):
                scene.check_quiet(case)
            scene.check(case)


@pytest.fixture(scope="module")
def scenes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SharedScene]]:
    root = tmp_path_factory.mktemp("shared")
    (root / "export").mkdir()
    branches = build_cases(root / "export", USED)
    with site(root, Sshfs(root), dict(zip(branches, PERMISSIONS, strict=True))) as here:
        yield scenes_of(here, request.param)


@pytest.mark.parametrize("scenes", scaled(STATES[1:2], STATES), indirect=True, scope="module")
@pytest.mark.parametrize("case", USED, ids=lambda case: case.id)
def test_a_change_on_the_server_is_seen(scenes: list[SharedScene], case: Case) -> None:
    check(scenes, case)
