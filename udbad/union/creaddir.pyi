"""As readdir.py has it."""

from udbad.inodes.node import Node
from udbad.union.view import Said, View

def as_said(hits: View, names: list[bytes], said: Said, children: dict[bytes, Node], first: int, end: int) -> int: ...
