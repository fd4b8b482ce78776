from array import array
from collections.abc import Callable, Mapping
from mmap import mmap

from udbad.branch.branches import Branch
from udbad.inodes.inomap import Identity
from udbad.inodes.node import Node
from udbad.inodes.table import InodeTable

VERSION: int
"""Of the record (record.py) whose entries are known here."""

class Unread:
    """The nodes of one record: made when somebody asks for them, and some at a time."""

    live_bytes: int
    """Of the entries of the record that count."""

    def __init__(
        self,
        memory: mmap | bytes,
        size: int,
        table: InodeTable,
        branches: Mapping[int, Branch],
        make_other: Callable[[bytes, int], Node],
        taken: Callable[[int, Identity], int],
    ) -> None:
        """memory, size: of the log, which stays as it is while there is something left. branches: by their ids, those
        that the mount still has and that answer. make_other: called with payload and count of each entry that is not
        for here, puts its node into the table, but for its name. taken: the descriptor of ours for one of then, if it
        is of that object, else -1."""

    def __len__(self) -> int:
        """How many there were."""

    def scan(self, other: Callable[[bytes, int], object]) -> list[int]:
        """Find what there is; other: called with payload and count of every entry that is not about nodes alone.
        Returns the ids of nodes that may have several names. Raises ValueError for what is no log."""

    def find(self, node_id: int) -> Node | None:
        """The node of an id, made or not, with all that is above it, and all that is known in it by name."""

    def has(self, node_id: int) -> bool:
        """Whether there is one that was not made yet."""

    def some(self, most: int) -> bool:
        """Look at so many of them, and make those that were not; False when all are made."""

    def forgotten(self, pages: bool) -> tuple[array[int], array[int]]:
        """The kernel is about to forget all that it has of those that were not made yet: the ids of what it may have
        pages of, and of the rest. pages: it may have some of any file."""

    def spare(self) -> list[int]:
        """The ids that were not computed from what a branch says (InoMap.skip)."""
