from typing import Any

from udbad.inodes.handles import HandleTable
from udbad.inodes.inomap import InoMap
from udbad.inodes.record import Half
from udbad.inodes.table import InodeTable

class Writer:
    def __init__(self, table: InodeTable, handles: HandleTable, inomap: InoMap) -> None: ...
    def __call__(self, changed: set[Any], half: Half) -> bool: ...
