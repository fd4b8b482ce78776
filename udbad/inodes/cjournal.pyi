from typing import Any

from udbad.inodes.handles import HandleTable
from udbad.inodes.record import Half
from udbad.inodes.table import InodeTable

def append(table: InodeTable, handles: HandleTable, changed: set[Any], half: Half) -> bool: ...
