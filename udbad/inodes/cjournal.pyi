from collections.abc import Callable, Mapping
from mmap import mmap
from typing import Any

from udbad.branch.branches import Branch
from udbad.inodes.handles import HandleTable
from udbad.inodes.inomap import InoMap
from udbad.inodes.record import Half
from udbad.inodes.table import InodeTable, Node

VERSION: int
"""Of the record (record.py), whose entries these know."""

def scan(memory: mmap, size: int, nodes: dict[int, Any], other: Callable[[bytes, int], object]) -> None:
    """Note where in a log of `size` bytes the last entry of each node is that is no directory, by its id in `nodes`;
    `other` is called with the payload and the count of whatever else there is, in order."""

def nodes(
    memory: mmap, size: int, nodes: Mapping[int, Any], branches: Mapping[int, Branch], table: dict[int, Node]
) -> list[tuple[bytes, int]]:
    """Make the nodes whose places are in `nodes`, and put them into `table`, where the directories are already, under
    their names. Returned are payload and count of those that need more than that."""

class Writer:
    def __init__(self, table: InodeTable, handles: HandleTable, inomap: InoMap) -> None: ...
    def __call__(self, changed: set[Any], half: Half) -> bool: ...
