"""Names of the union to nodes (semantics 4).

`intern` turns what resolve.py has found on the branches into a node. `refresh` brings a directory whose layers cannot
be trusted up to date, from the root down, so that even a process that sits in a directory sees a branch directory
that appeared above it. `lookup` puts them together and answers from the directory's view where the
coherence strategy allows that.

Whoever resolves on behalf of a request goes by `intern`, `adopt` and `refresh`, which tell the strategy. The strategy
itself, for an event, uses only what tells it nothing (`resolve`, `set_layers`, `remember`, ...): so the calls go
from the union to the strategy or from the strategy to the union, and never round (tests/test_layering.py).
"""

from __future__ import annotations

import os
import stat as st_mod

from udbad.branch import state, syscalls
from udbad.branch.branches import Branch
from udbad.branch.syscalls import find_at, fstat
from udbad.errors import eio, enoent
from udbad.inodes.node import LOAD_AT_LEAST, Dir, Node
from udbad.union import homes, times
from udbad.union.resolve import FOUND, WHITED, Found, Missing, discard, found_again, resolve, same_directory
from udbad.union.superblock import LAST_DEPTH, Superblock, lower_links
from udbad.union.view import load_view

_S_IFDIR, _S_IFLNK, _S_IFCHR = st_mod.S_IFDIR, st_mod.S_IFLNK, st_mod.S_IFCHR
_S_IFMT = 0o170000


UNCLEAR, NOWHERE = -2, -1


def only_on(sb: Superblock, parent: Dir, name: bytes) -> int:
    """The branch that alone has a name, as an object and without any whiteout, according to the directory's view.

    NOWHERE when no branch has either; UNCLEAR when they have to be asked.
    """
    stacked = parent.stacked
    view = parent.view
    if stacked is None or view is None or name in stacked or not parent.trusted or sb.in_doubt:
        return UNCLEAR
    hit = view.get(name, NOWHERE)
    if type(hit) is int:
        return hit
    return hit[0] if type(hit) is tuple and len(hit) == 1 else UNCLEAR


def adopt(sb: Superblock, node: Dir, found: Found, floor: int) -> None:
    """Give a directory the layers that `resolve` found; the coherence strategy says what that means."""
    sb.changes.resolved(node, set_layers(sb, node, found, floor))


def set_layers(sb: Superblock, node: Dir, found: Found, floor: int) -> bool:
    """Give a directory the layers that `resolve` found; True when they, or its opaque mark, differ from before.

    Nobody is told: `adopt` has the coherence strategy judge the directory, and the strategy itself, where an event
    made it ask, does that without being called from here.
    """
    new = found.layers
    assert new is not None
    old = node.layers
    changed = False
    if old is not new and old != new:  # Layer has no __eq__: the same objects in the same order
        changed = [layer.identity for layer in old] != [layer.identity for layer in new]
        kept = set(new)
        for layer in old:
            if layer not in kept and layer.fd >= 0:
                os.close(layer.fd)
                sb.table.open_fds -= 1
        sb.table.open_fds += len(kept.difference(old))
        sb.table.note_fds(node)
    node.hot = True
    changed = changed or (old is not new and node.opaque != found.opaque)
    if changed:
        node.times = None
        node.quiet = False
        node.lacks = None
        node.version = sb.next_version()
        sb.table.changed(node)
    node.layers = new
    if node.offline != found.offline:
        node.offline = found.offline
        sb.table.changed(node)
    if changed or old is new:
        node.view = None
        node.probes = 0
    top = new[0]
    node.branch, node.dev, node.ino = top.branch, top.dev, top.ino
    node.moved = found.moved
    node.opaque = found.opaque
    limits = [limit for limit in (found.opaque, found.whited, floor) if limit is not None]
    lowest = min(limits)
    if lowest != node.floor:
        node.floor = lowest
        sb.table.changed(node)
        node.version = sb.next_version()  # the children's floors follow from it
    if len(new) > 1 or node.nlink_extra:
        node.nlink_extra = lower_links(new)
    sb.inomap.alias(top.dev, top.ino, node.id)
    return changed


def intern(sb: Superblock, parent: Dir, name: bytes, found: Found) -> tuple[Node, os.stat_result]:
    """The node for something `resolve` found, made if it is new, with the attributes to report."""
    if found.layers is not None:
        try:
            directory = _intern_dir(sb, parent, name, found)
            # Asked again after the strategy has put its watches, so that no change falls between.
            return directory, fstat(sb.layer_fd(directory, directory.layers[0]))
        except BaseException:
            made = parent.children.get(name)
            if made is not None:
                sb.table.not_sent(made)
            raise
    return intern_file(sb, parent, name, found.branch, found.st)


def intern_file(
    sb: Superblock, parent: Dir, name: bytes, branch: Branch, st: os.stat_result
) -> tuple[Node, os.stat_result]:
    """`intern` for what is no directory: found on `branch` with the attributes `st`."""
    kind = st.st_mode & _S_IFMT
    dev, ino = st.st_dev, st.st_ino
    known = parent.children.get(name)
    if (
        known is not None
        and known.ino == ino
        and known.dev == dev
        and known.branch is branch
        and known.kind == kind
        and not known.dead
        and (kind != _S_IFLNK or _leads_there(sb, parent, name, branch, known, st))
    ):
        return known, st
    table = sb.table
    number = sb.inomap.number(dev, ino)
    node = table.find(number)
    plinked = bool(sb.plinks) and ino in sb.plinks
    if known is None and node is None and not plinked:
        return table.add_file(Node(number, kind, branch, dev, ino), parent, name), st
    if plinked:
        home = homes.find(sb, parent, name, branch, st)
        if home is not None:
            return _intern_home(sb, parent, name, st, home), home.st
        number = homes.own_number(sb, st)
        node = table.find(number)
    if node is not None and (
        node.identity != (dev, ino)
        or node.kind != kind
        or node.dead
        or (kind == _S_IFLNK and not _leads_there(sb, parent, name, branch, node, st))
        or (sb.redirecting and st.st_nlink == 1 and _has_its_place(sb, node, parent, name))
    ):
        # The number belongs to an object that is still in use: this one gets a number of its own.
        number = sb.inomap.fresh(dev, ino)
        node = None
    if node is None:
        node = Node(number, kind, branch, dev, ino)
        table.add(node)
    node.branch = branch
    table.changed(node)
    sb.changes.found(node, parent, name)
    return node, st


def _leads_there(sb: Superblock, parent: Dir, name: bytes, branch: Branch, node: Node, st: os.stat_result) -> bool:
    """Whether a symbolic link leads where the kernel was told that this node does.

    It keeps that with the inode (FUSE_CACHE_SYMLINKS). No link ever leads elsewhere, but its number comes round.
    """
    told = node.seen
    if told is None or told[0] == st.st_ctime_ns:
        return True
    try:
        target = syscalls.readlink_at(sb.branch_fd(parent, branch), name)
    except OSError:
        return False
    if target != told[1]:
        return False
    node.seen = (0 if state.is_racy(branch, st) else st.st_ctime_ns, target)
    return True


def _intern_home(sb: Superblock, parent: Dir, name: bytes, st: os.stat_result, home: homes.Home) -> Node:
    """`intern_file` for a name, of an object with attributes `st`, that leads to a pseudo-link's home."""
    branch = home.plink.branch
    kind = home.st.st_mode & _S_IFMT
    dev, ino = identity = home.plink.identity
    number = sb.inomap.number(dev, ino)
    node = sb.table.find(number)
    if node is not None and (node.identity != identity or node.kind != kind or node.dead):
        if node.parent is None and not node.handles and node.kind == kind and not node.dead:
            # Its file was known before the home's branch was added, and has lost its names (reconfigure.apply).
            node.dev, node.ino = identity
            if kind != _S_IFLNK:
                node.seen = None
            node.lacks = None
        else:
            number = sb.inomap.fresh(dev, ino)
            node = None
    if node is None:
        node = Node(number, kind, branch, dev, ino)
        sb.table.add(node)
    node.plink = home.plink
    node.branch = branch
    sb.table.changed(node)
    sb.inomap.alias(st.st_dev, st.st_ino, number)
    homes.name_found(sb, node, home)
    sb.changes.found(node, parent, name)
    return node


def _intern_dir(sb: Superblock, parent: Dir, name: bytes, found: Found) -> Dir:
    layers = found.layers
    assert layers is not None
    known = parent.children.get(name)
    node: Node | None = known
    if type(known) is not Dir or known.dead or not same_directory(known, layers):
        top = layers[0]
        number = sb.inomap.number(top.dev, top.ino)
        node = sb.table.find(number)
        if node is not None and (
            type(node) is not Dir
            or node.dead
            or not same_directory(node, layers)
            or (sb.redirecting and _has_its_place(sb, node, parent, name))
        ):
            number = sb.inomap.fresh(top.dev, top.ino)
            node = None
        if node is None:
            node = Dir(number, layers)
            sb.table.add(node)
            sb.table.open_fds += len(layers)
            sb.table.note_fds(node)
    assert type(node) is Dir
    sb.changes.found(node, parent, name)
    adopt(sb, node, found, parent.floor)
    return node


def _has_its_place(sb: Superblock, node: Node, parent: Dir, name: bytes) -> bool:
    """Whether a node is still what its own name stands for, so that what another name does is another one.

    Without redirects what is in a branch directory has one place in the union, but for hard links, and where it is
    found is where it was moved to. With them it is shown a second time once nothing hides it any more at its own path.
    One directory would move from one place to the other with each lookup, which d_splice_alias() refuses amid a rename
    (ESTALE); of one file nobody could tell by which name it is written, and so where its copy belongs.
    """
    above = node.parent
    if above is None or above.dead or (above is parent and node.name == name):
        return False
    try:
        found = found_again(sb, above, node) if type(node) is Dir else resolve(sb, above, node.name)
    except OSError:
        return True  # not known; a second number does no harm
    if found is None or found.answer is not FOUND:
        return False
    discard(sb, above, node.name, found)
    return type(node) is Dir or (found.layers is None and node.identity == (found.st.st_dev, found.st.st_ino))


def refresh(sb: Superblock, node: Dir) -> None:
    """Make sure an untrusted directory's layers, and its view, are what the branches say now.

    Walks from the nearest trusted ancestor down; what its times say is unchanged is not asked again. A
    directory that was moved away directly stays usable through the descriptors we hold, as a native current
    directory does. Raises ENOENT when it is gone.
    """
    by_times = sb.changes.by_times
    if by_times:
        sb.changes.catch_up()
        if node.sure == sb.version:
            return
    version = sb.version
    chain: list[Dir] = []
    current: Dir | None = node
    while current is not None and not current.trusted and current is not sb.root:
        chain.append(current)
        current = current.parent
    root = sb.root
    if current is root and not root.trusted:  # nobody looks it up
        if not by_times:
            sb.changes.resolved(root, False)
            sb.count_links(root)
        elif not times.unchanged(sb, root):
            sb.count_links(root)
    _resolve_chain(sb, chain)
    if (
        current is root
        and root.quiet
        and sb.version == version
        and all(entry.quiet and not entry.moved for entry in chain)
    ):
        node.sure = version


def ask_again(sb: Superblock, node: Dir) -> None:
    """Resolve a directory and every one above it anew, whether they are trusted or not. Raises ENOENT when it is gone.

    Whether they are trusted stays as it is, unless the strategy judges otherwise by what is found. What the kernel
    has of them is for it to know, too.
    """
    chain: list[Dir] = []
    current: Dir | None = node
    while current is not None:
        current.forget_names()
        if current is not sb.root:
            chain.append(current)
        current = current.parent
    sb.count_links(sb.root)
    _resolve_chain(sb, chain)


def _resolve_chain(sb: Superblock, chain: list[Dir]) -> None:
    """Find the layers of directories, each in the next one of `chain`, from the last to the first."""
    by_times = sb.changes.by_times
    for entry in reversed(chain):
        parent = entry.parent
        if entry.quiet and parent is not None and entry.resolved == parent.version and not entry.dead:
            continue
        above = None if parent is None else parent.parent
        if above is not None and sb.table.over_budget():
            # A path may be deeper than there are descriptors. Who asks for a refresh holds none yet.
            sb.table.close_idle(above)
        if parent is not None and not entry.dead:
            if by_times and times.unchanged(sb, entry) and entry.resolved == parent.version:
                continue
            found = found_again(sb, parent, entry)
            if found is not None:
                adopt(sb, entry, found, parent.floor)
                # Where a redirect leads is for other directories to say than those that are asked here.
                entry.resolved = -1 if entry.moved else parent.version
                continue
        alive = [layer for layer in entry.layers if layer.fd >= 0 and fstat(layer.fd).st_nlink > 0]
        if not alive:
            raise eio() if entry.offline else enoent()
        if len(alive) != len(entry.layers):
            moved = Found(_S_IFDIR, alive[0].branch, fstat(alive[0].fd), alive)
            moved.opaque = entry.opaque
            moved.offline = entry.offline
            adopt(sb, entry, moved, entry.floor)


def lookup(sb: Superblock, parent: Dir, name: bytes) -> tuple[Node, os.stat_result] | None:
    """Name to node and attributes; None when the union has no such name (it may be remembered).

    sb.counters get the number of branches that were looked at.
    """
    counters = sb.counters
    if parent.dead:
        counters.depth_negative[0] += 1
        return None
    if not parent.trusted:
        refresh(sb, parent)
        if parent.times is None and not parent.quiet:
            return _ask(sb, parent, name)
        child = parent.children.get(name)
        if type(child) is Dir and child.resolved == parent.version and not child.dead and times.unchanged(sb, child):
            counters.depth_found[min(len(child.layers), LAST_DEPTH)] += 1
            return child, fstat(sb.layer_fd(child, child.layers[0]))
    view = parent.view
    if view is None:
        # Learning the directory costs a scan; single questions are cheaper until enough were asked.
        parent.probes += len(parent.layers)
        if parent.probes > parent.load_at and worth_loading(sb, parent):
            view = load_view(sb, parent)
    if view is not None:
        hit = view.get(name, -1)
        if hit == -1:
            counters.depth_negative[0] += 1
            return None
        if type(hit) is int:
            layer = parent.layer(hit)
            if layer is not None:
                fd = layer.fd if layer.fd >= 0 else sb.layer_fd(parent, layer)
                st = find_at(fd, name)
                if st is not None:
                    kind = st.st_mode & _S_IFMT
                    if kind != _S_IFDIR and not (kind == _S_IFCHR and layer.branch.overlay):
                        counters.depth_found[1] += 1
                        return intern_file(sb, parent, name, layer.branch, st)
    return _ask(sb, parent, name)


def _ask(sb: Superblock, parent: Dir, name: bytes) -> tuple[Node, os.stat_result] | None:
    """`lookup` by asking the branches; the view, if there is one, learns of it."""
    found = resolve(sb, parent, name)
    depth = found.examined if found.examined < LAST_DEPTH else LAST_DEPTH
    remember(parent, name, found)
    if found.answer is FOUND:
        sb.counters.depth_found[depth] += 1
        return intern(sb, parent, name, found)
    depths = sb.counters.depth_whiteout if found.answer is WHITED else sb.counters.depth_negative
    depths[depth] += 1
    sb.changes.found_gone(parent, name)
    return None


def worth_loading(sb: Superblock, parent: Dir) -> bool:
    """Whether the questions asked so far have cost more than reading the directory would.

    A block of a directory (ext4: 4 KiB, 2 to 100 names) takes as long to open, read and merge as 15 to 50 questions.
    """
    if parent.offline:
        return False  # nor can it be read
    size = 0
    for layer in parent.layers:
        size += fstat(sb.layer_fd(parent, layer)).st_size
    parent.load_at = max(size // 128, LOAD_AT_LEAST)
    return parent.probes > parent.load_at


def remember(parent: Dir, name: bytes, found: Found | Missing) -> None:
    """Put what was resolved into the directory's view, if it has one."""
    view = parent.view
    if view is None:
        return
    if found.answer is not FOUND:
        view.discard(name)
    elif found.layers is None:
        view[name] = found.branch.index
    else:
        view[name] = tuple([layer.branch.index for layer in found.layers])


def update(sb: Superblock, parent: Dir, name: bytes, found: Found | Missing) -> os.stat_result | None:
    """Put the result of `resolve` into view, table and node; returns the attributes of what the name stands for."""
    remember(parent, name, found)
    if found.answer is FOUND:
        return intern(sb, parent, name, found)[1]
    sb.changes.found_gone(parent, name)
    return None
