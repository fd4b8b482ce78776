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
from array import array

from udbad.branch import listing, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.errors import eio
from udbad.inodes.node import MAX_STACKED, Dir, Hit
from udbad.union.superblock import Superblock

log = logging.getLogger(__name__)

_DIRECTORY, _REGULAR = st_mod.S_IFDIR >> 12, st_mod.S_IFREG >> 12
_DOT = ord(b".")

UNKNOWN = None
"""In a view: the name has to be resolved before anything is said about it."""

View = dict[bytes, Hit | None]
Names = set[bytes]
Listed = list[bytes]

Part = tuple[int, int, "array[int]", bytearray]
"""Of one branch directory: its st_dev, how many names came from it, and of these inode numbers and types."""


class Said:
    """What the branch directories say beside names, the uppermost one of each; in the order of a list of names."""

    __slots__ = ("numbers", "types")

    def __init__(self, count: int) -> None:
        """count: of names, of which nothing is said yet."""
        self.numbers = array("Q", bytes(8 * count))
        """The mount's inode numbers."""
        self.types = bytearray(count)
        """As those of listing.read."""


def scan(sb: Superblock, node: Dir, stacked: set[bytes] | None = None, parts: list[Part] | None = None) -> View:
    """Merge the branch directories of a node as they are now: top branch's order first, then what lower ones add.

    stacked: gets the names that have a whiteout, or are in more than one branch directory. parts: gets what `said_of`
    wants. Raises OSError when a branch directory cannot be read (EACCES, EIO, ESTALE): never less names than there may
    be.
    """
    if node.offline:
        raise eio()
    names: View = {}
    whited: set[bytes] = set()
    for layer in node.layers:
        branch = layer.branch
        index = branch.index
        here: list[bytes] = []
        fd = syscalls.open_listing(sb.layer_fd(node, layer))
        try:
            found, numbers, types = listing.read(fd)
            if branch.overlay:
                whiteout.read_as_aufs(fd, found, types)
        finally:
            os.close(fd)
        kept = _merge(names, whited, stacked, here, branch, found, numbers, types)
        for name in here:
            hit = names.get(name)
            if hit is not None and (hit == index or (type(hit) is tuple and hit[-1] == index)):
                _warn_pair(sb, node, name, branch.describe())
        whited.update(here)
        if parts is not None:
            parts.append((layer.dev, kept, numbers, types))
    if stacked is not None:
        stacked |= whited
    return names


def _merge(
    names: View, whited: Names, stacked: Names | None, here: Listed, branch: Branch,
    found: Listed, numbers: array[int], types: bytearray,
) -> int:  # fmt: skip
    """Add what one branch directory has, as listing.read tells it; `here` gets the names that it has a whiteout of.

    Returns how many names are new; what is said of them is at the beginning of `numbers` and `types` then.
    """
    index, whable = branch.index, branch.whable
    only = (index,)
    prefix = whiteout.PREFIX
    said, kinds, hides = numbers, types, bool(whited)  # of C where compiled: as objects they are half of the loop
    kept = 0
    for at in range(len(found)):
        name = found[at]
        kind = kinds[at]
        if name[0] == _DOT and len(name) > 4 and name.startswith(prefix):
            if whable and not name.startswith(whiteout.RESERVED):
                here.append(name[4:])
                if kind != _REGULAR and name[4:] not in names:
                    names[name[4:]] = UNKNOWN  # asking for the name gives EIO
                    kinds[kept] = 0
                    kept += 1
            continue
        if hides and name in whited:
            continue
        before = len(names)
        upper = names.setdefault(name, only if kind == _DIRECTORY else index)
        if len(names) > before:
            if kept != at:
                said[kept], kinds[kept] = said[at], kind
            kept += 1
            continue
        if stacked is not None:
            stacked.add(name)
        if type(upper) is tuple and kind == _DIRECTORY:
            names[name] = (*upper, index)
    return kept


def said_of(sb: Superblock, parts: list[Part]) -> Said:
    """What the branch directories said of the names of that scan, in their order."""
    inomap = sb.inomap
    said = Said(sum([kept for _, kept, _, _ in parts]))
    all_numbers, all_types = said.numbers, said.types
    at = 0
    for dev, kept, numbers, types in parts:
        base, limit, exceptions = inomap.many(dev, kept)
        lowest, highest = (min(exceptions), max(exceptions)) if exceptions else (1, 0)  # most are not even near them
        for each in range(kept):
            kind = types[each]
            if kind:
                own = numbers[each]
                if 1 < own < limit and not (lowest <= own <= highest and own in exceptions):
                    all_numbers[at] = base + own
                else:
                    all_numbers[at] = inomap.number(dev, own)
                all_types[at] = kind
            at += 1
    return said


def load_view(sb: Superblock, node: Dir, parts: list[Part] | None = None) -> View:
    """Scan and keep the view of a directory that is trusted. parts: as for `scan`."""
    stacked: set[bytes] = set()
    view = scan(sb, node, stacked, parts)
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
