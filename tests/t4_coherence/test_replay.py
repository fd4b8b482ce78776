"""`replay=on`: watchers of the union get the events of direct changes.

What they ought to get is not written here: a directory on a file system of its own says it, of which the same is
changed and watched.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.mount import REPOSITORY, Mount, UnionFactory, mounted
from tests.helpers.watching import Event, Fanotify, Inotify, PathUnit
from tests.t5_daemon.daemon import until
from udbad.mount import keeper

pytestmark = pytest.mark.fuse


def make_tree(root: Path) -> None:
    (root / "sub").mkdir(parents=True)
    (root / "empty").mkdir()
    for name in ("f", "g", "sub/h"):
        (root / name).write_text("old")
    (root / "tool").write_text("#!/bin/sh\n")
    (root / "tool").chmod(0o755)
    (root / "link").symlink_to("f")


PLACES = {"top": "", "sub": "sub", "f itself": "f", "g itself": "g", "empty itself": "empty"}


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("more")


CHANGES: dict[str, Callable[[Path], object]] = {
    "made": lambda root: (root / "new").touch(),
    "written": lambda root: append(root / "f"),
    "made and written": lambda root: (root / "new").write_text("text"),
    "written anew": lambda root: (root / "f").write_text("other, and longer"),
    "truncated": lambda root: os.truncate(root / "f", 1),
    "written elsewhere": lambda root: append(root / "sub" / "h"),
    "removed": lambda root: (root / "f").unlink(),
    "directory made": lambda root: (root / "new").mkdir(),
    "directory removed": lambda root: (root / "empty").rmdir(),
    "renamed": lambda root: (root / "f").rename(root / "new"),
    "renamed over another": lambda root: (root / "f").rename(root / "g"),
    "renamed to elsewhere": lambda root: (root / "f").rename(root / "sub" / "new"),
    "directory renamed": lambda root: (root / "empty").rename(root / "new"),
    "mode": lambda root: (root / "f").chmod(0o600),
    "mode of a directory": lambda root: (root / "empty").chmod(0o700),
    "owner": lambda root: os.chown(root / "f", 7, 8),
    "times": lambda root: os.utime(root / "f", (1, 2)),
    "attribute": lambda root: os.setxattr(root / "f", b"user.one", b"1"),
    "link": lambda root: (root / "new").symlink_to("nowhere"),
    "link removed": lambda root: (root / "link").unlink(),
    "link renamed": lambda root: (root / "link").rename(root / "new"),
    "hard link": lambda root: os.link(root / "f", root / "new"),
    "pipe": lambda root: os.mkfifo(root / "new"),
    "device": lambda root: os.mknod(root / "new", 0o020600, os.makedev(1, 3)),
    "program written": lambda root: append(root / "tool"),
}

EXCEPTIONS: dict[str, set[str]] = {
    # Who opens a program for writing would have execve(2) of it fail with ETXTBSY.
    "program written": {"OPEN", "CLOSE_WRITE"},
}
"""Events that a direct change is without: see "Watching the union" in docs/modes.md."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One mount, with a tree of its own for each case."""
    base = tmp_path_factory.mktemp("replay")
    for name in ("upper", "lower"):
        (base / name).mkdir()
    words = [f"{base / 'upper'}=rw", f"{base / 'lower'}=ro"]
    with mounted(words, base / "mnt", "notify", "replay=on") as mount:
        yield mount


@dataclass
class Seen:
    """What each kind of watcher was told of a change, and which names the cookies of inotify bring together."""

    inotify: list[Event]
    fanotify: list[Event]
    renames: list[tuple[str, str]]


def watched(change: Callable[[Path], object], root: Path, at: Path, settle: Callable[[], object]) -> Seen:
    """What watchers of `root` are told of a change at `at`."""
    list(root.rglob("*"))
    places = {label: root / path for label, path in PLACES.items()}
    with closing(Inotify(places)) as inotify, closing(Fanotify(places)) as fanotify:
        change(at)
        settle()
        return Seen(inotify.take(), fanotify.take(), inotify.renames)


def check(found: Seen, plain: Seen, without: set[str]) -> None:
    """They are told the same, but for these words."""
    for some, wanted in ((found.inotify, plain.inotify), (found.fanotify, plain.fanotify)):
        assert told(some, without) == told(wanted, without)
        assert not [event for event in some if event[2] in without]
        assert names(some) == names(wanted)
    assert found.renames == plain.renames


def told(events: list[Event], without: set[str]) -> list[Event]:
    """In an order that does not matter, and each once: whoever writes twice is seen once."""
    return sorted({event for event in events if event[2] not in without})


def names(events: list[Event]) -> list[Event]:
    """How names came and went, in that order."""
    words = ("CREATE", "DELETE", "MOVED_FROM", "MOVED_TO")
    return [event for event in events if event[2].removesuffix(" DIR") in words]


@pytest.mark.parametrize("where", ["through the mount", "upper", "lower"])
@pytest.mark.parametrize("case", CHANGES)
def test_as_in_a_directory(shared: Mount, tmp_path: Path, case: str, where: str) -> None:
    compare(shared, tmp_path, case, where)


def compare(mount: Mount, tmp_path: Path, case: str, where: str) -> None:
    """The same change in a directory and in the union."""
    change, tree = CHANGES[case], f"{case} {where}"
    branch = "lower" if where == "lower" else "upper"
    make_tree(tmp_path / "plain" / tree)
    make_tree(mount[branch] / tree)
    mount.flush()
    plain = watched(change, tmp_path / "plain" / tree, tmp_path / "plain" / tree, lambda: None)
    at = (mount.path if where == "through the mount" else mount[branch]) / tree
    found = watched(change, mount.path / tree, at, mount.flush)
    check(found, plain, set() if where == "through the mount" else EXCEPTIONS.get(case, set()))


# -- in other mounts ------------------------------------------------------------------------------

ELSEWHERE = {
    "fanotify": "watch=fanotify",
    "cached": "io=cached",
    "passthrough": "io=passthrough",
}


SOME = (
    "made and written", "written", "written anew", "removed", "directory made", "directory removed",
    "renamed over another", "mode",
)  # fmt: skip


@pytest.mark.parametrize("options", ELSEWHERE.values(), ids=ELSEWHERE)
def test_in_other_mounts(union: UnionFactory, tmp_path: Path, options: str) -> None:
    """Whoever watches branches, and whoever opens files."""
    mount = union({"upper": "rw", "lower": "rw"}, "notify", f"replay=on,{options}")
    for case in SOME:
        for where in ("through the mount", "lower"):
            compare(mount, tmp_path, case, where)


def test_a_file_that_the_kernel_writes_by_itself(union: UnionFactory) -> None:
    """Nobody can tell who has written; not opened by the helper either, which the kernel would refuse."""
    mount = union({"upper": "rw"}, "notify", "replay=on,io=passthrough")
    path = mount["upper"] / "f"
    path.write_text("old")
    mount.flush()
    with closing(Inotify({"top": mount.path})) as watcher, (mount.path / "f").open("r+") as file:
        file.write("own")
        file.flush()
        watcher.take()
        append(path)
        mount.flush()
        file.close()
        mount.flush()
        assert watcher.take() == [("top", "f", "CLOSE_WRITE")]
        os.stat(mount.path / "f")  # until somebody asks, it may have been him
        append(path)
        mount.flush()
        assert told(watcher.take(), set()) == [("top", "f", word) for word in ("CLOSE_WRITE", "MODIFY", "OPEN")]


def test_chosen_paths(union: UnionFactory) -> None:
    mount = union(udba="notify", options="replay=/in/**:/etc/*.conf")
    for name in ("in/deep", "etc", "other"):
        (mount["base"] / name).mkdir(parents=True)
    mount.flush()
    paths = ("in", "in/deep", "etc", "other")
    with closing(Inotify({path: mount.path / path for path in paths})) as watcher:
        for path in paths:
            for name in ("a.conf", "b"):
                (mount["base"] / path / name).mkdir()
        mount.flush()
        made = [(label, name) for label, name, word in watcher.take() if word == "CREATE DIR"]
    assert sorted(made) == sorted(
        [("in", "a.conf"), ("in", "b"), ("in/deep", "a.conf"), ("in/deep", "b"), ("etc", "a.conf")]
    )


def test_whiteouts(union: UnionFactory) -> None:
    """One that is made directly removes, one that is removed shows again."""
    mount = union({"top": "rw", "base": "ro"}, "notify", "replay=on")
    (mount["base"] / "f").touch()
    (mount["base"] / "d").mkdir()
    mount.flush()
    os.stat(mount.path / "f")
    os.stat(mount.path / "d")
    with closing(Inotify({"top": mount.path})) as watcher:
        for name in ("f", "d"):
            (mount["top"] / f".wh.{name}").touch()
        mount.flush()
        assert names(watcher.take()) == [("top", "f", "DELETE"), ("top", "d", "DELETE DIR")]
        for name in ("f", "d"):
            (mount["top"] / f".wh.{name}").unlink()
        mount.flush()
        assert names(watcher.take()) == [("top", "f", "CREATE"), ("top", "d", "CREATE DIR")]
        for name in ("f", "d"):  # by whiteouts of our own
            (mount.path / name).rename(mount.path / f"{name} moved") if name == "f" else (mount.path / name).rmdir()
        mount.flush()
        assert names(watcher.take()) == [
            ("top", "f", "MOVED_FROM"), ("top", "f moved", "MOVED_TO"), ("top", "d", "DELETE DIR"),
        ]  # fmt: skip


def test_what_somebody_has_looked_up_since(union: UnionFactory) -> None:
    """The kernel knows the name already, or that there is none: it is made to ask again."""
    mount = union({"top": "rw"}, "notify", "replay=on")
    tree = mount["top"]
    (tree / "old").touch()
    (tree / "moved").touch()
    mount.flush()
    os.listdir(mount.path)
    with closing(Inotify({"top": mount.path})) as watcher:
        (tree / "new").mkdir()
        (tree / "old").unlink()
        (tree / "moved").rename(tree / "there")
        os.sync()
        for _ in range(200):  # until after the invalidation, and before the replay
            for name in ("new", "old", "moved", "there"):
                (mount.path / name).exists()
        mount.flush()
        assert sorted(names(watcher.take())) == [
            ("top", "moved", "MOVED_FROM"), ("top", "new", "CREATE DIR"), ("top", "old", "DELETE"),
            ("top", "there", "MOVED_TO"),
        ]  # fmt: skip


# -- never a change of a branch --------------------------------------------------------------------

MARKED = f"""
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from udbad.edge.native import REPLAY_UID
from udbad.mount import replayhelper
replayhelper.be_marked(REPLAY_UID)
root = os.open(sys.argv[1], os.O_PATH)
for message in sys.argv[2:]:
    try:
        replayhelper.act(root, message.encode().replace(b"|", bytes(1)))
        print("done:", message)
    except OSError as error:
        print(error.errno)
"""
MESSAGES = (
    "mkdir|.|new", "symlink|.|new", f"mknod|.|new|{0o100600}", f"mknod|.|new|{0o10600}", "unlink|.|f", "rmdir|.|empty",
    "rename|.|f|sub|there", "link|.|new|.|f", "attributes|.|f", "modify|.|f", "close|.|f", "write|.|f",
)  # fmt: skip


def state(root: Path) -> dict[str, tuple[int, ...]]:
    """Everything of a branch that a change would leave a trace in."""
    found: dict[str, tuple[int, ...]] = {}
    for path in (root, *root.rglob("*")):
        st = path.lstat()
        found[str(path)] = (st.st_ino, st.st_mode, st.st_nlink, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
    return found


def test_a_request_that_nobody_expects(shared: Mount) -> None:
    """Whoever makes requests as the helper does, and whatever was left by one that is gone."""
    make_tree(shared["upper"] / "marked")
    shared.flush()
    list((shared.path / "marked").rglob("*"))
    before = state(shared["upper"] / "marked")
    command = [sys.executable, "-c", MARKED, str(shared.path / "marked"), *MESSAGES]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines() == [str(errno.EIO)] * len(MESSAGES)
    assert state(shared["upper"] / "marked") == before


KILLED = """
import os, signal
from udbad.edge import replay
expect = replay.Replayer._expect
def killed(self, wanted, came):
    if os.path.exists({flag!r}):
        os.unlink({flag!r})
        os.kill(os.getpid(), signal.SIGKILL)
    expect(self, wanted, came)
replay.Replayer._expect = killed
"""


@pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not()))
@pytest.mark.parametrize("case", ["directory made", "removed", "renamed", "hard link"])
def test_a_mount_process_that_is_killed_in_it(
    union: UnionFactory, tmp_path: Path, patch_daemon: Callable[[str], None], case: str
) -> None:
    """The request is sent again to the next one, which expects nothing."""
    patch_daemon(KILLED.format(flag=str(tmp_path / "flag")))
    mount = union({"upper": "rw", "lower": "ro"}, "notify", "replay=on,survive=on", allow_log="another one takes over")
    make_tree(mount["upper"] / "t")
    mount.flush()
    list(mount.path.rglob("*"))
    (tmp_path / "flag").touch()
    with closing(Inotify({"top": mount.path / "t"})) as watcher:
        CHANGES[case](mount["upper"] / "t")
        before = state(mount["upper"])
        until(lambda: not (tmp_path / "flag").exists(), "the kill")
        mount.flush()
        assert mount.control({"op": "status"})["restarts"] == 1
        assert names(watcher.take()) == []
        assert state(mount["upper"]) == before
        for number in range(200):  # nobody but the watcher uses the directory, so it is watched again by us
            (mount["upper"] / "t" / f"later {number}").mkdir()
            mount.flush()
            if ("top", f"later {number}", "CREATE DIR") in watcher.take():
                break
        else:
            pytest.fail("watchers are not told any more")
        append(mount["upper"] / "t" / "g")  # which nobody has looked up since
        mount.flush()
        assert ("top", "g", "MODIFY") in watcher.take()
        assert {path.name for path in (mount.path / "t").iterdir()} == {
            path.name for path in (mount["upper"] / "t").iterdir()
        }


def test_a_storm(union: UnionFactory) -> None:
    """The branches are as whoever changes them has left them; who goes by the events knows which names there are."""
    mount = union({"upper": "rw", "lower": "ro"}, "notify", "replay=on")
    trees = [mount["upper"] / "t", mount["lower"] / "t"]
    for tree in trees:
        (tree / "sub").mkdir(parents=True)
    mount.flush()
    os.listdir(mount.path / "t")
    draw = random.Random(7)
    with closing(Inotify({"top": mount.path / "t", "sub": mount.path / "t" / "sub"})) as watcher:
        for _ in range(4000):
            tree = draw.choice(trees)
            path, other = (tree / draw.choice(("", "sub")) / str(draw.randrange(20)) for _ in range(2))
            with suppress(OSError):
                match draw.randrange(6):
                    case 0 | 1:
                        append(path)
                    case 2:
                        path.unlink()
                    case 3:
                        path.rename(other)
                    case 4:
                        path.mkdir()
                    case _:
                        path.chmod(0o600 if path.is_file() else 0o700)
        before = [state(tree) for tree in trees]
        mount.flush()
        assert [state(tree) for tree in trees] == before
        believed: dict[str, set[str]] = {"top": {"sub"}, "sub": set()}
        for label, name, word in names(watcher.take()):
            if word.startswith(("CREATE", "MOVED_TO")):
                believed[label].add(name)
            else:
                believed[label].discard(name)
    assert believed == {"top": set(os.listdir(mount.path / "t")), "sub": set(os.listdir(mount.path / "t" / "sub"))}
    metrics = mount.control({"op": "metrics"})["metrics"]
    assert sum(value for _, value in metrics["udbad_replayed_events_total"]) > 0


def test_nobody_is_kept_from_unmounting(union: UnionFactory) -> None:
    mount = union({"upper": "rw"}, "notify", "replay=on")
    for number in range(300):
        (mount["upper"] / str(number)).mkdir()
    mount.unmount()


# -- programs ---------------------------------------------------------------------------------------


@contextmanager
def program(*command: str, ready: str = "") -> Iterator[Callable[[str], None]]:
    """A program that writes what it sees; gives what waits until it has written a text."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        said, output = b"", process.stdout.fileno()
        os.set_blocking(output, False)

        def wait_for(text: str) -> None:
            def has_said() -> bool:
                nonlocal said
                with suppress(BlockingIOError):
                    said += os.read(output, 1 << 16)
                return text.encode() in said

            until(has_said, f"{text!r} of {command[0]}, not {said!r}")

        wait_for(ready)
        try:
            yield wait_for
        finally:
            process.kill()


def test_inotifywait_and_tail(shared: Mount) -> None:
    make_tree(shared["lower"] / "programs")
    shared.flush()
    here, there = shared.path / "programs", shared["lower"] / "programs"
    with (
        program("inotifywait", "-m", "-r", str(here), ready="established") as seen,
        program("tail", "-s", "0.1", "-F", str(here / "f"), ready="old") as followed,
    ):
        append(there / "f")
        followed("more")
        (there / "f").rename(there / "f.1")
        seen("MOVED_FROM f")  # what is made under the name before that, comes as such
        seen("MOVED_TO f.1")
        (there / "f").write_text("rotated\n")
        followed("rotated")
        (there / "sub" / "in").touch()
        seen("sub/ CREATE in")


@pytest.mark.parametrize("where", ["plain", "union"])
def test_path_units(shared: Mount, tmp_path: Path, where: str) -> None:
    """By a stand-in, which does what systemd does about them; in a directory as well, to know that it does."""
    here, there = shared.path / "units", shared["lower"] / "units"
    if where == "plain":
        here = there = tmp_path / "units"
    make_tree(there)
    shared.flush()
    paths = {
        "PathChanged": "f", "PathModified": "f", "PathExists": "new", "PathExistsGlob": "*.job",
        "DirectoryNotEmpty": "empty",
    }  # fmt: skip
    with ExitStack() as stack:
        units = {name: stack.enter_context(closing(PathUnit(name, here / path))) for name, path in paths.items()}

        def started() -> list[str]:
            shared.flush()
            return [name for name, unit in units.items() if unit.starts()]

        both = ["PathChanged", "PathModified"]
        assert started() == []
        append(there / "f")
        assert started() == both
        os.truncate(there / "f", 1)
        assert started() == ["PathModified"]
        (there / "f").unlink()
        assert started() == both
        (there / "f").write_text("again")
        assert started() == both
        (there / "new").touch()
        assert started() == ["PathExists"]
        (there / "one.job").touch()
        assert started() == ["PathExistsGlob"]
        (there / "empty" / "in it").touch()
        assert started() == ["DirectoryNotEmpty"]


def test_watchdog(shared: Mount) -> None:
    events = pytest.importorskip("watchdog.events")
    observers = pytest.importorskip("watchdog.observers")
    make_tree(shared["lower"] / "watchdog")
    shared.flush()
    here, there = shared.path / "watchdog", shared["lower"] / "watchdog"
    seen: list[tuple[str, str, str]] = []

    class Handler(events.FileSystemEventHandler):  # type: ignore[misc,name-defined]  # has no types when it is missing
        def on_any_event(self, event: Any) -> None:
            seen.append((event.event_type, os.path.basename(event.src_path), os.path.basename(event.dest_path)))

    observer = observers.Observer()
    observer.schedule(Handler(), str(here), recursive=True)
    observer.start()
    try:
        (there / "new").mkdir()
        shared.flush()
        until(lambda: ("created", "new", "") in seen, "a directory")
        (there / "new" / "in it").write_text("text")  # watched as well by now
        (there / "f").rename(there / "sub" / "moved")
        (there / "g").unlink()
        shared.flush()
        for wanted in (
            ("moved", "f", "moved"), ("deleted", "g", ""), ("created", "in it", ""), ("closed", "in it", ""),
        ):  # fmt: skip
            until(lambda wanted=wanted: wanted in seen, f"{wanted}, not {seen}")  # type: ignore[misc]  # bound here
    finally:
        observer.stop()
        observer.join()
