"""Events from elsewhere (`udbad feed`) make right what nothing here tells of: udba=none, for the mount or a branch.

The changes are those of the matrix. What is told is what a file server would: the paths on the branch of which
anything is another now, a whiteout's own name and not the one it hides, and no directory for a name in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory, mounted
from tests.helpers.profile import scaled
from tests.t4_coherence.changes import CASES, PERMISSIONS, Case, build_cases
from tests.t4_coherence.test_matrix import STATES, Scene, asked

pytestmark = pytest.mark.fuse

SCENES = scaled(
    (("none", "negative"), ("none", "mapped"), ("notify", "open")),
    tuple((mode, state) for mode in ("none", "notify") for state in STATES),
)


def marks(root: Path) -> dict[str, tuple[object, ...]]:
    """What tells of each object of a branch whether it is another one now: of a directory, not for a name in it."""
    found: dict[str, tuple[object, ...]] = {}
    for above, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = os.path.join(above, name)
            st = os.lstat(path)
            xattrs = [(key, os.getxattr(path, key, follow_symlinks=False)) for key in _xattrs(path)]
            found[path] = (st.st_ino, st.st_mode, st.st_uid, xattrs)
            if name not in directories:
                found[path] += (st.st_ctime_ns, st.st_nlink)
    return found


def _xattrs(path: str) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


def tell(mount: Mount, paths: list[str]) -> None:
    answer = mount.control({"op": "feed", "hints": [[path, ""] for path in paths]})
    assert answer["ok"], answer
    assert answer["outside"] == 0, answer


@pytest.fixture(scope="module")
def fed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    mode, state = request.param
    root = tmp_path_factory.mktemp("fed")
    branches = build_cases(root, CASES)
    own = "" if mode == "none" else "+udba=none"
    words = [f"{branch}={permission}{own}" for branch, permission in zip(branches, PERMISSIONS, strict=True)]
    with mounted(words, root / "mnt", mode, "") as mount:
        mount.branches = branches
        yield Scene(mount, "none", state)


@pytest.mark.parametrize("fed", SCENES, indirect=True, ids="-".join, scope="module")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_is_told_is_seen(fed: Scene, case: Case) -> None:
    branches = fed.mount.branches
    with fed.warmed(case) as check_held:
        before = marks(branches[case.at] / case.id)
        case.act(branches)
        after = marks(branches[case.at] / case.id)
        tell(fed.mount, [path for path in sorted({*before, *after}) if before.get(path) != after.get(path)])
        check_held()
    fed.check(case)


@pytest.fixture
def mount(union: UnionFactory, tmp_path: Path) -> Mount:
    for branch in "ab":
        for name in ("d", "e"):
            (tmp_path / branch / name).mkdir(parents=True)
            (tmp_path / branch / name / branch).write_text("old")
    return union({"a": "rw", "b": "ro"}, "none")


def test_all_below(mount: Mount, tmp_path: Path) -> None:
    assert not (mount.path / "d/new").exists()
    assert not (mount.path / "e/new").exists()
    (tmp_path / "b/d/new").touch()
    (tmp_path / "b/e/new").touch()
    tell(mount, ["d/"])
    assert (mount.path / "d/new").exists()
    assert not (mount.path / "e/new").exists()


def test_a_file_in_a_directory_that_nobody_mentions(mount: Mount, tmp_path: Path) -> None:
    """A log of objects has no line for the directories above them."""
    assert not (mount.path / "x").exists()
    (tmp_path / "b/x/y").mkdir(parents=True)
    (tmp_path / "b/x/y/z").touch()
    tell(mount, ["x/y/z"])
    assert (mount.path / "x/y/z").exists()


def test_a_wrong_hint_costs_a_look_and_nothing_else(union: UnionFactory, tmp_path: Path) -> None:
    (tmp_path / "b/d").mkdir(parents=True)
    (tmp_path / "b/d/f").write_text("here")
    mount = union({"a": "rw", "b": "ro+udba=none"}, "notify")
    names = [mount.path / "d/f", mount.path / "d/missing"]
    assert [path.exists() for path in names] == [True, False]
    before = asked(mount)
    tell(mount, ["d/f", "d/missing", "d", "d/.wh.f", "d/.wh..wh..opq", ".wh..wh.plnk/1.2", ".", "", "nowhere/x"])
    assert [path.exists() for path in names] == [True, False]
    lookups = asked(mount) - before
    assert lookups <= 1, "the kernel was told to forget what is as it was, but for a name in a directory nobody knows"
