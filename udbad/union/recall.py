"""A union as its predecessor's record says that it was: the same node ids, handles and descriptors.

What the kernel knows must be what it was; nothing else is: no layer, view or time is trusted, and branches are asked as
always, so that what happened meanwhile is found. A descriptor is believed only when it is of the object it is said to
be of, for its number may have been another one's when the predecessor was killed.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from udbad import compiled
from udbad.branch import syscalls
from udbad.branch.branches import Branch
from udbad.inodes import journal
from udbad.inodes.handles import ID_BITS, OpenDir, OpenFile
from udbad.inodes.inomap import Identity
from udbad.inodes.journal import Journal
from udbad.inodes.record import DROPPED, Record, unpack
from udbad.inodes.table import Dir, Layer, Node, Plink, unkept
from udbad.types import ROOT_ID, Caller, Fh
from udbad.union.fs import UnionFs
from udbad.union.superblock import Superblock

log = logging.getLogger(__name__)

_NONE: list[tuple[int, bytes]] = []
Take = Callable[[int], int]


def keep(fs: UnionFs, record: Record) -> None:
    """Have the record say what the union knows, all of it now, and from now on what changes. Raises OSError."""
    sb = fs.sb
    Journal(record, sb.table, sb.handles, sb.inomap, lambda: list(_homes(sb).values()))
    record.rewrite()


def recall(
    fs: UnionFs,
    record: Record,
    take: Take,
    copies: Mapping[int, Identity] | None = None,
    abandoned: Collection[int] = (),
) -> None:
    """Rebuild in a fresh union what the record says; it is left as it is.

    take: duplicates the descriptor that had this number; may raise OSError. copies: by node id, copies that open files
    of the node may have been moved to when the predecessor was killed. abandoned: ids of branches that are no more and
    did not answer: nothing that was open on them may be looked at. Preconditions: the branches have the ids
    that they had, and descriptors of the same mounts; nothing was looked up yet. Afterwards, when the coherence
    strategy has started, `Coherence.recalled` has the kernel forget what it remembers.
    """
    _Recall(fs, take, copies or {}, abandoned).run(record)


def _homes(sb: Superblock) -> dict[tuple[int, bytes], Plink]:
    """The pseudo-links by the ids of their branches and their names there."""
    return {(plink.branch.id, plink.name): plink for plinks in sb.plinks.values() for plink in plinks}


class _Recall:
    """One recall. Of each object the last entry counts."""

    def __init__(self, fs: UnionFs, take: Take, copies: Mapping[int, Identity], abandoned: Collection[int]) -> None:
        self._fs = fs
        self._sb = fs.sb
        self._take = take
        self._copies = copies
        self._abandoned = abandoned
        self._branches: dict[int, Branch] = {branch.id: branch for branch in fs.sb.branches.branches}
        self._nodes: dict[int, int | tuple[Any, int]] = {}
        """By id: the entry and references; the entry of a directory as what it says. A number: where that of anything
        else is, for `cjournal`."""
        self._names: list[tuple[Node, int, list[tuple[int, bytes]]]] = []
        """Nodes with the ids of the directories they are in, and their further names."""
        self._homes = _homes(fs.sb)
        self._files: dict[int, bytes] = {}
        self._directories: dict[int, Any] = {}
        self._listed: dict[int, Any] = {}
        self._negatives: dict[int, set[bytes]] = {}
        self._numbers: Any = None
        self._table: dict[Identity, int] = {}
        self._last = 0
        """The highest number of a handle that was given."""

    def run(self, record: Record) -> None:
        quick = not compiled.why_not() and record.version == cjournal.VERSION
        if quick:
            record.scan(cjournal.scan, self._nodes, self._entry)
        else:
            for payload, count in record.entries():
                self._entry(payload, count)
        self._sb.inomap.restore(self._numbers, {one: number for one, number in self._table.items() if number})
        # Of one flush, a process that is killed in it may have written the nodes and not that their numbers were given.
        self._sb.inomap.skip(self._nodes)
        table = self._sb.table.nodes
        rest = []
        for said in self._nodes.values():
            if type(said) is tuple and said[1] != DROPPED:
                if type(said[0]) is bytes:
                    rest.append(said)
                else:
                    self._directory(*said)
        if quick:
            rest = record.scan(cjournal.nodes, self._nodes, self._branches, table)
        for payload, count in rest:
            self._node(payload, count)
        self._attach()
        self._sb.handles.next = self._last + 1
        for _, payload in sorted(self._files.items()):
            self._open_file(payload)
        for said in self._listed.values():
            self._listings(said)
        for said in self._directories.values():
            self._open_directory(said)
        for number, names in self._negatives.items():
            directory = table.get(number)
            if type(directory) is Dir:
                directory.negatives = names
        self._drop_unknown()

    def _entry(self, payload: bytes, count: int) -> None:
        kind = payload[0]
        if kind == journal.FILE:
            self._nodes[journal.NODE.unpack_from(payload)[6]] = payload, count
            return
        if kind == journal.OPEN_FILE:
            number = journal.OPENED.unpack_from(payload)[6]
            self._files[number] = payload
            self._last = max(self._last, number)
            return
        said = unpack(payload[1:])
        if kind == journal.DIRECTORY:
            self._nodes[said[0]] = said, count
        elif kind == journal.GONE:
            self._nodes.pop(said, None)
        elif kind == journal.OPEN_DIRECTORY:
            self._directories[said[0]] = said
            self._last = max(self._last, said[0])
        elif kind == journal.CLOSED:
            self._last = max(self._last, said)
            self._files.pop(said, None)
            self._directories.pop(said, None)
        elif kind == journal.NEXT:
            self._last = max(self._last, said - 1)
        elif kind == journal.LISTINGS:
            self._listed[said[0]] = said
        elif kind == journal.NEGATIVES:
            self._negatives.setdefault(said[0], set()).update(said[1])
        elif kind == journal.NUMBERS:
            self._numbers = said
        elif kind == journal.NUMBER:
            self._table[said[0], said[1]] = said[2]
        elif kind == journal.HOME:
            self._home(said)

    # -- nodes ------------------------------------------------------------------------------------------

    def _node(self, payload: bytes, count: int) -> None:
        _, dead, size, kind, branch_id, orphan, number, dev, ino, parent, links = journal.NODE.unpack_from(payload)
        branch = self._branches.get(branch_id)
        node = Node(number, kind, self._gone(branch_id) if branch is None else branch, dev, ino)
        at = journal.NODE.size + size
        node.name = payload[journal.NODE.size : at]
        node.nlookup = count
        node.nlink_extra = links
        node.dead = bool(dead) or branch is None
        if orphan != -1:
            orphan = orphan if orphan >= 0 else unkept(orphan)
            if node.branch.offline:
                node.orphan_fd = unkept(self._unseen(orphan))
            else:
                node.orphan_fd = self._taken(orphan, (dev, ino))
        further = _NONE
        if at < len(payload):
            further, home = unpack(payload[at:])
            plink = None if home is None else self._homes.get(home)
            if plink is not None and plink.identity == (dev, ino):
                node.plink = plink
        self._sb.table.nodes[number] = node
        self._names.append((node, parent, further))

    def _directory(self, said: Any, count: int) -> None:
        number, parent, name, dead, links, floor, opaque, mtime_offset, listed, layers = said
        table = self._sb.table
        if number == ROOT_ID:
            node = self._sb.root
        else:
            # One of which it was not known whether it is there (st_ino 0) is found when the directory is asked again.
            there = [one for one in layers if one[0] in self._branches and (one[2] or self._is_offline(one[0]))]
            parts = [
                Layer(
                    self._branches.get(branch_id) or self._gone(branch_id),
                    dev,
                    ino,
                    nlink,
                    -1 if fd < 0 else self._taken(fd, (dev, ino)),
                )
                for branch_id, dev, ino, nlink, fd in there or layers
                if not self._is_offline(branch_id)
            ]
            offline = [
                Layer(self._branches[branch_id], dev, ino, nlink, -1)
                for branch_id, dev, ino, nlink, _ in there
                if self._is_offline(branch_id)
            ]
            parts.sort(key=lambda layer: layer.branch.index)  # the branches may have another order by now
            offline.sort(key=lambda layer: layer.branch.index)
            node = Dir(number, parts or offline)
            node.offline = offline or None
            node.name = name
            node.dead = dead or not there
            node.opaque, node.floor = opaque, floor
            table.nodes[number] = node
            held = sum(layer.fd >= 0 for layer in parts)
            if held:
                table.open_fds += held
                table.note_fds(node)
            self._names.append((node, parent, _NONE))
        node.nlookup = count
        node.nlink_extra = links
        node.mtime_offset = mtime_offset
        node.listed = listed

    def _is_offline(self, branch_id: int) -> bool:
        branch = self._branches.get(branch_id)
        return branch is not None and branch.offline

    def _gone(self, branch_id: int) -> Branch:
        """In the place of a branch that the mount has no more: what was on it is dead, but has its number still."""
        return replace(self._sb.branches[0], id=branch_id, offline=branch_id in self._abandoned)

    def _attach(self) -> None:
        """Give the nodes their names."""
        nodes = self._sb.table.nodes
        for node, number, further in self._names:
            parent = nodes.get(number)
            if type(parent) is Dir:
                node.parent = parent
                parent.children[node.name] = node
            if not further:
                continue
            aliases = set()
            for above, name in further:
                directory = nodes.get(above)
                if type(directory) is Dir:
                    aliases.add((directory, name))
                    directory.children[name] = node
            node.aliases = aliases

    def _drop_unknown(self) -> None:
        """Nodes that the kernel was not told of yet, or has forgotten."""
        table = self._sb.table
        for node in list(table.nodes.values()):
            if node.nlookup <= 0 and not node.handles:
                table.not_sent(node)

    def _home(self, said: Any) -> None:
        branch_id, name, identity, source_dev, pending, links, counted = said
        plink = self._homes.get((branch_id, name))
        if plink is not None and plink.identity == identity:
            plink.source_dev, plink.pending, plink.links, plink.counted = source_dev, pending, links, counted

    # -- what is open -----------------------------------------------------------------------------------

    def _taken(self, number: int, *identities: Identity | None) -> int:
        """The predecessor's descriptor, if it is of this object; else -1."""
        try:
            fd = self._take(number)
        except OSError:
            return -1
        st = os.fstat(fd)
        if (st.st_dev, st.st_ino) in identities:
            return fd
        os.close(fd)
        return -1

    @staticmethod
    def _is_forgotten(node: Node, number: int) -> bool:
        """Whether a handle is one that was kept for a node (union/kept.py) which the kernel has forgotten since.

        It was closed then, by a FORGET; no answer follows one, so the record need not say so. The node is about to go,
        and the next one of its number would be read by its handle.
        """
        return number < 0 and node.nlookup <= 0

    def _unseen(self, number: int) -> int:
        """The predecessor's descriptor, as it is: the branch cannot be asked. Who takes it when that answers looks."""
        try:
            return self._take(number)
        except OSError:
            return -1

    def _open_file(self, payload: bytes) -> None:
        _, fd, flags, uid, gid, pid, number, group, node_id, backing = journal.OPENED.unpack_from(payload)
        node = self._sb.table.nodes.get(node_id)
        if node is None or self._is_forgotten(node, number):
            return
        if node.branch.offline:
            self._open_offline(payload, node)
            return
        fd = self._taken(fd, node.identity, self._copies.get(node_id))
        if fd < 0:
            return  # it was being closed
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        writable = access != os.O_RDONLY and flags & os.O_ACCMODE != os.O_RDONLY
        handle = OpenFile(Fh(number), node, fd, flags, Caller(uid, gid, pid, 0), writable)
        handle.group = None if group < 0 else group
        handle.backing_id = backing
        handle.id_bits = syscalls.fstat(fd).st_mode & ID_BITS if writable else 0
        self._sb.handles.put_back(handle)
        if number < 0 and self._fs.kept is not None:
            self._fs.kept.put_back(handle)

    def _open_offline(self, payload: bytes, node: Node) -> None:
        _, fd, flags, uid, gid, pid, number, group, _, backing = journal.OPENED.unpack_from(payload)
        fd = self._unseen(fd)
        if fd < 0:
            return
        handle = OpenFile(Fh(number), node, fd, flags, Caller(uid, gid, pid, 0), False)
        handle.group = None if group < 0 else group
        handle.backing_id = backing
        self._sb.handles.put_back_lost(handle)

    def _open_directory(self, said: Any) -> None:
        number, node_id, pid, cached, base, names = said
        node = self._sb.table.nodes.get(node_id)
        if type(node) is not Dir or self._is_forgotten(node, number):
            return
        handle = OpenDir(Fh(number), node, pid)
        handle.cached, handle.base = cached, base
        if names == journal.SHARED:
            names = next((shared for first, _, shared in node.listings if first == base), None)
        handle.names = names
        if cached:
            node.cached_opens += 1
        self._sb.handles.put_back(handle)

    def _listings(self, said: Any) -> None:
        node = self._sb.table.nodes.get(said[0])
        if type(node) is Dir:
            node.listings, node.room = said[1], said[2]


if not compiled.why_not():
    from udbad.inodes import cjournal  # the same for most nodes
