"""What happens when events cannot be trusted: overflow, no watches left, file systems without events, lost directories.

The affected part is served as reval and stays right, heals by itself, and each change of state is logged once and
visible in the statistics. The system's inotify limits are lowered for as short as possible and always put back.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.inprocess import notify_union
from tests.helpers.killing import stopped
from tests.helpers.leaks import read_mountinfo
from tests.helpers.merge import Tree as Seen
from tests.helpers.merge import diff, merge, read_entry, snapshot
from tests.helpers.mount import DEADLINE, Mount, UnionFactory
from tests.helpers.posix import EXCHANGE, renameat2
from tests.helpers.slow_mount import NO_EPOCHS, slow_daemon
from tests.t2_core.fake_notifier import Message
from udbad.types import ROOT_CALLER, ROOT_ID, Perm

pytestmark = pytest.mark.fuse

LIMITS = Path("/proc/sys/fs/inotify")
QUEUE = 16
"""Events that a tiny queue holds."""


@contextmanager
def lowered(name: str, value: int) -> Iterator[None]:
    """Set fs.inotify.NAME; an inotify instance made meanwhile keeps the queue length it was born with."""
    file = LIMITS / name
    before = file.read_text()
    file.write_text(str(value))
    try:
        yield
    finally:
        file.write_text(before)


def populate(branch: Path, directories: int, files: int = 5) -> None:
    for number in range(directories):
        (branch / f"d{number}").mkdir(parents=True)
        for name in range(files):
            (branch / f"d{number}" / f"f{name}").write_bytes(b"%d" % name)


def ask(root: Path, names: list[str]) -> Seen:
    """What there is of these names; nothing is listed, so what the kernel has cached answers."""
    seen: Seen = {}
    for name in names:
        try:
            seen[name.encode()] = read_entry(os.fsencode(root / name))
        except (FileNotFoundError, NotADirectoryError):
            continue
    return seen


def every_name(directories: int, files: int = 8) -> list[str]:
    """More names than there are: negatives count, too."""
    above = [f"d{number}" for number in range(directories)]
    return above + [f"{directory}/f{name}" for directory in above for name in range(files)]


def truth(mount: Mount) -> Seen:
    return merge([(mount.branches[0], True), *((branch, False) for branch in mount.branches[1:])])


def agree(mount: Mount, names: list[str]) -> None:
    """The mount, asked name by name and then listed, is the merge of its branches."""
    expected = truth(mount)
    assert diff({n: e for n, e in expected.items() if n.decode() in names}, ask(mount.path, names)) == []
    assert diff(expected, snapshot(mount.path)) == []


def statistics(mount: Mount, part: str) -> dict[str, Any]:
    found: dict[str, Any] = mount.control({"op": "stats"})[part]
    return found


def change(branch: Path, directories: int, turn: int = 0) -> None:
    """Create, remove, rewrite, rename and chmod in every directory."""
    for number in range(directories):
        here = branch / f"d{number}"
        (here / f"f{5 + turn}").write_bytes(b"new")
        (here / f"f{turn}").unlink()
        (here / "f2").write_bytes(b"changed in turn %d" % turn)
        (here / "f4").chmod(0o600 + turn)
        (here / "f3").rename(here / "f7")
        (here / "f7").rename(here / "f3")


def warm_passes(mount: Mount, names: list[str]) -> dict[str, int]:
    """Requests of a third pass over the same names: in notify there should be none."""
    for _ in range(2):
        ask(mount.path, names)
    before = mount.requests()
    for name in names:
        os.path.lexists(mount.path / name)
    after = mount.requests()
    return {name: after[name] - before[name] for name in ("lookup", "getattr") if after[name] != before[name]}


# -- overflow -------------------------------------------------------------------------------------

OVERFLOW = "lost branch events"


def overflow(mount: Mount, names: list[str], directories: int) -> None:
    """Warm the caches, then change more than the queue holds while the daemon stands still."""
    agree(mount, names)
    ask(mount.path, names)
    with stopped(mount.process.pid):
        change(mount["base"], directories)
    mount.flush()


@pytest.mark.alone
def test_overflow_is_one_epoch_and_everything_is_right_afterwards(union: UnionFactory, tmp_path: Path) -> None:
    populate(tmp_path / "base", 10)
    names = every_name(10)
    with lowered("max_queued_events", QUEUE):
        mount = union({"top": "rw", "base": "ro"}, "notify", allow_log=OVERFLOW)
    before = statistics(mount, "invalidator")["sent"]["epoch"]
    with (mount.path / "d0" / "f2").open("rb", buffering=0) as held:
        assert held.read() == b"2"
        overflow(mount, names, 10)
        # The pages and attributes of what is open are dropped too; an epoch concerns names only.
        held.seek(0)
        assert held.read() == b"changed in turn 0"
        assert os.fstat(held.fileno()).st_size == len(b"changed in turn 0")
    agree(mount, names)
    assert statistics(mount, "invalidator")["sent"]["epoch"] == before + 1
    assert statistics(mount, "coherence")["overflows"] == 1
    assert mount.log().count(OVERFLOW) == 1

    # Healed: nothing is served as reval, the kernel is not asked again, and new changes are noticed.
    assert statistics(mount, "coherence")["degraded_directories"] == 0
    assert statistics(mount, "coherence")["state"] == "healthy"
    assert warm_passes(mount, names) == {}
    (tmp_path / "base" / "d3" / "f6").write_bytes(b"later")
    (tmp_path / "base" / "d4" / "f2").unlink()
    mount.flush()
    agree(mount, names)
    assert statistics(mount, "coherence")["overflows"] == 1
    assert mount.log().count(OVERFLOW) == 1


@pytest.mark.alone
def test_overflow_without_epochs(union: UnionFactory, tmp_path: Path) -> None:
    """Older kernels: every known name and every negative that was handed out is dropped one by one."""
    populate(tmp_path / "base", 10)
    names = every_name(10)
    with slow_daemon(None, NO_EPOCHS), lowered("max_queued_events", QUEUE):
        mount = union({"top": "rw", "base": "ro"}, "notify", allow_log=OVERFLOW)
    overflow(mount, names, 10)
    agree(mount, names)
    assert statistics(mount, "invalidator")["sent"]["epoch"] == 0
    assert statistics(mount, "coherence")["overflows"] == 1
    assert statistics(mount, "coherence")["degraded_directories"] == 0
    assert warm_passes(mount, names) == {}


@pytest.mark.alone
def test_the_fallback_names_everything_the_kernel_may_hold(tmp_path: Path, expect_log: Callable[[str], None]) -> None:
    """The strategy alone, with a notifier that has no epochs, after a real overflow."""
    expect_log(OVERFLOW)
    populate(tmp_path / "base", 3)
    with ExitStack() as stack:
        with lowered("max_queued_events", QUEUE):
            union = stack.enter_context(notify_union([(tmp_path / "base", Perm.RO)], tmp_path / "mnt", epochs=False))
        directories = [union.look_up(ROOT_ID, b"d%d" % number) for number in range(3)]
        assert union.look_up(ROOT_ID, b"absent") == 0
        expected = {Message("expire", ROOT_ID, name) for name in (b"d0", b"d1", b"d2")}
        expected.add(Message("entry", ROOT_ID, b"absent"))
        for directory in directories:
            for name, kind in ((b"f0", "expire"), (b"f1", "expire"), (b"absent", "entry"), (b"not there", "entry")):
                union.look_up(directory, name)
                expected.add(Message(kind, directory, name))
        opened = union.look_up(directories[0], b"f2")
        handle, _ = union.fs.open(opened, os.O_RDONLY, ROOT_CALLER)
        expected |= {Message("expire", directories[0], b"f2"), Message("data", opened)}
        expected |= {Message("attributes", number) for number in {ROOT_ID, *union.references} - {opened}}

        for number in range(2 * QUEUE):
            (tmp_path / "base" / f"new{number}").touch()
        assert expected <= union.told()
        assert union.coherence.statistics().overflows == 1
        # Told once, the kernel has no negatives any more: a second time they are not named.
        union.coherence.drop_everything()
        assert not [message for message in union.told() if message.name in (b"absent", b"not there")]
        union.fs.release(handle.fh)


# -- no watches left ------------------------------------------------------------------------------

LIMITED = "watch limit reached"
ROOM = 30
DIRECTORIES = 4 * ROOM


def watches_in_use() -> int:
    """Inotify watches of every process, proc_pid_fdinfo(5); the limit counts those of one user together."""
    count = 0
    for info in Path("/proc").glob("[0-9]*/fdinfo/*"):
        try:
            count += info.read_text().count("inotify wd:")
        except OSError:  # ended meanwhile
            continue
    return count


def limited(mount: Mount) -> bool:
    return bool(statistics(mount, "coherence")["state"] == "limited")


ATTEMPTS = 5
"""The limit is the user's, and so are watches that other processes give back while a test runs."""


@pytest.mark.alone
def test_watch_limit(union: UnionFactory, tmp_path: Path) -> None:
    populate(tmp_path / "base", DIRECTORIES, files=2)
    names = [f"d{number}{part}" for number in range(DIRECTORIES) for part in ("", "/f0", "/f1", "/f2")]
    mount = union({"top": "rw", "base": "ro"}, "notify", "watch=inotify,watch_reserve=0", allow_log=LIMITED)
    for _ in range(ATTEMPTS):
        with ExitStack() as held, lowered("max_user_watches", watches_in_use() + ROOM):
            # Directories in use cannot just be forgotten when they get no watch or lose it.
            for number in range(2 * ROOM):
                held.callback(os.close, os.open(mount.path / f"d{number}", os.O_RDONLY | os.O_DIRECTORY))
            agree(mount, names)
            if limited(mount):
                right_while_limited(mount, names)
                break
        mount.remount()
    assert mount.log().count(LIMITED) == 1
    # Room again: directories get their watches at the next use.
    agree(mount, names)
    found = statistics(mount, "coherence")
    assert (found["state"], found["degraded_directories"]) == ("healthy", 0)
    assert warm_passes(mount, names) == {}
    assert mount.log().count(LIMITED) == 1


def right_while_limited(mount: Mount, names: list[str]) -> None:
    found = statistics(mount, "coherence")
    assert found["degraded_directories"] >= ROOM // 2
    assert found["watches"] <= 2 * ROOM
    assert found["watch_limit"] == int((LIMITS / "max_user_watches").read_text())
    for turn in range(2):
        ask(mount.path, names)
        for number in range(DIRECTORIES):
            here = mount["base"] / f"d{number}"
            (here / "f1").write_bytes(b"turn %d" % turn)
            if turn % 2:
                (here / "f2").unlink()
            else:
                (here / "f2").touch()
        mount.flush()
        agree(mount, names)


@pytest.mark.alone
def test_the_directory_in_use_keeps_its_watch(union: UnionFactory, tmp_path: Path) -> None:
    """Least recently used directories give theirs up first."""
    populate(tmp_path / "base", DIRECTORIES, files=1)
    mount = union({"top": "rw", "base": "ro"}, "notify", "watch=inotify,watch_reserve=0", allow_log=LIMITED)
    last = mount.path / f"d{DIRECTORIES - 1}"
    for _ in range(ATTEMPTS):
        with lowered("max_user_watches", watches_in_use() + ROOM):
            for number in range(DIRECTORIES):
                os.lstat(mount.path / f"d{number}" / "f0")
            for _ in range(2):
                os.lstat(last / "f0")
            before = mount.requests()["lookup"]
            os.lstat(last / "f0")
            assert mount.requests()["lookup"] == before, "the kernel may keep what was used last"
            if limited(mount):
                break
        mount.remount()
    assert mount.log().count(LIMITED) == 1


@pytest.mark.alone
@pytest.mark.parametrize("watch", ["auto", "fanotify"])
def test_whole_file_systems_have_no_limit(union: UnionFactory, tmp_path: Path, watch: str) -> None:
    populate(tmp_path / "base", DIRECTORIES, files=2)
    names = [f"d{number}{part}" for number in range(DIRECTORIES) for part in ("", "/f0", "/f1", "/f2")]
    mount = union({"top": "rw", "base": "ro"}, "notify", f"watch={watch},watch_reserve=0")
    with ExitStack() as held, lowered("max_user_watches", watches_in_use() + ROOM):
        for number in range(2 * ROOM):
            held.callback(os.close, os.open(mount.path / f"d{number}", os.O_RDONLY | os.O_DIRECTORY))
        agree(mount, names)
        found = statistics(mount, "coherence")
        assert (found["state"], found["degraded_directories"]) == ("healthy", 0)
        assert found["watches"] + found["handles"] >= DIRECTORIES
        assert found["watches"] == 0 if watch == "fanotify" else found["handles"] > 0
        assert warm_passes(mount, names) == {}
        for number in range(DIRECTORIES):
            here = mount["base"] / f"d{number}"
            (here / "f1").write_bytes(b"changed")
            (here / "f2").touch()
        mount.flush()
        agree(mount, names)
    assert ("whole file systems are watched" in mount.log()) == (watch == "auto")


def test_own_changes_tell_nothing_new(union: UnionFactory) -> None:
    """fanotify says who has made a change."""
    mount = union({"top": "rw", "base": "ro"}, "notify", "watch=fanotify")
    here = mount.path / "d"
    here.mkdir()
    (here / "f").write_bytes(b"content")
    os.link(here / "f", here / "g")
    (here / "f").chmod(0o600)
    os.setxattr(here / "g", "user.udbad", b"x")
    os.truncate(here / "f", 3)
    (here / "f").rename(here / "h")
    (here / "g").unlink()
    mount.flush()
    found = statistics(mount, "coherence")
    assert found["events"] > 0
    assert found["echoes"] == found["events"]


# -- file systems without events ------------------------------------------------------------------


@pytest.fixture
def mergerfs(tmp_path: Path) -> Iterator[Path]:
    """A FUSE mount of tmp_path/behind on tmp_path/fused that caches nothing itself; returns `behind`."""
    behind, fused = tmp_path / "behind", tmp_path / "fused"
    behind.mkdir()
    fused.mkdir()
    uncached = "cache.attr=0,cache.entry=0,cache.negative_entry=0,cache.files=off,cache.statfs=0"
    process = subprocess.Popen(["mergerfs", "-f", "-o", f"{uncached},allow_other", str(behind), str(fused)])
    end = time.monotonic() + DEADLINE
    while not any(mount.path == fused for mount in read_mountinfo()):
        assert process.poll() is None, "mergerfs ended"
        assert time.monotonic() < end, "mergerfs does not mount"
        time.sleep(0.01)
    yield behind
    subprocess.run(["umount", "-i", "-c", "--", fused], check=True, timeout=DEADLINE)
    process.wait(DEADLINE)


def test_a_branch_without_events_is_served_as_reval(mergerfs: Path, union: UnionFactory) -> None:
    populate(mergerfs, 2)
    mount = union({"top": "rw", "fused": "ro"}, "notify")
    assert "sends no events; served as reval" in mount.log()
    assert "fuse.mergerfs" in mount.log()
    names = every_name(2)
    for turn in range(3):
        ask(mount.path, names)
        change(mergerfs, 2, turn)  # behind the back of the branch itself
        (mount["top"] / "d1").mkdir(exist_ok=True)
        (mount["top"] / "d1" / "f1").write_bytes(b"on top %d" % turn)
        # No flush: every access asks.
        agree(mount, names)
    found = statistics(mount, "coherence")
    assert found["mode"] == "notify"
    assert found["degraded_directories"] == 3
    assert found["watches"] == 0


def test_a_user_may_know_better(mergerfs: Path, union: UnionFactory, tmp_path: Path) -> None:
    """+udba=notify on such a branch: what is changed through the branch itself does send events."""
    populate(mergerfs, 2)
    mount = union({"top": "rw", "fused": "ro+udba=notify"}, "notify")
    mount.branches[1] = tmp_path / "fused"
    names = every_name(2)
    agree(mount, names)
    assert "served as reval" not in mount.log()
    assert statistics(mount, "coherence")["degraded_directories"] == 0
    assert warm_passes(mount, names) == {}
    change(tmp_path / "fused", 2)
    mount.flush()
    agree(mount, names)


# -- directories that go or are replaced ------------------------------------------------------------


def test_a_directory_replaced_underneath(union: UnionFactory, tmp_path: Path) -> None:
    base = tmp_path / "base"
    populate(base, 3)
    mount = union({"top": "rw", "base": "ro"}, "notify")
    names = [*every_name(4), "d0/only here", "moved", "moved/f0", "moved/f6"]
    agree(mount, names)
    inside = os.open(mount.path / "d0", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for turn in range(3):
            ask(mount.path, names)
            (base / "d0").rename(base / "moved")
            (base / "d0").mkdir()
            (base / "d0" / "only here").write_bytes(b"%d" % turn)
            (base / "d0" / "f0").mkdir()
            (base / "moved" / "f6").touch()
            mount.flush()
            agree(mount, names)
            # And the new one is watched as the old one was.
            (base / "d0" / "f1").write_bytes(b"in the new one")
            (base / "moved" / "f1").unlink()
            mount.flush()
            agree(mount, names)
            shutil.rmtree(base / "moved")
            mount.flush()
            agree(mount, names)
        assert statistics(mount, "coherence")["state"] == "healthy"
    finally:
        os.close(inside)


def test_directories_that_change_places(union: UnionFactory, tmp_path: Path) -> None:
    """Both stay the directories they are in the lower branch, and each takes over what the other had watched."""
    for layer in ("top", "base"):
        populate(tmp_path / layer, 2)
    mount = union({"top": "rw", "base": "ro"}, "notify")
    names = every_name(2)
    agree(mount, names)
    first, second = tmp_path / "top" / "d0", tmp_path / "top" / "d1"
    for turn in range(4):
        ask(mount.path, names)
        renameat2(os.fsencode(first), os.fsencode(second), EXCHANGE)
        mount.flush()
        agree(mount, names)
        for directory in (first, second):
            (directory / "f6").write_bytes(b"%d" % turn)
            mount.flush()
            agree(mount, names)
            (directory / "f6").unlink()
            mount.flush()
            agree(mount, names)
    assert statistics(mount, "coherence")["degraded_directories"] == 0
    assert warm_passes(mount, names) == {}


def test_a_branch_that_is_moved_stays_a_branch(union: UnionFactory, tmp_path: Path) -> None:
    """The union holds the directory, not its path."""
    populate(tmp_path / "base", 2)
    mount = union({"top": "rw", "base": "ro"}, "notify")
    names = every_name(2)
    agree(mount, names)
    moved = tmp_path / "elsewhere"
    (tmp_path / "base").rename(moved)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "not of the union").touch()
    mount.branches[1] = moved
    mount.flush()
    agree(mount, names)
    change(moved, 2)
    mount.flush()
    agree(mount, names)


def test_a_branch_that_is_removed(union: UnionFactory, tmp_path: Path) -> None:
    populate(tmp_path / "base", 2)
    populate(tmp_path / "top", 1, files=2)
    mount = union({"top": "rw", "base": "ro"}, "notify", allow_log="coherence")
    names = every_name(3)
    agree(mount, names)
    shutil.rmtree(tmp_path / "base")
    mount.branches.pop()
    mount.flush()
    agree(mount, names)
    for number in range(3):
        (tmp_path / "top" / "d0" / f"f{number}").write_bytes(b"%d, still right" % number)
    (tmp_path / "top" / "d2").mkdir()
    mount.flush()
    agree(mount, names)
    (mount.path / "d2" / "f1").write_bytes(b"and can be written")
    agree(mount, names)


def test_a_branch_that_is_lazily_unmounted(union: UnionFactory, tmp_path: Path) -> None:
    """umount -l hides the branch from others; whoever still has it open goes on changing it."""
    base = tmp_path / "base"
    base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", base], check=True, timeout=DEADLINE)
    try:
        populate(base, 2)
        mount = union({"top": "rw", "base": "ro"}, "notify")
        names = every_name(2)
        agree(mount, names)
        root = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    finally:
        subprocess.run(["umount", "-i", "-c", "-l", "--", base], check=True, timeout=DEADLINE)
    try:
        inside = Path(f"/proc/self/fd/{root}")
        mount.branches[1] = inside
        agree(mount, names)
        change(inside, 2)
        mount.flush()
        agree(mount, names)
        assert list(base.iterdir()) == []
    finally:
        os.close(root)
