"""What is left of a copy-up where a process was killed that had given the copy its name (edge/once.py)."""

from __future__ import annotations

import os

from udbad.branch import syscalls
from udbad.branch.branches import Branch
from udbad.branch.origin import Place
from udbad.errors import GONE
from udbad.inodes.inomap import Identity
from udbad.inodes.node import Dir, Node
from udbad.union import copyup, homes, lookup, plink, resolve
from udbad.union.resolve import FOUND
from udbad.union.superblock import Superblock, is_object


def settle(
    sb: Superblock, node: Node, parent: Dir | None, name: bytes, branch: Branch, made: Identity, as_link: bool,
    names: int, links: int,
) -> bool:  # fmt: skip
    """Go on where a process was killed that had given a copy its name, as it may not have come to moving the node.

    parent, name: what the copy is called on `branch`; None: in the directory of pseudo-links, b"": nothing. made: who
    the copy is. as_link: the name is a further one of the node. names: how many are left on lower branches; links: of
    a home that was there before, then; else 0. False where the copy has no such name, and no open file was moved to it,
    so that nothing has happened; or the node is known to be there.
    """
    if node.identity == made:
        return parent is not None and _counted(sb, node, parent, name, names, links)
    settled = parent is not None and _named(sb, node, parent, name, branch, made, as_link)
    settled = settled or _loaded(sb, node, branch, made, names, names + (parent is not None and not as_link))
    return settled or _opened(sb, node, branch, made)


def _counted(sb: Superblock, node: Node, parent: Dir, name: bytes, names: int, links: int) -> bool:
    """The home has a further link, in the place of a lower name, which may have gone on since: it is counted if it was
    not."""
    home = node.plink
    place = None if home is None or not links or home.pending != names else homes.look(sb, home)
    if home is None or place is None or place.st.st_nlink != links + 1:
        return False
    try:
        lookup.ask_again(sb, parent)
        found = resolve.resolve(sb, parent, name)
    except FileNotFoundError:
        return False
    if found.answer is FOUND:
        resolve.discard(sb, parent, name, found)
        if (found.st.st_dev, found.st.st_ino) != home.identity:
            return False  # only a temporary name of it was made
    plink.name_arrived(sb, node)
    sb.changes.copied_up(node, parent, name)
    return True


def _loaded(sb: Superblock, node: Node, branch: Branch, made: Identity, names: int, before: int) -> bool:
    """The copy has no other name (any more) but its home, which was found as those of earlier mounts are. before: how
    many names there were on lower branches."""
    home = next((plink for plink in sb.plinks.get(made[1], ()) if plink.identity == made), None)
    if home is None:
        return False
    dev, ino = node.identity
    source = os.stat_result((0, ino, dev, before - node.nlink_extra, 0, 0, 0, 0, 0, 0))
    homes.forget(sb, home)
    fd = syscalls.pin_at(home.dirfd, home.name)
    try:
        sb.move_data(node, branch, os.fstat(fd), fd)
    finally:
        os.close(fd)
    sb.inomap.alias(*made, node.id)
    plink.adopt_home(sb, node, branch, home.name, source, names)
    return True


def _opened(sb: Superblock, node: Node, branch: Branch, made: Identity) -> bool:
    """The copy has no name (any more): only an open file leads there, if one does."""
    for handle in node.handles or ():
        st = os.fstat(handle.fd)
        if (st.st_dev, st.st_ino) == made:
            copyup.arrived_nameless(sb, node, branch, os.dup(handle.fd), st)
            return True
    return False


def _named(sb: Superblock, node: Node, parent: Dir, name: bytes, branch: Branch, made: Identity, as_link: bool) -> bool:
    try:
        lookup.ask_again(sb, parent)
        dirfd = sb.branch_fd(parent, branch)
        src_dirfd, src_name = sb.locate(node)
        source = syscalls.stat_at(src_dirfd, src_name)
        fd = syscalls.pin_at(dirfd, name)
    except OSError as error:
        if error.errno not in GONE:
            raise
        return False
    try:
        st = os.fstat(fd)
        if (st.st_dev, st.st_ino) != made or not is_object(node, source):
            return False
        copyup.arrived(sb, node, parent, name, branch, fd, Place(src_dirfd, src_name, source), st, as_link)
    finally:
        os.close(fd)
    return True
