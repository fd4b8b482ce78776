"""A union as its predecessor's record says that it was: the same node ids, handles and descriptors.

What the kernel knows must be what it was; nothing else is: no layer, view or time is trusted, and branches are asked as
always, so that what happened meanwhile is found. A descriptor is believed only when it is of the object it is said to
be of, for its number may have been another one's when the predecessor was killed.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from mmap import mmap
from typing import Any, NamedTuple

from udbad import compiled
from udbad.branch import syscalls
from udbad.branch.branches import Branch
from udbad.inodes import journal
from udbad.inodes.handles import ID_BITS, OpenDir, OpenFile
from udbad.inodes.inomap import Identity
from udbad.inodes.journal import Journal
from udbad.inodes.names import Names
from udbad.inodes.node import Dir, Layer, Node, Plink, unkept
from udbad.inodes.record import DROPPED, Record, unpack
from udbad.types import ROOT_ID, Caller, Fh
from udbad.union.fs import UnionFs
from udbad.union.superblock import Superblock

log = logging.getLogger(__name__)

Take = Callable[[int], int]


class Recalled(NamedTuple):
    """What was recalled from `record`. closed: handles that it has, and that there are not."""

    record: Record
    closed: list[int]


def keep(fs: UnionFs, record: Record, recalled: Recalled | None = None) -> None:
    """Have the record say what the union knows, all of it now, and from now on what changes. Raises OSError.

    recalled: of what was just recalled, what was not made is not, and so goes over as it is.
    """
    sb = fs.sb
    writer = Journal(record, sb.table, sb.handles, sb.inomap, lambda: list(_homes(sb).values()))
    if recalled is None or sb.table.unread is None:
        sb.table.read_all()
        record.rewrite()
        return
    record.copy(recalled.record)
    for number in recalled.closed:
        writer.closed(number)
    record.changed.update(writer.present())
    record.go_on()


def recall(
    fs: UnionFs,
    record: Record,
    takes: Sequence[Take],
    copies: Mapping[int, Identity] | None = None,
    abandoned: Collection[int] = (),
) -> Recalled:
    """Rebuild in a fresh union what the record says; it is left as it is, and has to be while `InodeTable.unread` has
    something of it.

    takes: duplicate the descriptor that had a number, in the predecessor, and in those before it that it had not taken
    all from; may raise OSError. copies: by node id, copies that open files
    of the node may have been moved to when the predecessor was killed. abandoned: ids of branches that are no more and
    did not answer: nothing that was open on them may be looked at. Preconditions: the branches have the ids
    that they had, and descriptors of the same mounts; nothing was looked up yet. Afterwards, when the coherence
    strategy has started, `Coherence.recalled` has the kernel forget what it remembers.
    """
    return _Recall(fs, takes, copies or {}, abandoned).run(record)


def _homes(sb: Superblock) -> dict[tuple[int, bytes], Plink]:
    """The pseudo-links by the ids of their branches and their names there."""
    return {(plink.branch.id, plink.name): plink for plinks in sb.plinks.values() for plink in plinks}


class _Recall:
    """One recall. Of each object the last entry counts."""

    def __init__(
        self, fs: UnionFs, takes: Sequence[Take], copies: Mapping[int, Identity], abandoned: Collection[int]
    ) -> None:
        self._fs = fs
        self._sb = fs.sb
        self._takes = takes
        self._copies = copies
        self._abandoned = abandoned
        self._branches: dict[int, Branch] = {branch.id: branch for branch in fs.sb.branches.branches}
        self._nodes: dict[int, tuple[bytes, int, int]] = {}
        """By id: the entry, references, and the id of the directory it is in."""
        self._further: list[tuple[Node, list[tuple[int, bytes]]]] = []
        """Nodes that have further names."""
        self._homes = _homes(fs.sb)
        self._files: dict[int, bytes] = {}
        self._directories: dict[int, Any] = {}
        self._listed: dict[int, Any] = {}
        self._negatives: dict[int, set[bytes]] = {}
        self._numbers: Any = None
        self._table: dict[Identity, int] = {}
        self._last = 0
        """The highest number of a handle that was given."""
        self._closed: list[int] = []

    def run(self, record: Record) -> Recalled:
        if not compiled.why_not() and record.version == cunread.VERSION:
            self._read_some(record)
        else:
            self._read_all(record)
        self._sb.handles.next = self._last + 1
        for number, payload in sorted(self._files.items()):
            if not self._open_file(payload):
                self._closed.append(number)
        for number, said in self._directories.items():
            if not self._open_directory(said):
                self._closed.append(number)
        if self._sb.table.unread is None:
            self._drop_unknown()
        return Recalled(record, self._closed)

    def _restore_numbers(self, used: Iterable[int]) -> None:
        inomap = self._sb.inomap
        inomap.restore(self._numbers, {one: number for one, number in self._table.items() if number})
        # Of one flush, a process that is killed in it may have written the nodes and not that their numbers were given.
        inomap.skip(used)

    def _read_some(self, record: Record) -> None:
        """Make the nodes that others need, and have the rest made when somebody asks for them."""
        table = self._sb.table
        answering = {number: branch for number, branch in self._branches.items() if not branch.offline}

        def begin(memory: mmap, size: int) -> cunread.Unread:
            return cunread.Unread(memory, size, table, answering, self._make, self._taken)

        table.unread = unread = record.scan(begin)
        rest = unread.scan(self._entry)
        self._restore_numbers(unread.spare())
        for number in (ROOT_ID, *rest):
            table.find(number)
        self._name_further()

    def _make(self, payload: bytes, count: int) -> Node:
        return (self._node if payload[0] == journal.FILE else self._directory)(payload, count)

    def _read_all(self, record: Record) -> None:
        for payload, count in record.entries():
            self._entry(payload, count)
        self._restore_numbers(self._nodes)
        nodes = self._sb.table.nodes
        read = [one for one in self._nodes.values() if one[1] != DROPPED]
        made = [(self._make(payload, count), above) for payload, count, above in read]
        for node, number in made:
            parent = nodes.get(number)
            if type(parent) is Dir:
                node.parent = parent
                parent.children[node.name] = node
        self._name_further()
        for said in self._listed.values():
            directory = nodes.get(said[0])
            if type(directory) is Dir:
                directory.listings, directory.room = journal.listings(said[1]), said[2]
        for number, names in self._negatives.items():
            directory = nodes.get(number)
            if type(directory) is Dir:
                directory.negatives = names

    def _entry(self, payload: bytes, count: int) -> None:
        kind = payload[0]
        if kind == journal.FILE:
            words = journal.NODE.unpack_from(payload)
            self._nodes[words[6]] = payload, count, words[9]
            return
        if kind == journal.OPEN_FILE:
            number = journal.OPENED.unpack_from(payload)[6]
            self._files[number] = payload
            self._last = max(self._last, number)
            return
        said = unpack(payload[1:])
        if kind == journal.DIRECTORY:
            self._nodes[said[0]] = payload, count, said[1]
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

    def _node(self, payload: bytes, count: int) -> Node:
        _, dead, size, kind, branch_id, orphan, number, dev, ino, _, links = journal.NODE.unpack_from(payload)
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
        if at < len(payload):
            further, home = unpack(payload[at:])
            self._further.append((node, further))
            plink = None if home is None else self._homes.get(home)
            if plink is not None and plink.identity == (dev, ino):
                node.plink = plink
        self._sb.table.nodes.add(node)
        return node

    def _directory(self, payload: bytes, count: int) -> Dir:
        number, _, name, dead, links, floor, opaque, mtime_offset, listed, layers = unpack(payload[1:])
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
            table.nodes.add(node)
            held = sum(layer.fd >= 0 for layer in parts)
            if held:
                table.open_fds += held
                table.note_fds(node)
        node.nlookup = count
        node.nlink_extra = links
        node.mtime_offset = mtime_offset
        node.listed = listed
        return node

    def _is_offline(self, branch_id: int) -> bool:
        branch = self._branches.get(branch_id)
        return branch is not None and branch.offline

    def _gone(self, branch_id: int) -> Branch:
        """In the place of a branch that the mount has no more: what was on it is dead, but has its number still."""
        return self._sb.branches[0].but(id=branch_id, offline=branch_id in self._abandoned)

    def _name_further(self) -> None:
        """Give nodes the names that they have beside one."""
        table = self._sb.table
        for node, further in self._further:
            aliases = set()
            for above, name in further:
                directory = table.find(above)
                if type(directory) is Dir:
                    aliases.add((directory, name))
                    directory.children[name] = node
            node.aliases = aliases or None

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
        for take in self._takes:
            try:
                fd = take(number)
            except OSError:
                continue
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
            return self._takes[0](number)
        except OSError:
            return -1

    def _open_file(self, payload: bytes) -> bool:
        """False when it is not open any more."""
        _, fd, flags, uid, gid, pid, number, group, node_id, backing = journal.OPENED.unpack_from(payload)
        node = self._sb.table.find(node_id)
        if node is None or self._is_forgotten(node, number):
            return False
        if node.branch.offline:
            return self._open_offline(payload, node)
        fd = self._taken(fd, node.identity, self._copies.get(node_id))
        if fd < 0:
            return False  # it was being closed
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        writable = access != os.O_RDONLY and flags & os.O_ACCMODE != os.O_RDONLY
        handle = OpenFile(Fh(number), node, fd, flags, Caller(uid, gid, pid, 0), writable)
        handle.group = None if group < 0 else group
        handle.backing_id = backing
        handle.id_bits = syscalls.fstat(fd).st_mode & ID_BITS if writable else 0
        self._sb.handles.put_back(handle)
        if number < 0 and self._fs.kept is not None:
            self._fs.kept.put_back(handle)
        return True

    def _open_offline(self, payload: bytes, node: Node) -> bool:
        _, fd, flags, uid, gid, pid, number, group, _, backing = journal.OPENED.unpack_from(payload)
        fd = self._unseen(fd)
        if fd < 0:
            return False
        handle = OpenFile(Fh(number), node, fd, flags, Caller(uid, gid, pid, 0), False)
        handle.group = None if group < 0 else group
        handle.backing_id = backing
        self._sb.handles.put_back_lost(handle)
        return True

    def _open_directory(self, said: Any) -> bool:
        """False when it is not open any more."""
        number, node_id, pid, cached, base, names = said
        node = self._sb.table.find(node_id)
        if type(node) is not Dir or self._is_forgotten(node, number):
            return False
        handle = OpenDir(Fh(number), node, pid)
        handle.cached, handle.base = cached, base
        if names == journal.SHARED:
            handle.names = next((shared for first, _, shared in node.listings if first == base), None)
        elif names is not None:
            handle.names = Names(names)
        if cached:
            node.cached_opens += 1
        self._sb.handles.put_back(handle)
        return True


if not compiled.why_not():
    from udbad.inodes import cunread  # the same for most nodes, and of most only when somebody needs them
