"""A union as its predecessor's record says it was, and the record of this one."""

from __future__ import annotations

from collections.abc import Callable

from udbad.inodes.record import Record
from udbad.union.fs import UnionFs


def recall(fs: UnionFs, record: Record, take: Callable[[int], int]) -> None:
    """Rebuild in a fresh union what the record says.

    take: duplicates the descriptor that had this number. Raises OSError.
    Precondition: the branches have the ids that they had. `Coherence.recalled` is for the caller to call afterwards.
    """
    raise NotImplementedError


def keep(fs: UnionFs, record: Record) -> None:
    """Have the record say what the union knows, all of it now, and from now on what changes. Raises OSError."""
    raise NotImplementedError
