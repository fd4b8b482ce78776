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
import sys

from udbad.branch import syscalls, whiteout
from udbad.inodes.table import MAX_STACKED, Dir, Hit
from udbad.union.superblock import Superblock

log = logging.getLogger(__name__)

_AS_BYTES = (sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())  # os.fsencode() asks each time

_S_IFDIR = st_mod.S_IFDIR

UNKNOWN = None
"""In a view: the name has to be resolved before anything is said about it."""

View = dict[bytes, Hit | None]

Kinds = dict[bytes, tuple[int, int, int]]
"""What the branch directories say of names beside them: st_dev, inode number, S_IFMT bits; of the uppermost one."""


def scan(sb: Superblock, node: Dir, stacked: set[bytes] | None = None, kinds: Kinds | None = None) -> View:
    """Merge the branch directories of a node as they are now: top branch's order first, then what lower ones add.

    stacked: gets the names that have a whiteout, or are in more than one branch directory. kinds: gets what
    getdents64(2) says of each. Raises OSError when a branch directory cannot be read (EACCES, EIO, ESTALE).
    """
    names: View = {}
    whited: set[bytes] = set()
    prefix = whiteout.PREFIX
    for layer in node.layers:
        branch = layer.branch
        index = branch.index
        here: list[bytes] = []
        fd = syscalls.open_listing(sb.layer_fd(node, layer))
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = entry.name.encode(*_AS_BYTES)
                    if name.startswith(prefix) and len(name) > 4:
                        if branch.whable and not name.startswith(whiteout.RESERVED):
                            here.append(name[4:])
                            if not entry.is_file(follow_symlinks=False):
                                names.setdefault(name[4:], UNKNOWN)  # asking for the name gives EIO
                        continue
                    if name in whited:
                        continue
                    if name not in names:
                        is_dir = entry.is_dir(follow_symlinks=False)
                        names[name] = (index,) if is_dir else index
                        if kinds is not None:
                            kinds[name] = (layer.dev, entry.inode(), _S_IFDIR if is_dir else _kind(entry))
                        continue
                    if stacked is not None:
                        stacked.add(name)
                    upper = names[name]
                    if type(upper) is tuple and entry.is_dir(follow_symlinks=False):
                        names[name] = (*upper, index)
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


def _kind(entry: os.DirEntry[str]) -> int:
    """S_IFMT bits of what is no directory; no system call but for devices, FIFOs and sockets."""
    if entry.is_file(follow_symlinks=False):
        return st_mod.S_IFREG
    if entry.is_symlink():
        return st_mod.S_IFLNK
    try:
        return st_mod.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
    except OSError:
        return 0  # DT_UNKNOWN: whoever wants to know asks


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
