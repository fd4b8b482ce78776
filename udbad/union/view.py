"""The merged view of a directory: every visible name with the branches it is on (semantics 5).

A view is loaded with one scan of each branch directory and kept only while the coherence strategy
trusts it; reval scans for every listing. Own changes edit it in place, events of foreign ones put
UNKNOWN under a name, which is resolved at the next question. What makes the cost of a lookup
independent of the number of branches is that a name missing here needs no system call at all.
"""

from __future__ import annotations

import logging
import os
import stat as st_mod

from udbad.branch import listing, syscalls, whiteout
from udbad.errors import eio
from udbad.inodes.table import MAX_STACKED, Dir, Hit
from udbad.union.superblock import Superblock

log = logging.getLogger(__name__)

_S_IFDIR, _S_IFREG = st_mod.S_IFDIR, st_mod.S_IFREG
_DOT = ord(b".")

UNKNOWN = None
"""In a view: the name has to be resolved before anything is said about it."""

View = dict[bytes, Hit | None]

Kinds = dict[bytes, listing.Kind]
"""What the branch directories say of names beside them, the uppermost one of each."""


def scan(sb: Superblock, node: Dir, stacked: set[bytes] | None = None, kinds: Kinds | None = None) -> View:
    """Merge the branch directories of a node as they are now: top branch's order first, then what lower ones add.

    stacked: gets the names that have a whiteout, or are in more than one branch directory. kinds: gets what
    getdents64(2) says of each. Raises OSError when a branch directory cannot be read (EACCES, EIO, ESTALE): never less
    names than there may be.
    """
    if node.offline:
        raise eio()
    names: View = {}
    whited: set[bytes] = set()
    prefix = whiteout.PREFIX
    for layer in node.layers:
        branch = layer.branch
        index = branch.index
        here: list[bytes] = []
        fd = syscalls.open_listing(sb.layer_fd(node, layer))
        try:
            found, said = listing.read(fd, layer.dev)
        finally:
            os.close(fd)
        name: bytes
        for name, kind in zip(found, said, strict=True):
            if name[0] == _DOT and len(name) > 4 and name.startswith(prefix):
                if branch.whable and not name.startswith(whiteout.RESERVED):
                    here.append(name[4:])
                    if kind[2] != _S_IFREG:
                        names.setdefault(name[4:], UNKNOWN)  # asking for the name gives EIO
                continue
            if name in whited:
                continue
            if name not in names:
                names[name] = (index,) if kind[2] == _S_IFDIR else index
                if kinds is not None:
                    kinds[name] = kind
                continue
            if stacked is not None:
                stacked.add(name)
            upper = names[name]
            if type(upper) is tuple and kind[2] == _S_IFDIR:
                names[name] = (*upper, index)
        for name in here:
            hit = names.get(name)
            if hit is not None and (hit == index or (type(hit) is tuple and hit[-1] == index)):
                _warn_pair(sb, node, name, branch.describe())
        whited.update(here)
    if stacked is not None:
        stacked |= whited
    return names


def load_view(sb: Superblock, node: Dir, kinds: Kinds | None = None) -> View:
    """Scan and keep the view of a directory that is trusted. kinds: as for `scan`."""
    stacked: set[bytes] = set()
    view = scan(sb, node, stacked, kinds)
    node.view = view
    node.stacked = stacked if len(stacked) <= MAX_STACKED else None
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
