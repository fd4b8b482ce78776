"""Nodes by their ids, as table.py has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from udbad import compiled

if TYPE_CHECKING:
    from udbad.inodes.node import Node


class ById(dict[int, "Node"]):
    """A dictionary that is given nodes, which say their ids themselves."""

    def add(self, node: Node) -> None:
        """Instead of another one with its id, if there is one."""
        self[node.id] = node

    def remove(self, node: Node) -> None:
        """Raises KeyError when it is not there, or another one is."""
        if self.get(node.id) is not node:
            raise KeyError(node.id)
        del self[node.id]

    def shrunk(self) -> ById:
        """The same, without room for many more: a dictionary never shrinks by itself."""
        return ById(self)


if not compiled.why_not():
    from udbad.inodes.cbyid import ById  # type: ignore[assignment]  # the same, in a third of the memory
