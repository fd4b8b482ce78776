"""A warm tree costs nothing: the kernel answers names, attributes and contents without asking the daemon.

From the third pass on, because the second one may still ask for attributes: a READ marks the time of access old.
Counted in requests that have reached the daemon, for find(1), stat(2), reading, and names that do not exist.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.merge import diff, merge, snapshot
from tests.helpers.mount import Mount, UnionFactory

pytestmark = pytest.mark.fuse

FREE = ("lookup", "getattr", "read", "readlink")
"""Requests that a warm tree does not cause."""
LAYERS = {"top": "rw", "middle": "ro+wh", "base": "ro"}


def fill(root: Path) -> None:
    """A tree over three branches with every kind of merge: one branch only, hidden, whited out, opaque."""
    for number, name in enumerate(LAYERS):
        branch = root / name
        for directory in ("", "shared", "shared/deep", f"only-{name}", "opaque"):
            (branch / directory).mkdir(parents=True, exist_ok=True)
            for i in range(5):
                (branch / directory / f"{name}-{i}").write_text(f"{name} {i}\n" * 1000 * (i + 1))
        (branch / "shared/everywhere").write_text(name)
        (branch / "shared/link").symlink_to(f"deep/{name}-0")
        os.link(branch / "shared/everywhere", branch / f"only-{name}/second name")
        if number < 2:
            (branch / "shared/.wh.base-1").touch()
            (branch / "opaque/.wh..wh..opq").touch()


def stat_and_read(mount: Mount, names: list[str]) -> None:
    for name in names:
        path = mount.path / name
        path.lstat()
        if path.is_symlink():
            path.readlink()
        if path.is_file():
            path.read_bytes()


def ask_missing(mount: Mount, names: list[str]) -> None:
    for name in names:
        for word in ("missing", "base-1.bak"):
            path = mount.path / os.path.dirname(name) / word
            with pytest.raises(FileNotFoundError):
                path.lstat()
            with pytest.raises(FileNotFoundError):
                path.open().close()


def caused(mount: Mount, before: dict[str, int]) -> dict[str, int]:
    """Which of the requests that should be free were made since `before`."""
    now = mount.requests()
    return {name: now[name] - before.get(name, 0) for name in FREE if now.get(name, 0) != before.get(name, 0)}


@pytest.mark.parametrize("mode", ["none", "notify"])
def test_from_the_third_pass_on_nothing_is_asked(union: UnionFactory, tmp_path: Path, mode: str) -> None:
    fill(tmp_path)
    mount = union(LAYERS, mode)
    expected = merge(
        (branch, permission != "ro") for branch, permission in zip(mount.branches, LAYERS.values(), strict=True)
    )
    assert diff(expected, snapshot(mount.path)) == []
    names = sorted(os.fsdecode(name) for name in expected)
    find = ["find", str(mount.path), "-printf", "%p %y %s %m %l\\n"]
    passes = []
    for number in range(5):
        costs = {}
        before = mount.requests()
        listed = subprocess.run(find, check=True, capture_output=True, timeout=60).stdout
        assert len(listed.splitlines()) == len(names) + 1
        costs["find"], before = caused(mount, before), mount.requests()
        stat_and_read(mount, names)
        costs["stat and read"], before = caused(mount, before), mount.requests()
        ask_missing(mount, names)
        costs["missing"] = caused(mount, before)
        passes.append(costs)
    print(*passes, sep="\n")
    for costs in passes[2:]:
        assert costs == {"find": {}, "stat and read": {}, "missing": {}}
