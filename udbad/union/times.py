"""Whether a directory that is not trusted has changed since it was last asked: by what its watches have told, or else
by the times of its branch directories.

A name that comes, goes or is replaced changes mtime and ctime of the directory it is in. So one fstat a branch
directory can take the place of probing every branch for every component of a path. With multigrain time
stamps (Linux 6.13) a change after an fstat always gets a new ctime, however soon it follows; elsewhere two
changes may leave the same times, and nothing is concluded from times that are not older than a tick.
"""

from __future__ import annotations

from udbad.branch import state, syscalls
from udbad.branch.state import Stamp
from udbad.inodes.node import Dir
from udbad.union.superblock import Superblock

MAX_LAYERS = 16
"""A directory merged from more is probed name by name: most names are found before so many were asked."""


def unchanged(sb: Superblock, node: Dir) -> bool:
    """True when the branch directories of a node have the names and the opaque marks they had at the last call.

    When not, its view is dropped and `Dir.version` raised, so that children are resolved again. What is to be
    kept of the directory must be read after this call.
    """
    if node.quiet:
        return True
    if len(node.layers) > MAX_LAYERS:
        now = None
    else:
        # A watch is for a directory that is used again. It comes before the times, so that no change falls between.
        node.quiet = node.version > 0 and sb.changes.listen(node)
        now = _times(sb, node)
    if now is not None and now == node.times:
        return True
    node.times = now
    node.version = sb.next_version()
    node.view = None
    node.probes = 0  # what changes all the time is not worth loading
    return False


def _times(sb: Superblock, node: Dir) -> list[Stamp] | None:
    now = []
    try:
        for layer in node.layers:
            if not layer.branch.exact_directory_times and not layer.branch.local:
                return None
            st = syscalls.fstat(layer.fd if layer.fd >= 0 else sb.layer_fd(node, layer))
            stamp = state.lasting_stamp(layer.branch, st)
            if stamp is None:
                return None
            now.append(stamp)
    except OSError:  # ESTALE: moved or removed
        return None
    return now
