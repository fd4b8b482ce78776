"""What `python -m tests.bench.million` does with a million directories, with some thousand: right, and in both ways of
watching, as there are fewer watches to be had than directories. How long things take is for the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import million
from tests.t4_coherence.test_degrade import lowered, watches_in_use

pytestmark = [pytest.mark.fuse, pytest.mark.alone]

DIRECTORIES = 3000
WATCHES = 1000


def test_more_directories_than_watches(tmp_path: Path) -> None:
    with lowered("max_user_watches", watches_in_use() + WATCHES):
        figures = million.run(tmp_path, DIRECTORIES, rounds=1, places=5)
    assert figures.wrong == []
    assert 0 < figures.values["watches"] <= WATCHES
    assert figures.values["watches"] + figures.values["handles"] >= DIRECTORIES
    assert "held by lost events at most [ms]" in figures.values
