"""Whether a directory that nobody watches has changed since it was last asked: by the times of its branch directories.

A name that comes, goes or is replaced changes mtime and ctime of the directory it is in. So one fstat a branch
directory can take the place of probing every branch for every component of a path. With multigrain time
stamps (Linux 6.13) a change after an fstat always gets a new ctime, however soon it follows; elsewhere two
changes may leave the same times, and nothing is concluded from times that are not older than a tick.
"""

from __future__ import annotations

import os
from time import time_ns

from udbad.branch.branches import Branch
from udbad.inodes.table import Dir
from udbad.types import Perm
from udbad.union.superblock import Superblock

_SECOND_NS = 1_000_000_000
_COARSE_NS = 50_000_000
"""Within this time of a change a second one may leave the same times, where those are a tick of the clock."""
_WHOLE_NS = 2_100_000_000
"""The same where they are whole seconds (ext4 with inodes of 128 bytes), or even ones (vfat)."""

MAX_LAYERS = 16
"""A directory merged from more is probed name by name: most names are found before so many were asked."""


def is_racy(branch: Branch, st: os.stat_result) -> bool:
    """Whether a change after this stat may leave the object the ctime it has ("racily clean", as git calls it)."""
    if st.st_ctime_ns % _SECOND_NS:
        return not branch.exact_times and time_ns() - st.st_ctime_ns <= _COARSE_NS
    return branch.perm is not Perm.RR and time_ns() - st.st_ctime_ns <= _WHOLE_NS


def unchanged(sb: Superblock, node: Dir) -> bool:
    """True when the branch directories of a node have the names and the opaque marks they had at the last call.

    When not, its view is dropped and `Dir.version` raised, so that children are resolved again. What is to be
    kept of the directory must be read after this call.
    """
    now = _times(sb, node)
    if now is not None and now == node.times:
        return True
    node.times = now
    node.version = sb.next_version()
    node.view = None
    node.probes = 0  # what changes all the time is not worth loading
    return False


def _times(sb: Superblock, node: Dir) -> list[int] | None:
    layers = node.layers
    if len(layers) > MAX_LAYERS:
        return None
    now = []
    try:
        for layer in layers:
            if not layer.branch.exact_times and not layer.branch.local:
                return None
            st = os.fstat(layer.fd if layer.fd >= 0 else sb.layer_fd(node, layer))
            if is_racy(layer.branch, st):
                return None
            now.append(st.st_mtime_ns)
            now.append(st.st_ctime_ns)
    except OSError:  # ESTALE: moved or removed
        return None
    return now
