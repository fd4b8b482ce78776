"""A warm tree costs nothing: the kernel answers names, attributes and contents without asking the daemon.

From the third pass on, because the second one may still ask for attributes: a READ marks the time of access old.
Counted in requests that have reached the daemon, for find(1), stat(2), reading, following symbolic links, and names
that do not exist.

What the kernel does not keep is not claimed: a listing asks for names each time (its READDIR also brings the
attributes) and marks the directory's own time of access old, so find asks once for the directory it starts at.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from typing import TypeVar

import pytest

from tests.helpers.merge import merge
from tests.helpers.mount import Mount, UnionFactory

pytestmark = pytest.mark.fuse

T = TypeVar("T")

FREE = ("lookup", "getattr", "read", "readdir", "readlink")
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


def visible(mount: Mount) -> list[str]:
    whable = [permission != "ro" for permission in LAYERS.values()]
    return sorted(os.fsdecode(name) for name in merge(zip(mount.branches, whable, strict=True)))


def find(mount: Mount, names: Sequence[str]) -> None:
    command = ["find", str(mount.path), "-printf", "%p %y %s %m\\n"]
    listed = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    assert len(listed.splitlines()) == len(names) + 1


def stat(mount: Mount, names: Sequence[str]) -> None:
    for name in names:
        (mount.path / name).lstat()


def read(mount: Mount, names: Sequence[str]) -> None:
    for name in names:
        if S_ISREG((mount.path / name).lstat().st_mode):
            assert (mount.path / name).read_bytes()


def follow(mount: Mount, names: Sequence[str]) -> None:
    for name in names:
        if S_ISLNK((mount.path / name).lstat().st_mode):
            assert (mount.path / name).read_bytes()


def ask_missing(mount: Mount, names: Sequence[str]) -> None:
    for directory in {os.path.dirname(name) for name in names}:
        for word in ("missing", "base-1.bak", "Makefile"):
            path = mount.path / directory / word
            with pytest.raises(FileNotFoundError):
                path.lstat()
            with pytest.raises(FileNotFoundError):
                path.open()


WORK: dict[Callable[[Mount, Sequence[str]], None], dict[str, int]] = {
    find: {},
    stat: {},
    read: {},
    follow: {},
    ask_missing: {},
}
"""What is done, and what it costs from the third time on."""


def cost(mount: Mount, before: dict[str, int]) -> dict[str, int]:
    """Which of the requests that should be free were made since `before`."""
    now = mount.requests()
    return {name: now[name] - before[name] for name in FREE if now[name] != before[name]}


def undisturbed(measure: Callable[[], T]) -> T:
    """What `measure` returns, which is repeated when the kernel has taken something away meanwhile.

    Whoever drops caches (proc(5): drop_caches) or needs memory takes what is warm from every mount of the machine.
    """
    for _ in range(10):
        before = taken_away()
        result = measure()
        if taken_away() == before:
            break
    return result


def taken_away() -> dict[str, str]:
    """Counters of /proc/vmstat that go up when caches are dropped or memory is reclaimed."""
    lines = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return {name: count for name, count in lines if name.startswith(("drop_", "pgscan_direct", "pgscan_kswapd"))}


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
@pytest.mark.parametrize("mode", ["none", "notify"])
def test_from_the_third_pass_on_nothing_is_asked(
    union: UnionFactory, tmp_path: Path, mode: str, work: Callable[[Mount, Sequence[str]], None]
) -> None:
    fill(tmp_path)
    mount = union(LAYERS, mode)
    names = visible(mount)

    def five_passes() -> list[dict[str, int]]:
        costs = []
        for _ in range(5):
            before = mount.requests()
            work(mount, names)
            costs.append(cost(mount, before))
        return costs

    costs = undisturbed(five_passes)
    assert costs[2:] == [WORK[work]] * 3, costs


@pytest.mark.parametrize("mode", ["none", "notify"])
def test_own_changes_do_not_cool_what_they_do_not_concern(union: UnionFactory, tmp_path: Path, mode: str) -> None:
    """The events of own changes come back in notify; they must not be taken for foreign ones."""
    fill(tmp_path)
    mount = union(LAYERS, mode)
    changed = ("shared/deep", "only-top")  # the kernel itself marks the attributes of these old
    names = [name for name in visible(mount) if not name.startswith(changed)]
    numbers = itertools.count()

    def changes_meanwhile() -> dict[str, int]:
        for _ in range(2):
            stat(mount, names)
        number = next(numbers)
        mount.path.joinpath("shared/deep/own").write_text("own")
        mount.path.joinpath("shared/deep/own").rename(mount.path / f"shared/deep/renamed{number}")
        mount.path.joinpath(f"shared/deep/renamed{number}").chmod(0o600)
        mount.path.joinpath(f"only-top/directory{number}").mkdir()
        mount.flush()
        before = mount.requests()
        stat(mount, names)
        return cost(mount, before)

    assert undisturbed(changes_meanwhile) == {}
