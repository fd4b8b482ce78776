"""Which branch objects a name of the union stands for (semantics 4).

`resolve` asks the branches, top to bottom, and is the only place that knows layer order for names;
`intern` turns what it found into a node. `refresh` brings a directory whose layers cannot be trusted
up to date, from the root down, so that even a process that sits in a directory sees a branch directory
that appeared above it. `lookup` puts them together and answers from the directory's view where the
coherence strategy allows that.

Whoever resolves on behalf of a request goes by `intern`, `adopt` and `refresh`, which tell the strategy. The strategy
itself, for an event, uses only what tells it nothing (`resolve`, `set_layers`, `remember`, ...): so the calls go
from the union to the strategy or from the strategy to the union, and never round (tests/test_layering.py).
"""

from __future__ import annotations

import os
import stat as st_mod
from enum import Enum
from typing import ClassVar, Literal

from udbad.branch import state, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.errors import ABSENT, NO_DIRECTORY, eio, enoent, estale
from udbad.inodes.table import LOAD_AT_LEAST, Dir, Layer, Node
from udbad.union import homes, redirects, times
from udbad.union.superblock import LAST_DEPTH, Superblock, lower_links
from udbad.union.view import load_view

_S_IFDIR, _S_IFLNK, _S_IFCHR = st_mod.S_IFDIR, st_mod.S_IFLNK, st_mod.S_IFCHR
_S_IFMT = 0o170000
_stat, _fstat = syscalls.stat_at, syscalls.fstat


class Answer(Enum):
    """What a search for a name came to, and so what whoever asked has to do next."""

    FOUND = "found"
    """An object is visible. It is for `intern` or `discard`, as a directory comes with descriptors."""
    NEGATIVE = "negative"
    """No layer shows the name and no whiteout ended the search. The last layer, where one hides nothing, was not
    asked for it: who makes an object there has to look."""
    WHITED = "whited"
    """A whiteout hides the name. Who makes an object on its branch has to remove it afterwards."""
    CLEAR = "clear"
    """No branch has the name, nor a whiteout: an object can be made anywhere, without looking."""


class Found:
    """A visible object: its top branch and attributes, and for a directory every merged layer."""

    __slots__ = ("branch", "examined", "kind", "layers", "moved", "offline", "opaque", "st", "whited")

    answer: ClassVar[Literal[Answer.FOUND]] = Answer.FOUND

    def __init__(
        self, kind: int, branch: Branch, st: os.stat_result, layers: list[Layer] | None, examined: int = 0
    ) -> None:
        self.kind = kind
        self.branch = branch
        self.st = st
        self.layers = layers
        self.examined = examined
        """Branches looked at."""
        self.whited: int | None = None
        """Index of the branch whose whiteout, or redirect, ended the search for lower layers by this name."""
        self.moved = False
        """As `Dir.moved`."""
        self.opaque: int | None = None
        """Index of the branch whose opaque mark did."""
        self.offline: list[Layer] | None = None
        """As `Dir.offline`."""


class Missing:
    """A name that nothing is visible of."""

    __slots__ = ("answer", "examined", "whited")

    def __init__(
        self, answer: Literal[Answer.NEGATIVE, Answer.WHITED, Answer.CLEAR], examined: int, whited: int | None = None
    ) -> None:
        self.answer = answer
        self.examined = examined
        """Branches looked at."""
        self.whited = whited
        """Index of the branch whose whiteout hides the name."""

    def excludes_whiteout(self, parent: Dir, branch: Branch) -> bool:
        """Whether the search has shown that there is no whiteout on `branch`, where an object is going to be made."""
        if self.answer is not Answer.NEGATIVE:
            return self.answer is Answer.CLEAR
        return branch.index < parent.layers[-1].branch.index and parent.layer(branch.index) is not None


CLEAR = Missing(Answer.CLEAR, 0)
_NEGATIVE = [Missing(Answer.NEGATIVE, examined) for examined in range(LAST_DEPTH + 1)]
"""By the number of branches that were looked at: most searches that find nothing need no object of their own."""
_TRIES = 16
"""How often a directory may vanish between stat and open, before the branch is said to change too fast."""


def _negative(examined: int) -> Missing:
    return _NEGATIVE[examined] if examined <= LAST_DEPTH else Missing(Answer.NEGATIVE, examined)


def resolve(sb: Superblock, parent: Dir, name: bytes, below: int = -1, tries: int = _TRIES) -> Found | Missing:
    """What `name` is in `parent` according to the branches now.

    below: look only at branches with a larger index. Raises ESTALE when somebody changes the name all the time; EIO
    when nobody has it, but a branch that does not answer may.
    Order inside a branch: the name first, then its whiteout, because a whiteout hides lower branches only.
    """
    layers = parent.layers
    last = len(layers) - 1
    examined = 0
    for pos, layer in enumerate(layers):
        branch = layer.branch
        if branch.index <= below:
            continue
        fd = layer.fd
        if fd < 0:
            if branch.offline:
                continue
            fd = sb.layer_fd(parent, layer)
        examined += 1
        try:
            st = _stat(fd, name)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            # The last layer is asked, too, where what a whiteout hides may be on a branch that does not answer.
            if branch.whable and (pos < last or parent.offline) and whiteout.present(fd, name):
                if parent.offline:
                    _check_known(parent, below, branch.index)
                return Missing(Answer.WHITED, examined, branch.index)
            continue
        kind = st.st_mode & _S_IFMT
        if kind != _S_IFDIR:
            if kind == _S_IFCHR and branch.overlay and whiteout.is_device(st):
                if parent.offline:
                    _check_known(parent, below, branch.index)
                return Missing(Answer.WHITED, examined, branch.index)
            return Found(kind, branch, st, None, examined)
        try:
            return _merge(sb, parent, name, pos, st, examined)
        except NO_DIRECTORY:
            # Somebody changed the branch between stat and open: resolve again, from what is there now.
            if not tries:
                raise estale() from None
            return resolve(sb, parent, name, below, tries - 1)
    if parent.offline:
        _check_known(parent, below, len(sb.branches))
    return _negative(examined)


def _check_known(parent: Dir, below: int, end: int) -> None:
    """Raises EIO when a branch between these two has what nobody knows in a directory."""
    if parent.offline and any(below < layer.branch.index < end for layer in parent.offline):
        raise eio()


def check_changeable(parent: Dir) -> None:
    """Raises EIO where a branch that does not answer may have names of a directory: whoever changes one would have to
    know whether it is there, and what a whiteout has to hide."""
    if parent.offline:
        raise eio()


def check_top(node: Dir, index: int) -> None:
    """Raises EIO where a branch that does not answer, and is above this one, may have a directory: what is about to be
    changed may not be what is visible when it answers again."""
    if node.offline and node.offline[0].branch.index < index:
        raise eio()


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


def opened(branch: Branch, dirfd: int, name: bytes) -> Found:
    """A directory that only this branch has, in its directory `dirfd`. Raises FileNotFoundError, NotADirectoryError."""
    fd = syscalls.open_dir_at(dirfd, name)
    st = _fstat(fd)
    return Found(_S_IFDIR, branch, st, [Layer(branch, st.st_dev, st.st_ino, st.st_nlink, fd)], 1)


def _merge(sb: Superblock, parent: Dir, name: bytes, first: int, st: os.stat_result, examined: int) -> Found:
    """Collect the layers of a directory whose topmost copy is at position `first` of the parent.

    examined: branches looked at so far. Raises FileNotFoundError, NotADirectoryError when it changed meanwhile.
    """
    known = parent.children.get(name)
    held = {layer.branch.index: layer for layer in known.layers} if type(known) is Dir else {}
    layers: list[Layer] = []
    opened: list[int] = []
    last = len(parent.layers) - 1
    top_st = st
    whited = opaque = None
    path: bytes | None = None
    try:
        for pos in range(first, last + 1):
            above = parent.layers[pos]
            branch = above.branch
            fd = above.fd if above.fd >= 0 else sb.layer_fd(parent, above)
            if pos > first:
                try:
                    st = _stat(fd, name)
                except OSError as error:
                    if error.errno not in ABSENT:
                        raise
                    if branch.whable and pos < last and whiteout.present(fd, name):
                        whited = branch.index
                        break
                    continue
            if st.st_mode & _S_IFMT == _S_IFDIR:
                layer = held.get(branch.index)
                if layer is None or layer.fd < 0 or layer.ino != st.st_ino or layer.dev != st.st_dev:
                    child = syscalls.open_dir_at(fd, name)
                    opened.append(child)
                    st = os.fstat(child)
                    layer = Layer(branch, st.st_dev, st.st_ino, st.st_nlink, child)
                else:
                    layer.nlink = st.st_nlink
                    layer.below = None
                if not layers:
                    top_st = st
                layers.append(layer)
                if branch.whable and whiteout.opaque(layer.fd, branch.overlay):
                    opaque = branch.index
                    break
                if branch.id in sb.redirecting:
                    path = redirects.path_of(sb, parent, layer)
                    if path is not None:
                        # Where this directory is below is for the redirect to say, not for its name: a whiteout beside
                        # it hides what is there of its name.
                        whited = branch.index
                        layers += redirects.follow(sb, layer, path, held, opened)
                        break
            elif branch.overlay and pos < last and whiteout.is_device(st):
                whited = branch.index
                break
            # A lower object of another type is skipped, it does not end the search (semantics 4.2).
            if branch.whable and pos < last and whiteout.present(fd, name):
                whited = branch.index
                break
    except BaseException:
        for child in opened:
            os.close(child)
        raise
    found = Found(_S_IFDIR, layers[0].branch, top_st, layers, examined + pos - first)
    found.whited = whited
    found.opaque = opaque
    if path is not None:
        found.moved = True
        _found_moved(sb, parent, known, found)
    elif parent.offline:
        found.offline = _not_seen(parent.offline, known, found)
    return found


def _found_moved(sb: Superblock, parent: Dir, known: Node | None, found: Found) -> None:
    """`Found.offline` of a directory that is below where a redirect says: any branch there may have it."""
    assert found.whited is not None
    beside = [layer for layer in parent.offline or () if layer.branch.index < found.whited]
    below = [layer for layer in sb.root.offline or () if layer.branch.index > found.whited]
    if beside or below:
        found.offline = _not_seen(beside + below, known, found, below=True)


def _not_seen(offline: list[Layer], known: Node | None, found: Found, below: bool = False) -> list[Layer] | None:
    """What a directory may have on these branches, where nobody can look. One that was seen before has there what it
    had then. below: also below what has ended the search by its name."""
    assert found.layers is not None
    limits = [limit for limit in (found.opaque, found.whited) if limit is not None and not below]
    end = min(limits, default=offline[-1].branch.index)
    if type(known) is Dir and not known.dead and same_directory(known, found.layers):
        return known.offline and [layer for layer in known.offline if layer.branch.index <= end]
    return [Layer(layer.branch, layer.dev, 0, 0, -1) for layer in offline if layer.branch.index <= end] or None


def discard(sb: Superblock, parent: Dir, name: bytes, found: Found) -> None:
    """Close what `resolve` opened for a directory that is not going to be interned."""
    if found.layers is None:
        return
    known = parent.children.get(name)
    held = set(known.layers) if type(known) is Dir else set()
    for layer in found.layers:
        if layer not in held:
            os.close(layer.fd)


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
            return directory, _fstat(sb.layer_fd(directory, directory.layers[0]))
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
    node = table.nodes.get(number)
    plinked = ino in sb.plinks
    if known is None and node is None and not plinked:
        return table.add_file(Node(number, kind, branch, dev, ino), parent, name), st
    if plinked:
        home = homes.find(sb, parent, name, branch, st)
        if home is not None:
            return _intern_home(sb, parent, name, st, home), home.st
        number = homes.own_number(sb, st)
        node = table.nodes.get(number)
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
    node = sb.table.nodes.get(number)
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
        node = sb.table.nodes.get(number)
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


def same_directory(node: Dir, layers: list[Layer]) -> bool:
    """A directory stays itself while it keeps at least one of its branch directories."""
    ids = {layer.identity for layer in node.layers}
    return any(layer.identity in ids for layer in layers)


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
        found = resolve(sb, above, node.name)
    except OSError:
        return True  # not known; a second number does no harm
    if found.answer is not Answer.FOUND:
        return False
    if found.layers is None:
        return node.identity == (found.st.st_dev, found.st.st_ino)
    same = type(node) is Dir and same_directory(node, found.layers)
    discard(sb, above, node.name, found)
    return same


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
            found = resolve(sb, parent, entry.name)
            if found.answer is Answer.FOUND:
                if found.layers is not None and same_directory(entry, found.layers):
                    adopt(sb, entry, found, parent.floor)
                    # Where a redirect leads is for other directories to say than those that are asked here.
                    entry.resolved = -1 if entry.moved else parent.version
                    continue
                discard(sb, parent, entry.name, found)
        alive = [layer for layer in entry.layers if layer.fd >= 0 and os.fstat(layer.fd).st_nlink > 0]
        if not alive:
            raise eio() if entry.offline else enoent()
        if len(alive) != len(entry.layers):
            moved = Found(_S_IFDIR, alive[0].branch, os.fstat(alive[0].fd), alive)
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
            return child, _fstat(sb.layer_fd(child, child.layers[0]))
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
                try:
                    st = _stat(fd, name)
                except FileNotFoundError:
                    pass
                else:
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
    if found.answer is Answer.FOUND:
        sb.counters.depth_found[depth] += 1
        return intern(sb, parent, name, found)
    depths = sb.counters.depth_whiteout if found.answer is Answer.WHITED else sb.counters.depth_negative
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
        size += os.fstat(sb.layer_fd(parent, layer)).st_size
    parent.load_at = max(size // 128, LOAD_AT_LEAST)
    return parent.probes > parent.load_at


def remember(parent: Dir, name: bytes, found: Found | Missing) -> None:
    """Put what was resolved into the directory's view, if it has one."""
    view = parent.view
    if view is None:
        return
    if found.answer is not Answer.FOUND:
        view.pop(name, None)
    elif found.layers is None:
        view[name] = found.branch.index
    else:
        view[name] = tuple(layer.branch.index for layer in found.layers)


def update(sb: Superblock, parent: Dir, name: bytes, found: Found | Missing) -> os.stat_result | None:
    """Put the result of `resolve` into view, table and node; returns the attributes of what the name stands for."""
    remember(parent, name, found)
    if found.answer is Answer.FOUND:
        return intern(sb, parent, name, found)[1]
    sb.changes.found_gone(parent, name)
    return None
