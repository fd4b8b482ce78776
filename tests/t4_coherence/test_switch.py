"""The mode changes while mounted: when the answer has arrived, the new promise holds, whatever was cached before."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path

import pytest

from tests.helpers.merge import Tree, diff, merge, snapshot
from tests.helpers.mount import Mount, UnionFactory

pytestmark = pytest.mark.fuse

MODES = ("none", "reval", "notify")
LAYERS = {"top": "rw", "base": "ro"}
ROUNDS = ("first", "second")


def fill(root: Path) -> None:
    for branch in LAYERS:
        (root / branch / "d/deep").mkdir(parents=True)
        for word in ROUNDS:
            (root / branch / "d" / f"{word}.{branch}").write_text(f"{word} old")
            (root / branch / "d/deep" / f"{word}.{branch}").write_text(f"{word} old")


def change(root: Path, word: str) -> None:
    """Change, remove, add and hide something directly in each branch."""
    (root / "top/d" / f"{word}.top").write_text(f"{word} new and longer")
    (root / "top/d" / f"{word}.base").write_text(f"{word} new above")
    (root / "base/d/deep" / f"{word}.base").unlink()
    (root / "top/d/deep" / f".wh.{word}.top").touch()
    (root / "top/d/deep" / f"{word}.top").unlink()
    (root / "base/d" / f"{word}.added").write_text("added")
    (root / "top" / f"{word}.directory").mkdir()
    (root / "top" / f"{word}.directory/inside").write_text("inside")


def expected(mount: Mount) -> Tree:
    return merge(
        (branch, permission == "rw") for branch, permission in zip(mount.branches, LAYERS.values(), strict=True)
    )


def read(path: Path) -> str | None:
    """Ask by name, without a listing, which would bring fresh answers."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def look(mount: Mount, word: str) -> list[str | None]:
    names = [f"d/{word}.top", f"d/{word}.base", f"d/deep/{word}.base", f"d/deep/{word}.top"]
    names += [f"d/{word}.added", f"{word}.directory/inside"]
    return [read(mount.path / name) for name in names]


OLD = ["old", "old", "old", "old", None, None]
NEW = ["new and longer", "new above", None, None, "added", "inside"]


def words(word: str, contents: list[str | None]) -> list[str | None]:
    return [content if content is None or i > 3 else f"{word} {content}" for i, content in enumerate(contents)]


def switch(mount: Mount, mode: str) -> None:
    answer = mount.control({"op": "udba", "mode": mode})
    assert answer["ok"] is True
    assert answer["mode"] == mode
    assert mount.control({"op": "stats"})["coherence"]["mode"] == mode


def requests_for(mount: Mount, work: Callable[[], object]) -> int:
    """LOOKUP and GETATTR requests that some work leads to."""
    before = mount.requests()
    work()
    now = mount.requests()
    return sum(now[name] - before[name] for name in ("lookup", "getattr"))


def stat_all(mount: Mount) -> None:
    for name in expected(mount):
        os.lstat(os.path.join(os.fsencode(mount.path), name))


@contextmanager
def held(mount: Mount) -> Iterator[list[int]]:
    """Open files and a current directory inside, which stay what they are over every switch."""
    with ExitStack() as stack:
        descriptors = []
        for name in ("d/first.top", "d/deep/first.base"):
            descriptors.append(os.open(mount.path / name, os.O_RDONLY))
            stack.callback(os.close, descriptors[-1])
        stack.enter_context(chdir(mount.path / "d/deep"))
        yield descriptors


@pytest.mark.parametrize(("before", "after"), list(itertools.product(MODES, MODES)))
def test_the_new_promise_holds_when_the_answer_is_there(
    union: UnionFactory, tmp_path: Path, before: str, after: str
) -> None:
    fill(tmp_path)
    mount = union(LAYERS, before)
    for word in ROUNDS:
        assert look(mount, word) == words(word, OLD)

    # What happened before the switch is seen after it, whatever the old mode had promised.
    with held(mount) as descriptors:
        change(tmp_path, "first")
        switch(mount, after)
        assert look(mount, "first") == words("first", NEW)
        assert read(Path("first.base")) is None
        assert [os.pread(fd, 100, 0) for fd in descriptors] == [b"first new and longer", b"first old"]
    assert diff(expected(mount), snapshot(mount.path)) == []

    # And the new mode does what it says from now on.
    assert look(mount, "second") == words("second", OLD)
    stat_all(mount)
    again = requests_for(mount, lambda: stat_all(mount))
    if after == "reval":
        assert again >= len(expected(mount))
    else:
        assert again == 0
    change(tmp_path, "second")
    if after == "none":
        switch(mount, "none")  # the same mode again is a refresh, as aufs' documentation recommends it
    elif after == "notify":
        mount.flush()
    assert look(mount, "second") == words("second", NEW)
    assert diff(expected(mount), snapshot(mount.path)) == []


def test_round_and_round(union: UnionFactory, tmp_path: Path) -> None:
    """Many switches leave nothing behind: no watches in `none`, no stale answer, no request that is lost."""
    fill(tmp_path)
    mount = union(LAYERS, "none")
    stat_all(mount)
    for mode, following in itertools.pairwise([*MODES, *reversed(MODES)] * 3):
        file = tmp_path / "base/d/changing"
        file.write_text(f"{mode} {following}")
        switch(mount, following)
        assert (mount.path / "d/changing").read_text() == f"{mode} {following}"
        watches = mount.control({"op": "stats"})["coherence"]["watches"]
        assert watches > 0 if following == "notify" else watches == 0 or following == "reval"
        file.unlink()
    switch(mount, "reval")
    assert diff(expected(mount), snapshot(mount.path)) == []


def test_a_mode_that_does_not_exist_changes_nothing(union: UnionFactory) -> None:
    mount = union(LAYERS, "notify")
    answer = mount.control({"op": "udba", "mode": "sometimes"})
    assert answer["ok"] is False
    assert "sometimes" in answer["error"]
    assert mount.control({"op": "stats"})["coherence"]["mode"] == "notify"
