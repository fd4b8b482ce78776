"""A watched tree tells every change below it, by paths: what is new with all that came with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from udbad.hosts.tree import LINKS, Tree


class Told:
    """A tree, and what it has told."""

    def __init__(self, top: Path) -> None:
        self.changes: dict[str, str] = {}
        self.lost = 0
        self.tree = Tree(str(top), self.changes.__setitem__, self._lose, "inotify")

    def _lose(self) -> None:
        self.lost += 1

    def take(self) -> set[str]:
        self.tree.drain()
        told = set(self.changes)
        self.changes.clear()
        return told


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    (tmp_path / "top/d/e").mkdir(parents=True)
    (tmp_path / "top/d/f").touch()
    told = Told(tmp_path / "top")
    yield told
    told.tree.close()


def test_names_and_contents(told: Told, tmp_path: Path) -> None:
    top = tmp_path / "top"
    assert len(told.tree) == 3
    (top / "d/e/new").touch()
    (top / "d/f").write_text("x")
    assert told.take() == {"d/e/new", "d/f"}
    (top / "d/f").unlink()
    (top / "d").chmod(0o700)
    assert told.take() == {"d/f", "d"}
    assert told.take() == set()


def test_a_new_directory_is_watched_with_what_is_in_it(told: Told, tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "n/m").mkdir(parents=True)
    assert {"n", "n/"} <= told.take()
    (top / "n/m/x").touch()
    assert told.take() == {"n/m/x"}


def test_a_directory_that_is_moved_has_its_new_path(told: Told, tmp_path: Path) -> None:
    top = tmp_path / "top"
    os.rename(top / "d", top / "g")
    assert {"d", "g", "g/"} <= told.take()
    (top / "g/e/x").touch()
    assert told.take() == {"g/e/x"}
    os.rename(top / "g", tmp_path / "away")
    assert "g" in told.take()
    (tmp_path / "away/e/y").touch()
    assert told.take() == set()
    assert len(told.tree) == 1


def test_a_link_leads_nowhere(told: Told, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    os.symlink(tmp_path / "outside", tmp_path / "top/link")
    assert told.take() == {"link"}
    (tmp_path / "outside/x").touch()
    assert told.take() == set()


def test_other_names_of_a_file_are_said_to_be(told: Told, tmp_path: Path) -> None:
    os.link(tmp_path / "top/d/f", tmp_path / "top/d/e/g")
    told.take()
    (tmp_path / "top/d/f").write_text("x")
    told.tree.drain()
    assert LINKS in told.changes["d/f"].split(",")


@pytest.mark.alone
def test_events_that_were_lost(told: Told, tmp_path: Path, expect_log: Callable[[str], None]) -> None:
    """Then directories may have come that nobody has told of."""
    expect_log("events were lost")
    top = tmp_path / "top"
    with open("/proc/sys/fs/inotify/max_queued_events") as limit:
        most = int(limit.read())
    for number in range(most // 2 + 100):
        (top / f"d/{number % 2}").touch()
        (top / f"d/{number % 2}").unlink()
    (top / "d/unheard").mkdir()
    told.take()
    assert told.lost == 1
    (top / "d/unheard/x").touch()
    assert told.take() == {"d/unheard/x"}


def test_the_directory_goes(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    told = Told(tmp_path / "top")
    try:
        (tmp_path / "top").rmdir()
        with pytest.raises(OSError, match="has gone"):
            told.tree.drain()
    finally:
        told.tree.close()
