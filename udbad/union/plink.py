"""Pseudo-links: hard links that span branches (spec section 10.3).

When a file with several names on a lower branch is copied up, the copy gets a further link in the
target branch's `.wh..wh.plnk` directory, named `<inode of the mount>.<inode on the lower branch>`. The
other names, still on the lower branch, lead to that copy: same st_ino, same data, right link count.
"""

from __future__ import annotations

import errno
import logging
import os

from udbad.branch import syscalls
from udbad.branch.branches import Branch
from udbad.inodes.table import Node, Plink
from udbad.union import whiteout
from udbad.union.tree import Tree

log = logging.getLogger(__name__)


def _directory(branch: Branch) -> int:
    """Open the branch's plink directory, making it if it is missing."""
    try:
        syscalls.mkdir_at(branch.root_fd, whiteout.PLINK_DIR, 0o700)
    except FileExistsError:
        pass
    return syscalls.open_dir_at(branch.root_fd, whiteout.PLINK_DIR)


def directory(tree: Tree, branch: Branch) -> int:
    """Descriptor of the branch's plink directory; it stays open while the mount lasts."""
    fd = tree.plink_fds.get(branch.id)
    if fd is None:
        fd = tree.plink_fds[branch.id] = _directory(branch)
    return fd


def home_name(node: Node, lower_ino: int) -> bytes:
    """Name of a home in .wh..wh.plnk (spec section 1)."""
    return b"%d.%d" % (node.id, lower_ino)


def adopt_home(tree: Tree, node: Node, branch: Branch, name: bytes, pending: int) -> None:
    """The home `name` exists: let the node, and every name found later, lead to it."""
    node.plink = Plink(branch, directory(tree, branch), name, pending)
    node.nlink_extra = pending - 1
    tree.plinks[node.id] = node.plink


def make(tree: Tree, node: Node, branch: Branch, dirfd: int, name: bytes, lower_ino: int, pending: int) -> None:
    """Remember the copied-up file (dirfd, name) as the home of `node`, whose other names are `pending` many.

    A branch that cannot hold the link keeps the copy as a plain file: the other names then go on
    showing the lower data, which one warning says.
    """
    try:
        plnk_fd = directory(tree, branch)
        link_name = home_name(node, lower_ino)
        try:
            syscalls.link_at(dirfd, name, plnk_fd, link_name)
        except FileExistsError:
            # Left by an earlier mount for a file that is gone by now.
            syscalls.unlink_at(plnk_fd, link_name)
            syscalls.link_at(dirfd, name, plnk_fd, link_name)
    except OSError as error:
        if error.errno not in (errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV):
            raise
        log.warning("no pseudo-link for %r in %s: %s", name, branch.describe(), error.strerror)
        return
    adopt_home(tree, node, branch, link_name, pending)


def name_arrived(node: Node) -> None:
    """A name that was on a lower branch only has been linked to the home."""
    home = node.plink
    if home is not None:
        home.pending = max(home.pending - 1, 0)
        node.nlink_extra = home.pending - 1


def name_removed(tree: Tree, node: Node, removed: os.stat_result) -> bool:
    """A name was removed, of the object with status `removed`; True when it was the last and the home is gone, too."""
    home = node.plink
    if home is None:
        return False
    try:
        st = os.stat(home.name, dir_fd=home.dirfd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if (removed.st_dev, removed.st_ino) != (st.st_dev, st.st_ino):
        name_arrived(node)  # one of those that were not linked to the home
    if st.st_nlink > 1 or home.pending > 0 or not home.counted:
        return False
    syscalls.unlink_at(home.dirfd, home.name)
    tree.plinks.pop(node.id, None)
    node.plink = None
    node.nlink_extra = 0
    return True


def load(tree: Tree) -> None:
    """Take up the pseudo-links of earlier mounts.

    How many names they have on lower branches is not known then; such a home is never removed here,
    `udbad fsck` reports the ones without a name. The number in the name is the mount's inode number; it
    means the same file as long as the branches have their file systems in the same order. One that does
    not fit is left for `udbad fsck`.
    """
    for branch in tree.branches.branches:
        if not branch.writable:
            continue
        if not syscalls.exists_at(branch.root_fd, whiteout.PLINK_DIR):
            continue
        dirfd = directory(tree, branch)
        fd = syscalls.open_listing(dirfd)
        try:
            names = [os.fsencode(text) for text in os.listdir(fd)]
        finally:
            os.close(fd)
        for name in names:
            number, _, lower = name.partition(b".")
            if not (number.isdigit() and lower.isdigit()):
                continue
            st = syscalls.stat_at(dirfd, name)
            tree.inomap.alias(st.st_dev, st.st_ino, int(number))
            tree.plinks[int(number)] = Plink(branch, dirfd, name, 1, counted=False)


def close(tree: Tree) -> None:
    """Close the plink directories at the end of the mount."""
    for fd in tree.plink_fds.values():
        os.close(fd)
    tree.plink_fds.clear()
    tree.plinks.clear()
