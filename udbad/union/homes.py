"""Homes of pseudo-links: which there are, and which names lead to them (semantics 10.3).

When a file with several names on a lower branch is copied up, the copy gets a further link in the target branch's
`.wh..wh.plnk` directory, the home. The other names, still on the lower branch, lead to that copy: same st_ino, same
data, right link count. Which file that is the home's name says (origin.py).

A home counts where whiteouts count: on writable branches and those with +wh. Nothing is written to the latter:
a file whose home is there is copied up from it like any other, and then has a second home, of which the first is
the source.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import NamedTuple

from udbad.branch import origin, syscalls, whiteout
from udbad.branch.accept import is_foreign
from udbad.branch.branches import Branch
from udbad.branch.origin import Place
from udbad.branch.spec import shown
from udbad.errors import NO_DIRECTORY, os_error
from udbad.inodes.node import Dir, Node, Plink
from udbad.union.superblock import Superblock

log = logging.getLogger(__name__)


class Home(NamedTuple):
    """A home that a name leads to. st: of the home. links: names of the lower file, 0 when the name is one of the
    home's own."""

    plink: Plink
    st: os.stat_result
    links: int


# -- which names lead to a home ---------------------------------------------------------------------


def find(sb: Superblock, parent: Dir, name: bytes, branch: Branch, st: os.stat_result) -> Home | None:
    """The home of a name that was found on `branch`: of its own, or one that its file was copied to.

    Precondition: st.st_ino is a key of sb.plinks. None for any other file, and when in doubt.
    """
    place = Place(sb.branch_fd(parent, branch), name, st)
    index = branch.index
    home: Plink | None = None
    for plink in sb.plinks[st.st_ino]:
        if plink.identity == (st.st_dev, st.st_ino) and plink.branch.index <= index:
            home = plink
    if home is not None and look(sb, home) is None:
        home = None
    links = 0
    while True:
        above = _copied_to(sb, place, index)
        if above is None:
            return None if home is None else Home(home, place.st, links)
        links = max(links, place.st.st_nlink)
        home, place = above
        index = home.branch.index


def is_copied(sb: Superblock, place: Place, branch: Branch) -> bool:
    """Whether a home on a branch above was copied from this file, whose names lead there while they are its names."""
    return _copied_to(sb, place, branch.index) is not None


def leads(sb: Superblock, parent: Dir, name: bytes, branch: Branch, st: os.stat_result, to: Plink) -> bool:
    """Whether a name that was found on `branch` leads to this home."""
    if st.st_ino not in sb.plinks:
        return False
    home = find(sb, parent, name, branch, st)
    return home is not None and home.plink is to


def _copied_to(sb: Superblock, source: Place, index: int) -> tuple[Plink, Place] | None:
    """The topmost home above `index` that was made of this file."""
    st = source.st
    found: tuple[Plink, Place] | None = None
    for plink in tuple(sb.plinks.get(st.st_ino, ())):
        if plink.source_ino != st.st_ino or plink.branch.index >= (found[0].branch.index if found else index):
            continue
        if plink.source_dev not in (None, st.st_dev):
            continue
        home = look(sb, plink)
        said = origin.parse(plink.name)
        if home is None or said is None:
            continue
        who = st.st_dev, st.st_ino
        in_order = plink.source_dev is not None or said.number == sb.inomap.number(*who)
        in_order = in_order or (not said.life and said.number == sb.inomap.earlier_number(*who))
        if origin.is_source(said, home, source, in_order):
            if plink.source_dev is None:
                plink.source_dev = st.st_dev
                sb.table.changed(plink)
            found = plink, home
    return found


def look(sb: Superblock, plink: Plink) -> Place | None:
    """The home as it is now; forgotten when it is gone, or somebody has put another file there."""
    try:
        st = syscalls.stat_at(plink.dirfd, plink.name)
    except FileNotFoundError:
        st = None
    if st is None or (st.st_dev, st.st_ino) != plink.identity:
        forget(sb, plink)
        return None
    return Place(plink.dirfd, plink.name, st)


def own_number(sb: Superblock, st: os.stat_result) -> int:
    """The number of a file that no home was copied from, never the one a home has from an earlier life of its inode."""
    number = sb.inomap.number(st.st_dev, st.st_ino)
    who = (st.st_dev, st.st_ino)
    for plink in sb.plinks.get(st.st_ino, ()):
        if plink.identity != who and sb.inomap.number(*plink.identity) == number:
            return sb.inomap.fresh(*who)
    return number


# -- homes that come and go -------------------------------------------------------------------------


def _inos(sb: Superblock, plink: Plink) -> set[int]:
    """Of the home and its source, and of the file that its number in the mount comes from, that nobody else gets it."""
    said = origin.parse(plink.name)
    return {plink.source_ino, plink.identity[1], *([sb.inomap.branch_ino(said.number)] if said else [])}


def remember(sb: Superblock, plink: Plink) -> None:
    """Let what is found later lead to this home."""
    for ino in _inos(sb, plink):
        sb.plinks.setdefault(ino, []).append(plink)


def forget(sb: Superblock, plink: Plink) -> None:
    """The home leads nowhere any more."""
    for ino in _inos(sb, plink):
        known = sb.plinks.get(ino, [])
        if plink in known:
            known.remove(plink)
            if not known:
                del sb.plinks[ino]
    node = sb.table.find(sb.inomap.number(*plink.identity))
    if node is not None and node.plink is plink:
        node.plink = None
        node.nlink_extra = 0
        sb.table.changed(node)
        part(sb, node)


def part(sb: Superblock, node: Node) -> None:
    """Where the node's names lead has to be looked up again."""
    for parent, name in node.names():
        sb.changes.lost(node, parent, name)


def name_found(sb: Superblock, node: Node, home: Home) -> None:
    """A name leads to the node's home; counts the names there are on lower branches by what it tells of them."""
    plink = home.plink
    if home.links:
        if plink.counted:
            plink.pending += max(home.links - plink.links, 0)  # made directly since
        else:
            # Each name of the home but the one in .wh..wh.plnk took the place of one on the lower branch.
            plink.pending = max(plink.pending, home.links - (home.st.st_nlink - 1))
        plink.links = max(plink.links, home.links)
        plink.pending = max(plink.pending, 1)
        sb.table.changed(plink)
    node.nlink_extra = plink.pending - 1


# -- over mounts and changes of the branches ----------------------------------------------------------


def open_directory(branch: Branch) -> int:
    """A descriptor of a branch's .wh..wh.plnk. Raises OSError: EPERM when somebody else may have written what is there,
    and so would say what names anywhere on lower branches show."""
    fd = syscalls.open_dir_at(branch.root_fd, whiteout.PLINK_DIR)
    if is_foreign(os.fstat(branch.root_fd), os.fstat(fd)):
        os.close(fd)
        raise os_error(errno.EPERM)
    return fd


def load(sb: Superblock) -> None:
    """Take up the pseudo-links of earlier mounts, on branches that were not asked yet.

    How many names they have on lower branches is not known then; such a home is never removed here. What is no name
    of a home is left alone.
    """
    for branch in sb.branches.branches:
        if branch.id in sb.plink_fds or not branch.whable or branch.offline:
            continue
        try:
            dirfd = open_directory(branch)
        except NO_DIRECTORY:
            continue
        except PermissionError:
            log.warning(
                "branch %s: others may have written what is in %s; its pseudo-links are passed over",
                shown(branch.path), os.fsdecode(whiteout.PLINK_DIR),
            )  # fmt: skip
            continue
        sb.plink_fds[branch.id] = dirfd
        fd = syscalls.open_listing(dirfd)
        try:
            names = [os.fsencode(text) for text in os.listdir(fd)]
        finally:
            os.close(fd)
        for name in names:
            _load(sb, branch, dirfd, name)


def _load(sb: Superblock, branch: Branch, dirfd: int, name: bytes) -> None:
    said = origin.parse(name)
    if said is None:
        return
    try:
        st = syscalls.stat_at(dirfd, name)
    except FileNotFoundError:
        return  # somebody has just removed it
    computed = sb.inomap.branch_ino(said.number)
    if computed > 1 and (said.life or computed == said.ino):  # else one of aufs, or of our table
        sb.inomap.alias(st.st_dev, st.st_ino, said.number)
    remember(sb, Plink(branch, dirfd, name, (st.st_dev, st.st_ino), None, said.ino, 1, counted=False))


def keep(sb: Superblock) -> None:
    """The branches of the mount are others now: homes go and come with them. Names have to be looked up again."""
    by_id = {branch.id: branch for branch in sb.branches.branches if branch.whable}
    for plink in {id(plink): plink for plinks in sb.plinks.values() for plink in plinks}.values():
        branch = by_id.get(plink.branch.id)
        if branch is None:
            forget(sb, plink)
        else:
            plink.branch = branch
    for branch_id in [branch_id for branch_id in sb.plink_fds if branch_id not in by_id]:
        os.close(sb.plink_fds.pop(branch_id))
    load(sb)


def close(sb: Superblock) -> None:
    """Close the plink directories at the end of the mount."""
    for fd in sb.plink_fds.values():
        os.close(fd)
    sb.plink_fds.clear()
    sb.plinks.clear()
