"""Directories that are below, in lower branches, under another path than their own: where a redirect leads.

The one rule: a directory on a branch may say under which path it is to be looked up in the branches below that one
(branch/redirect.py). That path is walked from the root through these branches alone, merged as the union merges what is
below a directory: whiteouts, opaque marks and redirects on the way included, each of which again only looks further
down, so no chain of them goes round; and past what is no directory, a symbolic link for instance, as each name on the
way was that of a directory on the branch that was renamed on.

A rename writes the path under which the directory is below already. That changes nothing that is visible, and it
counts before a whiteout beside the directory does; so each of the steps of a rename leaves the old state or the new
one (union/rename.py).
"""

from __future__ import annotations

import errno
import logging
import os
import stat as st_mod
from collections.abc import Callable, Iterable

from udbad.branch import redirect, syscalls, walk, whiteout
from udbad.branch.branches import Branch
from udbad.errors import ABSENT
from udbad.inodes.node import Dir, Layer
from udbad.union.superblock import Superblock

log = logging.getLogger(__name__)

MAX_STEPS = 10_000
"""Directories that may be looked at for one redirect. Ten that lead through one another, with ten names each, need
more; what udbad and overlayfs write needs as many as the path has names, times the branches that have renamed it."""

_FORGIVEN = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})

Visit = Callable[[Branch, int, bytes], None]
"""Told of each name that was looked for on the way: branch, descriptor of the branch directory, name."""


def path_below(node: Dir, index: int) -> bytes:
    """The path from the root under which the branches below this one have, or would have, a directory that is on it."""
    names: list[bytes] = []
    current = node
    while current.parent is not None:
        layer = current.layer(index)
        if layer is not None and layer.below is not None:
            return b"/".join([layer.below, *reversed(names)])
        names.append(current.name)
        current = current.parent
    return b"/" + b"/".join(reversed(names))


def path_of(sb: Superblock, parent: Dir, layer: Layer) -> bytes | None:
    """Where a branch directory, of an entry of `parent`, says that it is below; None when it says nothing of it. A
    value that no redirect can have is one that leads nowhere: the empty path."""
    said = _read(sb, layer)
    if said is None or said.startswith(b"/") or not said:
        layer.below = said
        return said
    above = path_below(parent, layer.branch.index)
    layer.below = (b"" if above == b"/" else above) + b"/" + said
    return layer.below


def _read(sb: Superblock, layer: Layer) -> bytes | None:
    try:
        return redirect.read(layer.fd, sb.redirect_key)  # _Walk and lookup have it open
    except redirect.Unusable as error:
        _warn(sb, layer, f"redirect {error.args[0][:100]!r} cannot be a path")
        return b""


def _warn(sb: Superblock, layer: Layer, what: str) -> None:
    """Say it once, and count it."""
    sb.bad_redirects += 1
    key = (layer.ino, b"redirect")
    if key not in sb.warned and len(sb.warned) < 10000:
        sb.warned.add(key)
        log.warning(
            "a directory of branch %s (inode %d): %s; what it has on lower branches is not shown",
            layer.branch.describe(), layer.ino, what,
        )  # fmt: skip


class _TooFar(Exception):
    pass


class _Walk:
    """One walk along a path, and along those that it leads to."""

    def __init__(self, sb: Superblock, visit: Visit | None) -> None:
        self.sb = sb
        self.visit = visit
        self.left = MAX_STEPS

    def to(self, index: int, path: bytes) -> list[Layer]:
        """What is at a path in the branches below this one, top first; `below` of each is set, descriptors are the
        caller's."""
        sb = self.sb
        here = [layer for layer in sb.root.layers if layer.branch.index > index]
        at, owned = b"", False
        for name in path[1:].split(b"/"):
            try:
                there = self._step(here, name, at) if here else []
            finally:
                if owned:
                    _close(here)
            here, owned = there, True
            at = at + b"/" + name
        return here

    def _step(self, here: list[Layer], name: bytes, at: bytes) -> list[Layer]:
        """The entry `name` of a directory with the layers `here`, which is at the path `at`."""
        sb = self.sb
        found: list[Layer] = []
        try:
            for above in here:
                branch = above.branch
                self.left -= 1
                if self.left < 0:
                    raise _TooFar
                if self.visit is not None:
                    self.visit(branch, above.fd, name)
                path = (at if above.below is None else above.below) + b"/" + name
                try:
                    mode = syscalls.stat_at(above.fd, name)
                except OSError as error:
                    if error.errno not in ABSENT:
                        raise
                    if branch.whable and whiteout.present(above.fd, name):
                        break
                    continue
                if st_mod.S_ISDIR(mode.st_mode):
                    try:
                        fd = syscalls.open_dir_at(above.fd, name)
                    except OSError as error:
                        if error.errno not in _FORGIVEN:
                            raise
                        continue  # gone by now
                    st = os.fstat(fd)
                    layer = Layer(branch, st.st_dev, st.st_ino, st.st_nlink, fd)
                    layer.below = path
                    found.append(layer)
                    if branch.whable and whiteout.opaque(fd, branch.overlay):
                        break
                    said = _read(sb, layer) if branch.id in sb.redirecting else None
                    if said is not None:
                        if said and not said.startswith(b"/"):
                            said = path[: path.rindex(b"/") + 1] + said
                        layer.below = said
                        if said:
                            found += self.to(branch.index, said)
                        break
                elif branch.overlay and whiteout.is_device(mode):
                    break
                if branch.whable and whiteout.present(above.fd, name):
                    break
        except BaseException:
            _close(found)
            raise
        return found


def _close(layers: Iterable[Layer]) -> None:
    for layer in layers:
        os.close(layer.fd)


def follow(sb: Superblock, layer: Layer, path: bytes, held: dict[int, Layer], opened: list[int]) -> list[Layer]:
    """The layers that a directory has below this one of its layers, by a path from `path_of`.

    held: layers of the directory as they were, by branch index, which are returned where they are the same. opened:
    gets the descriptors that are new.
    """
    if not path:
        return []
    try:
        found = _Walk(sb, None).to(layer.branch.index, path)
    except _TooFar:
        _warn(sb, layer, f"redirect {path[:100]!r} leads through too many others")
        return []
    layers = []
    for one in found:
        same = held.get(one.branch.index)
        if same is not None and same.fd >= 0 and same.identity == one.identity:
            os.close(one.fd)
            same.nlink, same.below = one.nlink, one.below
            layers.append(same)
        else:
            opened.append(one.fd)
            layers.append(one)
    return layers


def visit_ways(sb: Superblock, node: Dir, visit: Visit) -> None:
    """Tell of every name by which a directory that was moved is found in lower branches."""
    first = source(node)
    if first is not None and first.below:
        try:
            _close(_Walk(sb, visit).to(first.branch.index, first.below))
        except _TooFar:
            pass


def source(node: Dir) -> Layer | None:
    """The layer that says where a directory that was moved is below."""
    if not node.moved:
        return None
    return next((layer for layer in node.layers if layer.below is not None), None)


def followed(sb: Superblock, index: int, path: bytes) -> list[Layer]:
    """What is under a path in the branches below this one (-1: in all of them), for who compares or explains
    branches; the descriptors are the caller's."""
    try:
        return _Walk(sb, None).to(index, path)
    except _TooFar:
        return []


def any_in(branch: Branch, attribute: bytes) -> bytes | None:
    """The path of some directory of a branch that has a redirect; None without one. A walk through all of it: any
    thread."""
    for path, fd, _ in walk.walk(branch.root_fd, lambda path, error: None):
        try:
            if path and redirect.read(fd, attribute) is not None:
                return path
        except redirect.Unusable:
            return path
    return None


def is_as_known(sb: Superblock, node: Dir, layer: Layer) -> bool:
    """Whether a layer of a directory says what it said when its layers were found."""
    if layer.branch.id not in sb.redirecting:
        return True
    first = source(node)
    if first is not None and layer.branch.index > first.branch.index:
        return True  # it is on the way there, of which `visit_ways` tells
    sb.layer_fd(node, layer)
    said = _read(sb, layer)
    if said is None or first is not layer or layer.below is None:
        return said is None and first is not layer
    return layer.below == said or (b"/" not in said and layer.below.endswith(b"/" + said))


# -- what a rename writes --------------------------------------------------------------------------


def may_write(sb: Superblock, branch: Branch) -> bool:
    """Whether a directory that is renamed on this branch may leave what it has below where that is. Not while branches
    are merged, or files carried down, which goes by names."""
    if sb.in_doubt:
        return False
    if sb.options.dirren == "auto":
        return not any(one.writable for one in sb.branches.branches[branch.index + 1 :])
    return sb.options.dirren == "on"


def write(sb: Superblock, node: Dir, branch: Branch) -> bool:
    """Have a directory keep what it has below `branch`, under whatever name; False when it has said so before.

    Nothing visible changes. Raises EXDEV where that cannot be written.
    """
    layer = node.layer(branch.index)
    assert layer is not None
    fd = sb.layer_fd(node, layer)
    if branch.id in sb.redirecting and _read(sb, layer) is not None:
        return False
    path = path_below(node, branch.index)
    sb.redirecting.add(branch.id)
    redirect.write(None if branch.overlay else branch.root_fd, fd, sb.redirect_key, path)
    layer.below = path
    node.moved = True
    return True


def leads_on(sb: Superblock, node: Dir, branch: Branch) -> bool:
    """Whether a directory says already, on this branch, where it is below."""
    layer = node.layer(branch.index)
    return layer is not None and layer is source(node)


def take_back(sb: Superblock, node: Dir, branch: Branch) -> None:
    """The rename did not happen."""
    redirect.remove(sb.branch_fd(node, branch), sb.redirect_key)
    layer = node.layer(branch.index)
    assert layer is not None
    layer.below = None  # that it counts as moved does no harm until it is looked up again
