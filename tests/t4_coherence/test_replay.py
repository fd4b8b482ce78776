"""`replay=on`: watchers of the union get the events of direct changes.

What they ought to get is not written here: a directory on a file system of its own says it, of which the same is
changed and watched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, mounted
from tests.helpers.watching import Event, Fanotify, Inotify

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

WATCHERS: dict[str, type[Inotify] | type[Fanotify]] = {"inotify": Inotify, "fanotify": Fanotify}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One mount, with a tree of its own for each case."""
    base = tmp_path_factory.mktemp("replay")
    for name in ("upper", "lower"):
        (base / name).mkdir()
    words = [f"{base / 'upper'}=rw", f"{base / 'lower'}=ro"]
    with mounted(words, base / "mnt", "notify", "replay=on") as mount:
        yield mount


def watched(
    change: Callable[[Path], object], by: str, root: Path, at: Path, settle: Callable[[], object]
) -> tuple[list[Event], list[tuple[str, str]]]:
    """What a watcher of `root` is told of a change at `at`, and which names cookies bring together."""
    list(root.rglob("*"))
    places = {label: root / path for label, path in PLACES.items()}
    with closing(WATCHERS[by](places)) as watcher:
        change(at)
        settle()
        return watcher.take(), watcher.renames


def told(events: list[Event], without: set[str]) -> list[Event]:
    """In an order that does not matter, and each once: whoever writes twice is seen once."""
    return sorted({event for event in events if event[2] not in without})


def names(events: list[Event]) -> list[Event]:
    """How names came and went, in that order."""
    words = ("CREATE", "DELETE", "MOVED_FROM", "MOVED_TO")
    return [event for event in events if event[2].removesuffix(" DIR") in words]


@pytest.mark.parametrize("by", WATCHERS)
@pytest.mark.parametrize("where", ["through the mount", "upper", "lower"])
@pytest.mark.parametrize("case", CHANGES)
def test_as_in_a_directory(shared: Mount, tmp_path: Path, case: str, where: str, by: str) -> None:
    change = CHANGES[case]
    tree = f"{case} {where} {by}"
    branch = "lower" if where == "lower" else "upper"
    make_tree(tmp_path / "plain")
    make_tree(shared[branch] / tree)
    shared.flush()
    plain, plain_renames = watched(change, by, tmp_path / "plain", tmp_path / "plain", lambda: None)
    at = shared.path / tree if where == "through the mount" else shared[branch] / tree
    found, renames = watched(change, by, shared.path / tree, at, shared.flush)
    without = set() if where == "through the mount" else EXCEPTIONS.get(case, set())
    assert told(found, without) == told(plain, without)
    assert not [event for event in found if event[2] in without]
    assert names(found) == names(plain)
    assert renames == plain_renames
