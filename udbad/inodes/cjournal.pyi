from typing import Any

from udbad.inodes.handles import HandleTable
from udbad.inodes.record import Half
from udbad.inodes.table import InodeTable

class Writer:
    def __init__(self, table: InodeTable, handles: HandleTable) -> None: ...
    def __call__(self, changed: set[Any], half: Half) -> bool: ...
