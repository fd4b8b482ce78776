"""Paths of nodes, by the names that they are known by."""

from __future__ import annotations

from udbad.inodes.node import Node
from udbad.types import ROOT_ID


def lineage(node: Node) -> list[Node]:
    """A node and the directories above it, up to the root; to one that has no name, where it has been removed."""
    found = [node]
    while node.parent is not None:
        node = node.parent
        found.append(node)
    return found


def path_in(node: Node) -> bytes | None:
    """Path of a node from the root of the union, without a slash before it; None when it has none."""
    *named, top = lineage(node)
    return _joined(named) if top.id == ROOT_ID else None


def last_path(node: Node) -> bytes:
    """A path of a node inside the mount, as it was last known, with a slash before it; for messages."""
    return b"/" + _joined(lineage(node)[:-1])


def _joined(named: list[Node]) -> bytes:
    return b"/".join(node.name for node in reversed(named))
