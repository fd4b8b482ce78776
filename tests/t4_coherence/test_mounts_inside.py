"""What others mount inside the union stays mounted whatever the union forgets.

A dropped dentry takes everything mounted on it or below it along (d_invalidate(), detach_mounts()): a
container or a chroot would lose its /proc because somebody added a branch. So names that may still be
the same are expired, not dropped, and no epoch is used while something is mounted inside.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.helpers.killing import stopped
from tests.helpers.mount import DEADLINE, Mount, UnionFactory
from tests.t4_coherence.test_degrade import QUEUE, ROOM, lowered, statistics, watches_in_use
from udbad.coherence import base

pytestmark = pytest.mark.fuse

INSIDE = "d/deep/here"


@contextmanager
def mounted_inside(mount: Mount) -> Iterator[None]:
    """A tmpfs on a directory of the union, in this mount namespace."""
    place = mount.path / INSIDE
    subprocess.run(["mount", "-t", "tmpfs", "inside", str(place)], check=True, timeout=DEADLINE)
    try:
        (place / "file").write_text("mounted")
        yield
        assert (place / "file").read_text() == "mounted"
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=DEADLINE)


def ask(mount: Mount, request: dict[str, object]) -> None:
    answer = mount.control(request)
    assert answer["ok"], answer


def invalidate(mount: Mount, extra: Path) -> None:
    for path in ("d", "d/deep/here", ""):
        ask(mount, {"op": "invalidate", "path": path})


def switch(mount: Mount, extra: Path) -> None:
    for mode in ("reval", "notify", "none", "notify"):
        ask(mount, {"op": "udba", "mode": mode})
        os.lstat(mount.path / "d" / "deep")


def rebranch(mount: Mount, extra: Path) -> None:
    ask(mount, {"op": "branches", "edits": [["add", f"1:{extra}=ro"]]})
    os.lstat(mount.path / "d" / "deep")
    ask(mount, {"op": "branches", "edits": [["del", str(extra)]]})


def branch_directories(mount: Mount, extra: Path) -> None:
    """The directories around it get layers on another branch, and lose them."""
    (mount["top"] / INSIDE).mkdir(parents=True)
    mount.flush()
    os.lstat(mount.path / "d" / "deep")
    for path in (INSIDE, "d/deep", "d"):
        (mount["top"] / path).rmdir()
    mount.flush()


def overflow(mount: Mount, extra: Path) -> None:
    with stopped(mount.process.pid):
        for number in range(QUEUE):
            (mount["base"] / "d" / f"n{number}").touch()
            (mount["base"] / "d" / f"n{number}").unlink()
        (mount["base"] / "d" / "deep" / "later").write_text("seen")
    mount.flush()
    assert statistics(mount, "coherence")["overflows"] == 1
    assert statistics(mount, "invalidator")["sent"]["epoch"] == 0


@pytest.mark.alone
@pytest.mark.parametrize("action", [invalidate, switch, rebranch, branch_directories, overflow])
def test_a_mount_inside_stays(union: UnionFactory, tmp_path: Path, action: Callable[[Mount, Path], None]) -> None:
    (tmp_path / "base" / INSIDE).mkdir(parents=True)
    (tmp_path / "extra").mkdir()
    with lowered("max_queued_events", QUEUE):
        mount = union({"top": "rw", "base": "ro"}, "notify", allow_log="lost branch events")
    for name in ("d/absent", "d/deep/later"):
        assert not (mount.path / name).exists()  # the kernel remembers
    with mounted_inside(mount):
        action(mount, tmp_path / "extra")
        (mount["base"] / "d" / "deep" / "later").write_text("seen")
        mount.flush()
        assert (mount.path / "d" / "deep" / "later").read_text() == "seen"


@pytest.mark.alone
def test_one_of_another_namespace_stays(union: UnionFactory, tmp_path: Path) -> None:
    """A container's mounts are not in our mount table."""
    (tmp_path / "base" / INSIDE).mkdir(parents=True)
    with lowered("max_queued_events", QUEUE):
        mount = union({"top": "rw", "base": "ro"}, "notify", allow_log="lost branch events")
    script = (
        f"mount -t tmpfs inside {INSIDE} && echo mounted >{INSIDE}/file && echo ready && read -r _ && cat {INSIDE}/file"
    )
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script],
        cwd=mount.path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as container:
        assert container.stdout is not None
        assert container.stdout.readline() == "ready\n"
        overflow(mount, tmp_path)
        assert (mount.path / "d" / "deep" / "later").read_text() == "seen"
        assert container.communicate("go\n", DEADLINE)[0] == "mounted\n"


@pytest.mark.alone
def test_lost_watches(union: UnionFactory, tmp_path: Path) -> None:
    """Directories that give up their watches are asked again, and are what they were."""
    (tmp_path / "base" / INSIDE).mkdir(parents=True)
    for number in range(4 * ROOM):
        (tmp_path / "base" / f"x{number}").mkdir()
    mount = union({"top": "rw", "base": "ro"}, "notify", "watch=inotify", allow_log="watch limit reached")
    with mounted_inside(mount), lowered("max_user_watches", watches_in_use() + ROOM), ExitStack() as held:
        assert not (mount.path / "d" / "deep" / "later").exists()
        for number in range(4 * ROOM):
            held.callback(os.close, os.open(mount.path / f"x{number}", os.O_RDONLY | os.O_DIRECTORY))
        assert statistics(mount, "coherence")["state"] == "limited"
        (mount["base"] / "d" / "deep" / "later").write_text("seen")
        mount.flush()
        assert (mount.path / "d" / "deep" / "later").read_text() == "seen"


def test_more_missing_names_than_are_remembered(
    union: UnionFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the names that did not exist, those beyond the bound are asked again; each is seen when it appears."""
    count = base.MAX_NEGATIVES + 100
    (tmp_path / "base" / "d").mkdir(parents=True)
    mount = union({"top": "rw", "base": "ro"}, "notify")
    names = [f"n{number}" for number in range(count)]
    for name in names:
        assert not (mount.path / "d" / name).exists()
    for name in names[:: count // 50]:
        (mount["base"] / "d" / name).touch()
    mount.flush()
    for name in names[:: count // 50]:
        assert (mount.path / "d" / name).exists(), name
