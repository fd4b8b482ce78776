"""The merged view of a directory: every visible name with the branches it is on (semantics 5).

A view is loaded with one scan of each branch directory and kept only while the coherence strategy
trusts it; reval scans for every listing. Own changes edit it in place, events of foreign ones put
UNKNOWN under a name, which is resolved at the next question. What makes the cost of a lookup
independent of the number of branches is that a name missing here needs no system call at all.

What a whiteout hides is said here; the merge of single names is `Names.add` (inodes/names.py).
"""

from __future__ import annotations

import logging
import os
import stat as st_mod

from udbad.branch import syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.errors import eio
from udbad.inodes.names import UNKNOWN, Names, Odd
from udbad.inodes.node import MAX_STACKED, Dir
from udbad.union.superblock import Superblock

log = logging.getLogger(__name__)

_REGULAR = st_mod.S_IFREG >> 12


def scan(sb: Superblock, node: Dir, stacked: set[bytes] | None = None) -> Names:
    """Merge the branch directories of a node as they are now: top branch's order first, then what lower ones add.

    stacked: gets the names that have a whiteout, or are in more than one branch directory. Raises OSError when a branch
    directory cannot be read (EACCES, EIO, ESTALE): never less names than there may be.
    """
    if node.offline:
        raise eio()
    names = Names()
    whited: set[bytes] = set()
    for layer in node.layers:
        branch = layer.branch
        index = branch.index
        fd = syscalls.open_listing(sb.layer_fd(node, layer))
        try:
            odd = names.read(fd, index, whited, stacked)
            here = _whiteouts(names, branch, fd, odd, whited, stacked) if odd else ()
        finally:
            os.close(fd)
        for name in here:
            hit = names.get(name)
            if hit is not None and (hit == index or (type(hit) is tuple and hit[-1] == index)):
                _warn_pair(sb, node, name, branch.describe())
        whited.update(here)
    if stacked is not None:
        stacked |= whited
    return names


def _whiteouts(
    names: Names, branch: Branch, fd: int, odd: Odd, whited: set[bytes], stacked: set[bytes] | None
) -> list[bytes]:
    """Of which names there are whiteouts in a branch directory, open as `fd`, that has these odd ones; what among them
    is an object after all is added to `names`."""
    here = []
    for name, number, kind in odd:
        if branch.overlay:
            name, kind = whiteout.as_aufs(fd, name, kind)
        if not name.startswith(whiteout.PREFIX) or name == whiteout.PREFIX:
            names.add(name, branch.index, number, kind, whited, stacked)
        elif branch.whable and not name.startswith(whiteout.RESERVED):
            hidden = name[len(whiteout.PREFIX) :]
            here.append(hidden)
            if kind != _REGULAR and hidden not in names:
                names[hidden] = UNKNOWN  # asking for the name gives EIO
    return here


def load_view(sb: Superblock, node: Dir) -> Names:
    """Scan and keep the view of a directory that is trusted."""
    stacked: set[bytes] = set()
    view = scan(sb, node, stacked)
    node.view = view
    if len(stacked) > MAX_STACKED:
        node.stacked = None
    else:
        node.stacked = dict.fromkeys(stacked) if stacked else {}  # fromkeys() makes room for eight
    node.probes = 0
    return view


def _warn_pair(sb: Superblock, node: Dir, name: bytes, branch: str) -> None:
    key = (node.id, name)
    if key not in sb.warned and len(sb.warned) < 10000:
        sb.warned.add(key)
        log.warning("%r and its whiteout are both in branch %s; the whiteout hides lower branches only", name, branch)


def whiteout_names(sb: Superblock, node: Dir) -> list[bytes]:
    """Names of the whiteouts in all branches of a directory, for the shwh option."""
    found: dict[bytes, None] = {}
    for layer in node.layers:
        fd = syscalls.open_listing(sb.layer_fd(node, layer))
        try:
            for text in os.listdir(fd):
                name = os.fsencode(text)
                if name.startswith(whiteout.PREFIX) and not name.startswith(whiteout.RESERVED):
                    found[name] = None
        finally:
            os.close(fd)
    return list(found)
