"""udba=none: nobody else changes the branches, so everything is believed for ever.

Own changes are right at once: they edit the views, and the kernel changes its own caches with them.
Nothing is promised about direct changes; a branch that was given another mode for itself is still
served by that one.
"""

from __future__ import annotations

import os

from udbad.coherence.base import Coherence
from udbad.inodes.node import Dir, Node


class NoneCoherence(Coherence):
    name = "none"

    def adopt(self, node: Dir, changed: bool) -> None:
        parent = node.parent
        above = parent is None or parent.trusted
        self.judge(node, above and all(self.mode_of(layer.branch) == "none" for layer in node.layers))

    def keep_cache(self, node: Node, st: os.stat_result) -> bool:
        trusted = node.parent is not None and node.parent.trusted
        return super().keep_cache(node, st) or trusted
