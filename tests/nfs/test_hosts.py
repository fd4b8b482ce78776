"""Many hosts (docs/hosts.md) with the file systems of the kernel: the matrix and the storm, as with sshfs.

The clients keep what they may: nothing of what is seen is seen because a cache was too old. `settle` is short here
only to begin soon: nothing is cached yet then. UDBAD_TEST_PROFILE=soak has all cases and states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.helpers.profile import scaled
from tests.helpers.site import site
from tests.nfs.servers import Nfs, ext4
from tests.stress.storm import ALLOWED_LOG
from tests.stress.test_storm_hosts import branches, storms
from tests.t4_coherence.changes import PERMISSIONS, Case, build_cases
from tests.t4_coherence.test_hosts_matrix import STATES, USED, SharedScene, check, scenes_of

pytestmark = pytest.mark.fuse

OPTIONS = "vers=4.2,actimeo=600"


@pytest.fixture(scope="module")
def scenes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SharedScene]]:
    root = tmp_path_factory.mktemp("shared")
    with ExitStack() as stack:
        stack.enter_context(ext4(root / "export"))
        found = build_cases(root / "export", USED)
        share = Nfs(OPTIONS, 0.0)
        here = stack.enter_context(site(root, share, dict(zip(found, PERMISSIONS, strict=True))))
        yield scenes_of(here, request.param)


@pytest.mark.parametrize("scenes", scaled(STATES[1:2], STATES), indirect=True, scope="module")
@pytest.mark.parametrize("case", USED, ids=lambda case: case.id)
def test_a_change_on_the_server_is_seen(scenes: list[SharedScene], case: Case) -> None:
    check(scenes, case)


def test_a_storm(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("storm")
    with ExitStack() as stack:
        stack.enter_context(ext4(root / "export"))
        share = Nfs(OPTIONS, 0.0)
        here = site(root, share, branches(root), options="noplink", allow_log=ALLOWED_LOG)
        storms(stack.enter_context(here))
