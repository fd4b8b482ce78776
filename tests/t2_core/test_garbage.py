"""Python's search for garbage does not go through a large table again and again (inodes/garbage.py)."""

from __future__ import annotations

import gc
import stat
from collections.abc import Iterator

import pytest

from udbad import compiled
from udbad.branch.branches import Branch
from udbad.inodes import garbage
from udbad.inodes.node import Dir, Layer, Node


@pytest.fixture
def nodes() -> Iterator[list[int]]:
    """How many nodes there are said to be."""
    said = [0]
    garbage.spare(lambda: said[0])
    yield said
    gc.callbacks.pop()
    gc.unfreeze()


def test_what_a_search_has_left_is_set_aside_while_there_are_many_nodes(nodes: list[int]) -> None:
    gc.unfreeze()
    gc.collect()
    assert gc.get_freeze_count() == 0
    nodes[0] = garbage.MANY + 1
    gc.collect()
    aside = gc.get_freeze_count()
    assert aside > 1000
    kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]  # of nothing
    gc.collect(1)
    assert gc.get_freeze_count() == aside
    gc.collect()
    assert gc.get_freeze_count() >= aside + len(kept)


@pytest.mark.parametrize(("left", "found"), [(garbage.MANY + 1, False), (garbage.MANY, True)])
def test_what_became_garbage_there_is_found_when_there_are_few(nodes: list[int], left: int, found: bool) -> None:
    class Cycle:
        """One that says when it is gone."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            gone.append(True)

    gone: list[bool] = []
    cycle = Cycle()
    nodes[0] = garbage.MANY + 1
    gc.collect()
    del cycle
    gc.collect()
    assert not gone
    garbage.give_back(left)
    assert gone == [True] * found


@pytest.mark.skipif(bool(compiled.why_not()), reason="ok: as Python, nodes are looked at as everything is")
def test_no_search_looks_at_nodes() -> None:
    layer = Layer(Branch.__new__(Branch), 1, 2, 1, -1)
    directory = Dir(1, [layer])
    node = Node(2, stat.S_IFREG, layer.branch, 1, 3)
    directory.children[b"f"] = node
    assert not any(map(gc.is_tracked, (layer, directory, node)))
