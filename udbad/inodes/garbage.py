"""Python's search for cyclic garbage, which must not go through the table.

A whole search looks at every object there is, 10 ms for 20,000 files, two seconds for a million directories, and all
requests wait meanwhile. It has nothing to find there: nodes that leave the table let go of each other (table.py), and
are freed by their reference counts. So nodes are no objects that are looked at, where the hot modules are compiled.
What they hold, a view for instance, still is, and so is everything else: while there are many nodes, what a search has
left is set aside (gc.freeze), and the next one has only what was made since: some 70,000 objects. What became garbage
after it was set aside is found when the table is small again.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

MANY: Final = 20_000
"""Nodes, of about 10 MiB; a whole search then takes some tens of milliseconds."""
_WHOLE: Final = 2
"""The generation of a whole search."""

_libc = ctypes.CDLL(None)


def spare(nodes: Callable[[], int]) -> None:
    """From now on, while there are more than MANY nodes, look through no object twice. nodes: how many there are."""

    def searched(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == _WHOLE and nodes() > MANY:
            gc.freeze()

    gc.callbacks.append(searched)


@contextmanager
def unsearched(nodes: Callable[[], int]) -> Iterator[None]:
    """Nodes are made within, which stay: there is nothing to be found in them. nodes: how many there are."""
    searches = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searches:
            if nodes() > MANY:
                gc.freeze()
            gc.enable()


def give_back(nodes: int) -> None:
    """Return freed memory to the system; nodes: how many are left."""
    if nodes <= MANY:
        gc.unfreeze()
    else:
        gc.freeze()
    # The interpreter keeps thousands of small tuples and dictionaries for the next to need one (free lists), and each
    # may hold an arena of a megabyte; a whole search lets go of them.
    gc.collect()
    _libc.malloc_trim(0)
