"""Making pseudo-links, and counting the names of their files (semantics 10.3); which names lead there: homes.py."""

from __future__ import annotations

import errno
import logging
import os

from udbad.branch import origin, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.branch.origin import Place
from udbad.inodes.node import Node, Plink
from udbad.union import homes
from udbad.union.superblock import Superblock

log = logging.getLogger(__name__)


def directory(sb: Superblock, branch: Branch) -> int:
    """Descriptor of a writable branch's plink directory, made if it is missing; it stays open while the mount lasts."""
    fd = sb.plink_fds.get(branch.id)
    if fd is None:
        try:
            syscalls.mkdir_at(branch.root_fd, whiteout.PLINK_DIR, 0o700)
        except FileExistsError:
            pass
        fd = sb.plink_fds[branch.id] = homes.open_directory(branch)
    return fd


def home_name(node: Node, source: Place) -> bytes:
    """Name of a home in .wh..wh.plnk."""
    return origin.of(source, node.id).name()


def adopt_home(sb: Superblock, node: Node, branch: Branch, name: bytes, source: os.stat_result, pending: int) -> None:
    """The home `name` exists, where `node` is by now: let every name found later lead to it."""
    plink = Plink(
        branch, directory(sb, branch), name, node.identity, source.st_dev, source.st_ino,
        max(pending, 0), source.st_nlink,
    )  # fmt: skip
    homes.remember(sb, plink)
    node.plink = plink
    node.nlink_extra = plink.pending - 1
    sb.table.changed(plink)
    sb.table.changed(node)


def make(sb: Superblock, node: Node, branch: Branch, fd: int, name: bytes, source: Place, pending: int) -> None:
    """Remember the copied-up file behind `fd` as the home of `node`, whose other names are `pending` many.

    Not by `name`, which was just published: somebody may have put a file of his own there, for all the other names to
    show. source: what was copied. A branch that cannot hold the link keeps the copy as a plain file: the other names
    then go on showing the lower data, which one warning says.
    """
    link_name = home_name(node, source)
    try:
        syscalls.link_fd(fd, directory(sb, branch), link_name)
    except OSError as error:
        # EEXIST: a home of this very file, put there directly. It may hold the only copy of something. Or by a process
        # that was killed then. ENOENT: somebody has removed the copy's name already.
        if error.errno == errno.EEXIST and _is_home_already(sb, node, branch, link_name):
            adopt_home(sb, node, branch, link_name, source.st, pending)
            return
        if error.errno not in (
            errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EEXIST, errno.ENOENT,
        ):  # fmt: skip
            raise
        log.warning("no pseudo-link for %r in %s: %s", name, branch.describe(), error.strerror)
        return
    adopt_home(sb, node, branch, link_name, source.st, pending)


def _is_home_already(sb: Superblock, node: Node, branch: Branch, name: bytes) -> bool:
    """Whether a home is the node's own copy; then it is not remembered as one of an earlier mount any more."""
    st = syscalls.stat_at(directory(sb, branch), name)
    if (st.st_dev, st.st_ino) != node.identity:
        return False
    for plink in [plink for plink in sb.plinks.get(node.ino, ()) if plink.identity == node.identity]:
        homes.forget(sb, plink)
    return True


def name_arrived(sb: Superblock, node: Node) -> None:
    """A name that was on a lower branch only has been linked to the home."""
    home = node.plink
    if home is not None:
        home.pending = max(home.pending - 1, 0)
        node.nlink_extra = home.pending - 1
        sb.table.changed(home)
        sb.table.changed(node)


def name_removed(sb: Superblock, node: Node, removed: os.stat_result) -> bool:
    """A name was removed, of the object with status `removed`; True when it was the last and the home is gone, too."""
    home = node.plink
    if home is None:
        return False
    place = homes.look(sb, home)
    if place is None:
        return False
    if (removed.st_dev, removed.st_ino) != home.identity:
        name_arrived(sb, node)  # one of those that were not linked to the home
    if place.st.st_nlink > 1 or home.pending > 0 or not home.counted or not home.branch.writable:
        return False
    syscalls.unlink_at(home.dirfd, home.name)
    homes.forget(sb, home)
    return True
