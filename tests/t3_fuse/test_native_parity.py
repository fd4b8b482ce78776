"""What an unprivileged caller gets from the union is what a native directory gives the same caller.

Every scenario runs as several identities in three copies of one tree: a native directory, a directory of
the union whose objects lie in the writable top, and one whose objects lie in the read-only lower branch
and are copied up. Values, errnos and the resulting trees (mode, owner, links, size, content, every
xattr) must be equal. What differs by design has its own tests at the end.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.helpers.merge import Tree, diff, snapshot
from tests.helpers.mount import Mount, UnionFactory, mounted
from tests.helpers.posix import Identity, Outcome, Scenario, run_as, tree_status
from tests.helpers.profile import scaled
from tests.helpers.scenarios import ACL, IDENTITIES, SCENARIOS, make_tree
from udbad.union.xattrs import selinux_enabled

pytestmark = pytest.mark.fuse

SITUATIONS = ("top", "lower")

# -- running them -------------------------------------------------------------------------------

Result = tuple[list[Outcome], dict[str, tuple[object, ...]]]


def play(root: Path, scenario: Scenario, identity: Identity) -> Result:
    return run_as(identity, root, scenario), tree_status(root)


def name_of(scenario: Scenario, identity: Identity) -> str:
    return f"{scenario.__name__}.{identity.name}"


@dataclass
class Places:
    """The mounted union, the native twin, a tree as it is made, and what the native twin answered so far."""

    mount: Mount
    native: Path
    pristine: Tree
    known: dict[str, Result] = field(default_factory=dict)

    def expected(self, scenario: Scenario, identity: Identity) -> Result:
        name = name_of(scenario, identity)
        if name not in self.known:
            make_tree(self.native / name)
            self.known[name] = play(self.native / name, scenario, identity)
        return self.known[name]


@contextmanager
def served(base: Path, udba: str, options: str = "") -> Iterator[Places]:
    """A union that gets a tree for each comparison, in its top or in its lower branch."""
    for name in ("native", "A", "B"):
        (base / name).mkdir()
        (base / name).chmod(0o755)
    make_tree(base / "pristine")
    with mounted([f"{base / 'A'}=rw", f"{base / 'B'}=ro"], base / "mnt", udba, options, watchdog=600) as mount:
        yield Places(mount, base / "native", snapshot(base / "pristine"))


@pytest.fixture(scope="module", params=scaled(["reval"], ["none", "reval"]))
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    with served(tmp_path_factory.mktemp("parity"), request.param) as places:
        yield places


@pytest.fixture(scope="module")
def portable_places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    with served(tmp_path_factory.mktemp("portable"), "notify", "edge=pyfuse3") as places:
        yield places


@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda identity: identity.name)
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_same_as_native(places: Places, scenario: Scenario, situation: str, identity: Identity) -> None:
    differences = compare(places, scenario, situation, identity)
    assert not differences, "\n".join(differences)


NOT_THROUGH_PYFUSE3 = {
    "fallocate_drops_privileges", "fallocate_drops_privileges_otherwise", "fallocate_ranges", "fallocate_errors",
    "limited_size", "holes", "files_without_a_name", "birth_times",
}  # fmt: skip
"""Scenarios of what pyfuse3 has no call for (portable_session.LACKS)."""
THROUGH_PYFUSE3 = [
    (scenario, IDENTITIES[number % len(IDENTITIES)])
    for number, scenario in enumerate(SCENARIOS)
    if scenario.__name__ not in NOT_THROUGH_PYFUSE3
]


@pytest.mark.parametrize(
    ("scenario", "identity"),
    THROUGH_PYFUSE3,
    ids=lambda value: value.name if isinstance(value, Identity) else value.__name__,
)
def test_same_as_native_through_pyfuse3(portable_places: Places, scenario: Scenario, identity: Identity) -> None:
    """All but what is made under a default ACL; see the end."""
    differences = compare(portable_places, scenario, "lower", identity)
    made = scenario.__name__ in ("create_modes", "mkdir_modes", "make_nodes", "writing_to_new_files")
    differences = [line for line in differences if not (made and re.search(r"\bacl\b", line))]
    assert not differences, "\n".join(differences)


def compare(places: Places, scenario: Scenario, situation: str, identity: Identity) -> list[str]:
    expected, expected_tree = places.expected(scenario, identity)
    name = f"{situation}.{name_of(scenario, identity)}"
    branch = places.mount[{"top": "A", "lower": "B"}[situation]]
    make_tree(branch / name)
    places.mount.flush()
    came, came_tree = play(places.mount.path / name, scenario, identity)
    if situation == "lower":
        assert diff(places.pristine, snapshot(branch / name)) == []
    differences = [
        f"{label}: union {value!r}, native {native!r}"
        for (label, value), (_, native) in zip(came, expected, strict=True)
        if value != native
    ]
    differences += [
        f"afterwards {path}: union {came_tree.get(path)!r}, native {expected_tree.get(path)!r}"
        for path in sorted(came_tree.keys() | expected_tree.keys())
        if came_tree.get(path) != expected_tree.get(path)
    ]
    return differences


def test_native_scenarios_are_reproducible(tmp_path: Path) -> None:
    """The comparison means something only if two native runs agree."""
    for number, scenario in enumerate(SCENARIOS):
        for identity in scaled([IDENTITIES[number % len(IDENTITIES)]], IDENTITIES):
            one, two = (tmp_path / f"{i}.{name_of(scenario, identity)}" for i in (1, 2))
            make_tree(one)
            make_tree(two)
            assert play(one, scenario, identity) == play(two, scenario, identity)


# -- what differs by design -----------------------------------------------------------------------


def test_the_umask_counts_under_a_default_acl_through_pyfuse3(union: UnionFactory) -> None:
    """FUSE_DONT_MASK is nothing that pyfuse3 can ask for: the kernel has taken the umask away from the mode."""
    mount = union({"A": "rw"}, options="edge=pyfuse3")
    os.setxattr(mount["A"], "system.posix_acl_default", ACL)
    before = os.umask(0o077)
    try:
        (mount.path / "file").touch(0o666)
    finally:
        os.umask(before)
    assert stat.S_IMODE((mount.path / "file").stat().st_mode) == 0o600


@pytest.mark.skipif(selinux_enabled(), reason="with SELinux each file has a label")
@pytest.mark.parametrize("edge", ["native", "pyfuse3"])
def test_there_are_no_labels_without_selinux(union: UnionFactory, edge: str) -> None:
    """Semantics 4.3: natively only this file has none."""
    mount = union({"A": "rw"}, options=f"edge={edge}")
    for place, answer in ((mount["A"], errno.ENODATA), (mount.path, errno.EOPNOTSUPP)):
        with pytest.raises(OSError, match=os.strerror(answer)):
            os.getxattr(place, "security.selinux")
        with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
            os.getxattr(place, "security.any")


@pytest.mark.parametrize("udba", ["none", "reval"])
def test_names_of_the_union(union: UnionFactory, udba: str) -> None:
    """Semantics 1: 242 bytes at most, whiteout names are refused, statfs says so."""
    mount = union({"A": "rw", "B": "ro"}, udba)
    longest = mount.path / ("n" * 242)
    longest.write_text("x")
    assert (mount["A"] / longest.name).exists()
    assert os.listdir(mount.path) == [longest.name]
    for length in (243, 255, 256):
        name = mount.path / ("n" * length)
        for call in (name.touch, name.mkdir, lambda: longest.rename(name), lambda: name.symlink_to("x")):  # noqa: B023  # called at once
            with pytest.raises(OSError, match=r".") as caught:
                call()
            assert caught.value.errno == errno.ENAMETOOLONG
    for hidden in (".wh.x", ".wh..wh..opq", ".wh..wh.plnk", ".wh."):
        name = mount.path / hidden
        for refuse in (name.touch, name.mkdir, name.lstat, lambda: longest.rename(name), lambda: name.symlink_to("x")):  # noqa: B023  # called at once
            with pytest.raises(PermissionError) as refused:
                refuse()
            assert refused.value.errno == errno.EPERM
    assert os.statvfs(mount.path).f_namemax == 242
