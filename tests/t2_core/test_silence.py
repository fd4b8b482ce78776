"""reval: what is known of a directory is used while its watches say nothing, and not a moment longer."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers.merge import merge
from tests.helpers.profile import scaled
from tests.helpers.syscalls import counted
from tests.t2_core.core import Core, core
from udbad.coherence import silence
from udbad.coherence.reval import RevalCoherence
from udbad.inodes.node import Dir

LAYERS = {"top": "rw", "middle": "rw", "base": "ro"}
PATH = "a/b/c"


@pytest.fixture(params=["disk", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where the branches are: where times of directories are exact, and on tmpfs, where they tell nothing."""
    if request.param == "disk":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="udbad-") as name:
        yield Path(name)


@pytest.fixture
def union(place: Path) -> Iterator[Core]:
    for name in ("middle", "base"):
        (place / name / PATH).mkdir(parents=True)
        (place / name / PATH / f"of-{name}").touch()
    (place / "base" / "beside" / "b" / "c").mkdir(parents=True)
    (place / "base" / "beside" / "b" / "c" / "other").touch()
    with core(place, LAYERS) as made:
        for _ in range(4):
            assert sorted(made.names(PATH)) == ["of-base", "of-middle"]
        for path in ("a", "a/b", PATH):
            node = made.find(path)
            assert type(node) is Dir
            assert node.quiet
        yield made


def above(union: Core) -> None:
    (union["top"] / PATH).mkdir(parents=True)
    (union["top"] / PATH / "of-top").touch()


def whited(union: Core) -> None:
    (union["middle"] / PATH / ".wh.of-base").touch()


def opaque(union: Core) -> None:
    (union["middle"] / "a" / "b" / ".wh..wh..opq").touch()


def removed(union: Core) -> None:
    (union["base"] / PATH / "of-base").unlink()


def exchanged(union: Core) -> None:
    """A directory of the same names takes the place of one far above."""
    (union["base"] / "a").rename(union["base"] / "was")
    (union["base"] / "beside").rename(union["base"] / "a")


def hidden(union: Core) -> None:
    (union["top"] / "a").touch()


def there(union: Core, path: str) -> bool:
    try:
        return union.exists(path)
    except OSError as error:
        if error.errno != errno.ESTALE:  # asked for a name in what is no directory, which the kernel would not
            raise
        return False


DIRECT: dict[Callable[[Core], None], list[str] | None] = {
    above: ["of-base", "of-middle", "of-top"],
    whited: ["of-middle"],
    opaque: ["of-middle"],
    removed: ["of-middle"],
    exchanged: ["of-middle", "other"],
    hidden: None,
}


@pytest.mark.parametrize("change", DIRECT, ids=lambda change: str(change.__name__))
def test_a_direct_change_is_seen_by_the_next_question(union: Core, change: Callable[[Core], None]) -> None:
    expected = DIRECT[change]
    change(union)
    if expected is None:
        assert not there(union, PATH)
    else:
        assert sorted(union.names(PATH)) == expected


@pytest.mark.parametrize("change", DIRECT, ids=lambda change: str(change.__name__))
def test_by_whoever_sits_in_the_directory(union: Core, change: Callable[[Core], None]) -> None:
    """Without a walk from the root, as a process does whose current directory it is."""
    node = union.find(PATH)
    change(union)
    expected = DIRECT[change]
    if expected is None:
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
            union.names("a/b")
        return
    names = [name for name in ("of-base", "of-middle", "of-top", "other") if union.fs.lookup(node.id, name.encode())]
    assert names == expected


def test_an_own_change_hides_no_direct_one(union: Core) -> None:
    union.fs.release(union.create(f"{PATH}/new").fh)
    (union["middle"] / PATH / "new").unlink(missing_ok=True)
    (union["top"] / PATH / "new").unlink(missing_ok=True)
    assert not union.exists(f"{PATH}/new")
    (union["base"] / PATH / "new").touch()
    assert union.exists(f"{PATH}/new")
    union.unlink(f"{PATH}/new")
    assert not union.exists(f"{PATH}/new")
    for whiteout in (union["middle"] / PATH / ".wh.new", union["top"] / PATH / ".wh.new"):
        whiteout.unlink(missing_ok=True)
    assert union.exists(f"{PATH}/new")


def test_lost_events(union: Core) -> None:
    """The queue runs over, and what follows is not told any more."""
    noise = union["base"] / PATH / "noise"
    for _ in range(int(Path("/proc/sys/fs/inotify/max_queued_events").read_text()) // 2 + 1):
        noise.touch()
        noise.unlink()
    removed(union)
    assert union.names(PATH) == ["of-middle"]
    above(union)
    assert sorted(union.names(PATH)) == ["of-middle", "of-top"]


def test_more_directories_than_watches(place: Path) -> None:
    for number in range(20):
        (place / "base" / f"d{number}").mkdir(parents=True)
    with mock.patch.object(silence, "watch_limit", return_value=8 * silence._SHARE), core(place) as union:
        strategy = union.sb.changes.hooks
        assert isinstance(strategy, RevalCoherence)
        for turn in range(4):
            for number in range(20):
                assert sorted(union.names(f"d{number}")) == [f"n{n}" for n in range(turn)]
                assert strategy.statistics().watches <= 8
            for number in range(20):
                (place / "base" / f"d{number}" / f"n{turn}").touch()
        assert strategy.statistics().watches > 4


def test_what_is_forgotten_is_watched_no_more(union: Core) -> None:
    strategy = union.sb.changes.hooks
    assert isinstance(strategy, RevalCoherence)
    assert strategy.statistics().watches > 3
    union.forget_all()
    assert strategy.statistics().watches == 3  # the root, on three branches
    union.sb.changes.hooks.adopt(union.sb.root, False)
    assert union.find(PATH)


@pytest.mark.parametrize("levels", [4, 60])
def test_depth_and_branches_cost_no_system_call(place: Path, levels: int) -> None:
    path = "/".join(["n"] * levels)
    for name in LAYERS:
        (place / name / path).mkdir(parents=True)
    (place / "base" / path / "file").touch()
    with core(place, LAYERS) as union:
        directory = union.find(path)
        for _ in range(50):  # until the names are worth reading, too
            union.fs.getattr(directory.id)
            assert union.fs.lookup(directory.id, b"file")
        with counted() as calls:
            union.fs.getattr(directory.id)
            union.fs.lookup(directory.id, b"file")
            union.fs.lookup(directory.id, b"missing")
    assert sum(calls.values()) <= 3 + 2, calls  # poll(2) each; one stat for each that is there


@pytest.mark.parametrize("seed", range(scaled(2, 20)))
def test_whatever_is_done_directly_and_through_the_mount(
    union: Core, place: Path, expect_log: Callable[[str], None], seed: int
) -> None:
    expect_log("both in branch")
    dice = random.Random(seed)
    directories = ["a", "a/b", PATH, "beside/b"]
    branches = [(place / name, name != "base") for name in LAYERS]

    def direct() -> None:
        path = place / dice.choice(list(LAYERS)) / dice.choice(directories)
        name = dice.choice(["x", "y", "of-base", ".wh.x", ".wh.y", ".wh.of-base", ".wh..wh..opq"])
        if (path / name).exists():
            (path / name).unlink()
        elif path.is_dir():
            (path / name).touch()
        elif dice.random() < 0.3:
            path.mkdir(parents=True)

    def own() -> None:
        path = f"{dice.choice(directories)}/{dice.choice(['x', 'y', 'of-base'])}"
        if dice.random() < 0.3:
            other = f"{dice.choice(directories)}/{dice.choice(['x', 'y', 'z'])}"
            if there(union, path):
                union.rename(path, other)
        elif there(union, path):
            union.unlink(path)
        else:
            union.fs.release(union.create(path).fh)

    for _ in range(150):
        try:
            dice.choice([direct, own])()
        except (FileNotFoundError, NotADirectoryError):
            pass
        truth = {os.fsdecode(name) for name in merge(branches)}
        for directory in directories:
            seen = set(union.names(directory)) if there(union, directory) else set()
            below = {name[len(directory) + 1 :] for name in truth if name.startswith(directory + "/")}
            assert seen == {name for name in below if "/" not in name}, directory
            for name in ("x", "y", "of-base", "nowhere"):
                assert there(union, f"{directory}/{name}") == (f"{directory}/{name}" in truth), (directory, name)
