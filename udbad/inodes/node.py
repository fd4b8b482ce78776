"""What is known of one inode of the mount: a `Node`, a `Dir` and its layers. table.py has those that there are.

There may be a million. What hardly any has is in `More`, and the types of C are in node.pxd.
"""

from __future__ import annotations

import stat as st_mod
from typing import TYPE_CHECKING

from udbad.branch.branches import Branch
from udbad.branch.state import Stamp
from udbad.inodes.inomap import Identity
from udbad.inodes.names import UNKNOWN, Names

if TYPE_CHECKING:
    from udbad.inodes.handles import OpenFile

Index = int
"""Of a branch."""

LOAD_AT_LEAST = 16
"""Questions about a directory's names, times its branches, that are never worth reading it."""

MAX_STACKED = 10_000
"""Names of one directory; with more, every question about one is asked of the branches."""


class Plink:
    """A pseudo-link: the copied-up home of a file whose other names are still on lower branches (semantics 10.3)."""

    __slots__ = ("branch", "counted", "dirfd", "identity", "links", "name", "pending", "source_dev", "source_ino")

    def __init__(
        self, branch: Branch, dirfd: int, name: bytes, identity: Identity, source_dev: int | None, source_ino: int,
        pending: int, links: int = 0, counted: bool = True,
    ) -> None:  # fmt: skip
        self.branch = branch
        self.dirfd = dirfd
        """The branch's .wh..wh.plnk directory, where the home is kept."""
        self.name = name
        """In that directory."""
        self.identity = identity
        """Of the home."""
        self.source_dev = source_dev
        """Device of the lower file it was copied from; None until that is recognised."""
        self.source_ino = source_ino
        """Inode number of that file."""
        self.pending = pending
        """How many names still live on lower branches only."""
        self.links = links
        """The most names that the lower file was seen to have."""
        self.counted = counted
        """False while `pending` is a guess, because an earlier mount made the pseudo-link."""


def unkept(fd: int) -> int:
    """A descriptor that may not be used, as its branch does not answer: a number below -1; and back."""
    return -2 - fd if fd != -1 else -1


Target = tuple[int, bytes]
"""Where the kernel was told that a symbolic link leads, and the ctime (ns) it had then; 0: another one may have it."""

XATTR_BITS = {
    b"security.capability": 1,
    b"security.selinux": 2,
    b"system.posix_acl_access": 4,
    b"system.posix_acl_default": 8,
}
"""Extended attributes that are asked for again and again (`ls -l`, each write), and hardly any file has."""
ALL_XATTRS = 16
"""The bit of all that are listed where there are any (union/xattrs.py)."""


class More:
    """What hardly any node has."""

    __slots__ = ("aliases", "busy", "orphan_fd", "plink", "seen")

    def __init__(self) -> None:
        self.aliases: set[tuple[Dir, bytes]] | None = None
        self.plink: Plink | None = None
        self.orphan_fd = -1
        self.busy: object = None
        self.seen: Stamp | Target | None = None


class Node:
    """One inode of the mount that is not a directory, or the common part of a directory."""

    __slots__ = (
        "branch", "dead", "dev", "handles", "id", "ino", "kind", "lacks", "more", "name", "nlink_extra", "nlookup",
        "parent", "place", "sent",
    )  # fmt: skip

    mtime_offset = 0
    ttl = 0.0

    def __init__(self, node_id: int, kind: int, branch: Branch, dev: int, ino: int) -> None:
        self.id = node_id
        """By which the kernel knows it, and st_ino."""
        self.kind = kind
        """File type bits of st_mode."""
        self.branch = branch
        """Where its data is."""
        self.dev = dev
        """With `ino`: who it is there."""
        self.ino = ino
        self.parent: Dir | None = None
        """With `name`: the name it was last reached by. None: of the root, and when no name is known."""
        self.name = b""
        self.nlookup = 0
        """References of the kernel; `InodeTable.refer` adds one."""
        self.place = 0
        """Where these are in the record (Record.count); 0: nowhere."""
        self.nlink_extra = 0
        """What is added to the st_nlink that the branch says."""
        self.dead = False
        """No name is left; only descriptors reach it."""
        self.handles: list[OpenFile] | None = None
        self.lacks: tuple[int, object] | None = None
        """Extended attributes that it was found not to have, as bits of XATTR_BITS and ALL_XATTRS, and the
        `Hooks.known_state` it had then."""
        self.sent: Stamp | None = None
        """The state whose attributes the kernel may keep (coherence/sent.py); None: it was given none to keep."""
        self.more: More | None = None

    def _more(self) -> More:
        more = self.more
        if more is None:
            more = self.more = More()
        return more

    @property
    def aliases(self) -> set[tuple[Dir, bytes]] | None:
        """All names, where a hard link has further ones."""
        return None if self.more is None else self.more.aliases

    @aliases.setter
    def aliases(self, names: set[tuple[Dir, bytes]] | None) -> None:
        if names or self.more is not None:
            self._more().aliases = names

    @property
    def plink(self) -> Plink | None:
        """The pseudo-link its data is reached by."""
        return None if self.more is None else self.more.plink

    @plink.setter
    def plink(self, plink: Plink | None) -> None:
        if plink is not None or self.more is not None:
            self._more().plink = plink

    @property
    def orphan_fd(self) -> int:
        """Its copy without a name, made after the last one was removed; -1: none, below that: `unkept` of it."""
        return -1 if self.more is None else self.more.orphan_fd

    @orphan_fd.setter
    def orphan_fd(self, fd: int) -> None:
        self._more().orphan_fd = fd

    @property
    def busy(self) -> object:
        """The copy-up of it that is under way, if there is one (edge/waiting.py)."""
        return None if self.more is None else self.more.busy

    @busy.setter
    def busy(self, copy: object) -> None:
        self._more().busy = copy

    @property
    def seen(self) -> Stamp | Target | None:
        """Its state at the last open, or its target: what the kernel may keep pages of."""
        return None if self.more is None else self.more.seen

    @seen.setter
    def seen(self, seen: Stamp | Target | None) -> None:
        if seen is not None or self.more is not None:
            self._more().seen = seen

    @property
    def identity(self) -> Identity:
        return (self.dev, self.ino)

    def is_dir(self) -> bool:
        return self.kind == st_mod.S_IFDIR

    def names(self) -> list[tuple[Dir, bytes]]:
        """Every (directory, name) this node is known by."""
        known = [] if self.parent is None else [(self.parent, self.name)]
        if self.aliases:
            known += [pair for pair in self.aliases if pair != (self.parent, self.name)]
        return known


class Layer:
    """One branch directory that is merged into a directory of the mount."""

    __slots__ = ("below", "branch", "dev", "fd", "ino", "nlink")

    def __init__(self, branch: Branch, dev: int, ino: int, nlink: int, fd: int) -> None:
        self.branch = branch
        self.dev = dev
        self.ino = ino
        self.nlink = nlink
        self.fd = fd
        self.below: bytes | None = None
        """The path from the root under which the branches below this one have it, where a redirect says so, here or
        on the way here. None: the one its parent's layer on this branch has there, and its name."""

    @property
    def identity(self) -> Identity:
        return (self.dev, self.ino)


Listing = tuple[int, int, Names | None]
"""A snapshot of a directory: the position it begins at, how many names it has, and these unless they were let go."""

POSITIONS = (0, 1 << 31)
"""Within these are the positions in listings: more, and programs with an off_t of 32 bits get EOVERFLOW."""


class Dir(Node):
    """A directory of the mount."""

    __slots__ = (
        "cached_opens",
        "children",
        "floor",
        "hot",
        "layers",
        "listed",
        "listings",
        "load_at",
        "moved",
        "mtime_offset",
        "negatives",
        "offline",
        "opaque",
        "probes",
        "quiet",
        "resolved",
        "room",
        "stacked",
        "sure",
        "times",
        "trusted",
        "ttl",
        "version",
        "view",
    )

    def __init__(self, node_id: int, layers: list[Layer]) -> None:
        top = layers[0]
        super().__init__(node_id, st_mod.S_IFDIR, top.branch, top.dev, top.ino)
        self.layers = layers
        """Branch directories in visible range, top first (semantics 4.1)."""
        self.offline: list[Layer] | None = None
        """What it has, or may have, on branches that do not answer, top first. These are no `layers`, unless there is
        nothing else. An inode number of 0: not known whether it is there."""
        self.opaque: int | None = None
        """Index of the branch whose opaque mark ends the layers."""
        self.floor = 0
        """The lowest branch index at which something created here would be visible: opaque marks and whiteouts of this
        directory and its ancestors."""
        self.moved = False
        """A redirect says where some of its layers are, or would be: more than its parent and its name decides."""
        self.children: dict[bytes, Node] = {}
        """Nodes by the names they are known by here."""
        self.view: Names | None = None
        """Merged names; None: not loaded. UNKNOWN entries have to be looked at again."""
        self.stacked: dict[bytes, None] | None = None
        """What else is in the layers: names that have a whiteout, or that are in several layers, or had or were
        since the view was loaded. None: it could be any. Mostly it is empty, and as a set three times as large."""
        self.negatives: set[bytes] | None = None
        """Names that the kernel was told not to exist, and may remember."""
        self.trusted = False
        """Layers and view may be used without asking the branches. Set by coherence/base.py alone."""
        self.ttl = 0.0
        """Seconds the kernel may keep entries of this directory. Set by coherence/base.py alone."""
        self.probes = 0
        """Branches asked for single names since the view was lost."""
        self.load_at = LOAD_AT_LEAST
        """How many of these cost less than loading the view."""
        self.hot = True
        """Used since its descriptors or watches were last looked at for some to give up."""
        self.listed = False
        """The kernel may have a listing."""
        self.mtime_offset = 0
        """Nanoseconds added to mtime so that the kernel looks again."""
        self.listings: tuple[Listing, ...] = ()
        """Snapshots that a position may belong to, newest last."""
        self.room = POSITIONS
        """Where positions of the next snapshot may lie."""
        self.cached_opens = 0
        """Handles that may be answered from the kernel's listing."""
        self.times: list[Stamp] | None = None
        """Of a directory that is not trusted: the times its branch directories had when it was last asked. None: they
        tell nothing."""
        self.quiet = False
        """Its branch directories are watched, and have the names they had when it was last asked, as of the last
        `Hooks.catch_up`. Set by union/times.py, taken away by coherence/silence.py and by whoever gives it other
        layers."""
        self.sure = -1
        """`Superblock.version` when it and every directory above it were seen to be quiet, with the layers that they
        have; no version has been given since when it is the same."""
        self.version = 0
        """A number that is raised when these differ."""
        self.resolved = -1
        """Its parent's `version` when its own layers were found."""

    def forget_names(self) -> None:
        """Drop what is known of the names in it. Whether its layers are trusted is another question."""
        self.view = None
        self.times = None
        self.quiet = False
        self.sure = -1
        self.resolved = -1

    def note_stacked(self, name: bytes) -> None:
        """A name got a whiteout, or came to be in several layers, or may have."""
        stacked = self.stacked
        if stacked is not None:
            stacked[name] = None
            if len(stacked) > MAX_STACKED:
                self.stacked = None

    def doubt(self, name: bytes) -> None:
        """A branch has under this name what the view does not know: whoever asks for it next, as the kernel will, must
        not be told what was before, in whatever mode."""
        if self.view is not None:
            self.view[name] = UNKNOWN
        self.note_stacked(name)

    def layer(self, index: Index) -> Layer | None:
        """The layer on the branch with this index, if the directory exists there."""
        layers = self.layers
        position = min(index, len(layers) - 1)  # sorted by branch: there, or above when some lack the directory
        while position >= 0:
            layer = layers[position]
            here = layer.branch.index
            if here <= index:
                return layer if here == index else None
            position -= 1
        return None
