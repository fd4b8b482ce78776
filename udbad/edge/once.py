"""Every operation once, whatever is killed between its first system call and its answer.

What nobody answered before a mount process was killed, the kernel sends to the next one again, with bit 63 of `unique`
set (FUSE_NOTIFY_RESEND). What was done of it by then is told by a slot in memory that outlives the process: what an
operation is about to do is noted right before the system call that counts (`intend`), when all that can be refused has
been refused; what came of it, before it is answered (`result`). So, of a request that is sent again,

    a result is there     it is the answer
    only an intent        RULES says how to tell from the branches whether it was done; what is left then is done
    nothing               it is performed: what came before the intent may be done twice

What others have done directly in the meantime is never undone: where it cannot be told from our own, it stays.

One slot suffices a process, because an operation that has noted something has ended before the next one begins: what
runs in threads (REPEATED) may be done twice. The slots of the processes before it are kept, for requests that wait for
something when it is killed as well. Nothing is ever cleared: no unique number comes twice.

A copy-up is no operation, and may be published for a request that is told nothing about it: `settle` goes on with that.

Event loop only.
"""

from __future__ import annotations

import errno
import logging
import os
import stat as st_mod
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from udbad.branch import syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.edge.operations import Attributes, Entry, Opened, Operations
from udbad.errors import ABSENT, os_error
from udbad.inodes.handles import HandleTable, OpenFile
from udbad.inodes.inomap import Identity
from udbad.inodes.node import Dir, Node
from udbad.inodes.slot import CURRENT, RESENT, SLOT, U64, Slot
from udbad.kernel import wire
from udbad.types import Caller
from udbad.union import create, lookup, remove, rename, resolve, settle
from udbad.union.fs import SetAttr, UnionFs
from udbad.union.resolve import FOUND, Found

log = logging.getLogger(__name__)

Unique = int
"""A request's number."""
DECIDED: Final = 1
ANSWERED: Final = 2
"""Of Slot.counts."""


class Answered(Exception):
    """A request was answered already, or nearly: with this errno or body."""

    def __init__(self, number: int, body: bytes) -> None:
        super().__init__(number)
        self.number = number
        self.body = body


class Noted(NamedTuple):
    """What was intended. handle: the number that a handle would have got. words: as given to `intend`."""

    handle: int
    words: tuple[int, ...]


class _Perform(Exception):
    """It was not done: perform it."""


class Once:
    """The slots of one mount. Implements superblock.Notes; what operations intend goes into `Superblock.slot`."""

    def __init__(self, slots: memoryview, operations: Operations) -> None:
        """slots: writable, of the record; what the processes before this one have left there is still to be used."""
        self._operations = operations
        fs = operations.fs
        every = newest_first(slots, fs.handles)
        own = every.pop()
        own.begin(every[0].sequence + 1, every[0].counts() if every[0].sequence else (0, 0, 0, 0))
        # A number that was noted may have been given: nobody else gets it before that request is here again (`_close`).
        fs.handles.next = max(fs.handles.next, *(slot.read_intent()[0] + 1 for slot in every))
        self._slots = [own, *every]
        """Newest first. More processes than there are slots do not die of one request (poison.py)."""
        self.own = own
        self.result = own.result
        fs.sb.notes, fs.sb.slot = self, own

    # -- before and after an operation ------------------------------------------------------------

    def perform(
        self, rule: Rule, unique: Unique, operation: Callable[..., object], arguments: tuple[Any, ...]
    ) -> object:
        """The result of an operation, performed now or before. Raises what it raises; Answered."""
        self.own.unique = unique
        if unique >= RESENT:
            try:
                return self._again(rule, unique, arguments)
            except _Perform:
                pass
        if rule.opens:
            self.own.intend()
        return operation(self._operations, *arguments)

    def resume(self, unique: Unique) -> None:
        """What is done next belongs to this request, which has waited."""
        self.own.words[CURRENT] = self.own.unique = unique

    # -- a request that is sent again ---------------------------------------------------------------

    def _again(self, rule: Rule, unique: int, arguments: tuple[Any, ...]) -> object:
        """Raises _Perform unless it was done."""
        for slot in self._slots:
            if slot.answered | RESENT == unique:
                self.own.count(ANSWERED)
                raise Answered(*slot.read_result())
            if slot.intended | RESENT == unique:
                noted = Noted(*slot.read_intent())
                break
        else:
            raise _Perform
        self.own.count(DECIDED)
        _close(self._operations.fs, noted.handle)
        result = rule.done(self._operations, noted, *arguments)
        self.own.noted = unique
        return result

    # -- copies -------------------------------------------------------------------------------------

    def publish(
        self, node: Node, parent: Dir | None, name: bytes, branch: Branch, made: os.stat_result, as_link: bool,
        names: int, links: int,
    ) -> None:  # fmt: skip
        above = 0 if parent is None else parent.id
        said = made.st_dev, made.st_ino, branch.index, above, as_link, max(names, 0), links
        self.own.copy(node.id, name, said)
        if as_link:  # it is what LINK does
            self.own.intend(2, made.st_dev, made.st_ino)

    def settle(self) -> None:
        """Before the first request: go on with copies whose publication a process did not survive."""
        fs = self._operations.fs
        for slot in self._slots:
            number, name, (dev, ino, index, above, as_link, names, links) = slot.read_copy()
            node = fs.table.find(number)
            if node is None:
                continue
            parent = fs.table.find(above)
            if index >= len(fs.sb.branches) or (above and type(parent) is not Dir):
                continue
            if fs.sb.branches[index].offline:
                continue  # the next process will, with the branch
            try:
                settle.settle(
                    fs.sb, node, parent if type(parent) is Dir else None, name, fs.sb.branches[index],
                    (dev, ino), as_link != 0, names, links,
                )  # fmt: skip
            except OSError as error:
                log.error("cannot go on with the copy-up of %r: %s", name, error.strerror)


def copies(slots: memoryview) -> dict[int, Identity]:
    """Of nodes, by id, copies that were being published when the process of these slots was killed, or before."""
    found: dict[int, Identity] = {}
    for slot in reversed(newest_first(slots)):
        node, _, said = slot.read_copy()
        found[node] = said[0], said[1]
    return found


def newest_first(slots: memoryview, handles: HandleTable | None = None) -> list[Slot]:
    """All slots; handles: of which the next one's number is noted, where something is to be noted."""
    known = HandleTable() if handles is None else handles  # one that is empty is false
    every = [Slot(slots[at : at + SLOT], known) for at in range(0, len(slots) - SLOT + 1, SLOT)]
    return sorted(every, key=lambda slot: slot.sequence, reverse=True)


def _close(fs: UnionFs, handle: int) -> None:
    """A handle that was given for this request is known to nobody: it gets another one."""
    if handle in fs.handles.files or handle in fs.handles.lost:
        fs.release(handle)
    elif handle in fs.handles.dirs:
        fs.releasedir(handle)


# -- what is on the branches ------------------------------------------------------------------------


def _directory(fs: UnionFs, number: int) -> Dir:
    """A directory, as the branches have it now. Raises ESTALE; _Perform where it is gone, to have that said."""
    node = fs.table.directory(number)
    try:
        lookup.ask_again(fs.sb, node)
    except FileNotFoundError:
        raise _Perform from None
    return node


def _who(found: Found) -> Identity:
    return found.st.st_dev, found.st.st_ino


def _on(fs: UnionFs, parent: Dir, name: bytes, branch: Branch) -> Identity | None:
    """Who has a name on one branch."""
    layer = parent.layer(branch.index)
    if layer is None:
        return None
    try:
        st = syscalls.stat_at(fs.sb.layer_fd(parent, layer), name)
    except OSError as error:
        if error.errno not in ABSENT:
            raise
        return None
    return st.st_dev, st.st_ino


def _status(dev: int, ino: int, links: int) -> os.stat_result:
    """What is left to know of an object that is gone."""
    return os.stat_result((0, ino, dev, links, 0, 0, 0, 0, 0, 0))


def _is_new(fs: UnionFs, parent: Dir, name: bytes, found: Found, kind: int, caller: Caller) -> bool:
    """Whether an object looks as if it had just been made for `caller`: the name was free before."""
    st = found.st
    if found.kind != kind or not found.branch.writable or (fs.creds.privileged and st.st_uid != caller.uid):
        return False
    if kind == st_mod.S_IFREG:
        return st.st_size == 0 and st.st_nlink == 1
    if kind != st_mod.S_IFDIR:
        return st.st_nlink == 1
    fd = syscalls.open_listing_at(fs.sb.branch_fd(parent, found.branch), name)
    try:
        return set(map(os.fsencode, os.listdir(fd))) <= {whiteout.OPAQUE}
    finally:
        os.close(fd)


# -- the rules: arguments are those of the operations, and so are results -----------------------------


def _made(
    operations: Operations, number: int, name: bytes, kind: int, caller: Caller, alike: Callable[[int], bool]
) -> tuple[Node, os.stat_result]:
    """What was made is there, looks new, and is as it was to be: then only a whiteout and marks are left.

    alike: by a descriptor (O_PATH) of it.
    """
    fs = operations.fs
    parent = _directory(fs, number)
    found = resolve.resolve(fs.sb, parent, name)
    if found.answer is not FOUND:
        raise _Perform
    ours = False
    try:
        if _is_new(fs, parent, name, found, kind, caller):
            fd = syscalls.pin_at(fs.sb.branch_fd(parent, found.branch), name)
            try:
                ours = alike(fd)
            finally:
                os.close(fd)
    finally:
        if not ours:
            resolve.discard(fs.sb, parent, name, found)
    if not ours:
        raise _Perform  # which says EEXIST
    return create.finish(fs.sb, parent, name, found)


def _mknod(
    operations: Operations, noted: Noted, parent: int, name: bytes, mode: int, rdev: int, caller: Caller
) -> Entry:
    made = _made(
        operations, parent, name, st_mod.S_IFMT(mode) or st_mod.S_IFREG, caller,
        lambda fd: (not st_mod.S_ISCHR(mode) and not st_mod.S_ISBLK(mode)) or os.fstat(fd).st_rdev == rdev,
    )  # fmt: skip
    return operations.entry(parent, made)


def _mkdir(operations: Operations, noted: Noted, parent: int, name: bytes, mode: int, caller: Caller) -> Entry:
    return operations.entry(parent, _made(operations, parent, name, st_mod.S_IFDIR, caller, lambda fd: True))


def _symlink(operations: Operations, noted: Noted, parent: int, name: bytes, target: bytes, caller: Caller) -> Entry:
    made = _made(
        operations, parent, name, st_mod.S_IFLNK, caller, lambda fd: syscalls.readlink_fd(fd) == target
    )  # fmt: skip
    return operations.entry(parent, made)


def _create(
    operations: Operations, noted: Noted, parent: int, name: bytes, flags: int, mode: int, caller: Caller
) -> tuple[Entry, Opened]:
    fs = operations.fs
    node, _ = _made(operations, parent, name, st_mod.S_IFREG, caller, lambda fd: True)
    opening = flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_DIRECT)
    try:
        if noted.words:
            raise PermissionError
        handle, st = fs.open(node.id, opening, caller)
    except PermissionError:
        handle, st = _open_own(fs, noted, node, (_directory(fs, parent), name), opening, caller)
    return operations.created(parent, flags, handle, st)


def _open_own(
    fs: UnionFs, noted: Noted, node: Node, place: tuple[Dir, bytes], flags: int, caller: Caller
) -> tuple[OpenFile, os.stat_result]:
    """A file whose mode does not let its owner open it as whoever makes it may, where we have no CAP_DAC_OVERRIDE. Its
    mode is noted while it has another one."""
    parent, name = place
    dirfd = fs.sb.branch_fd(parent, node.branch)
    mode = noted.words[0] if noted.words else st_mod.S_IMODE(syscalls.stat_at(dirfd, name).st_mode)
    assert fs.sb.slot is not None
    fs.sb.slot.intend(1, mode)
    syscalls.chmod_at(dirfd, name, mode | st_mod.S_IRUSR | st_mod.S_IWUSR)
    try:
        handle, _ = fs.open(node.id, flags, caller)
    finally:
        syscalls.chmod_at(dirfd, name, mode)
    return handle, os.fstat(handle.fd)


def _link(operations: Operations, noted: Noted, number: int, directory: int, name: bytes) -> Entry:
    """The name leads to what it was to lead to: the file, or the copy that was made for it (noted)."""
    fs = operations.fs
    parent, node = _directory(fs, directory), fs.table.node(number)
    found = resolve.resolve(fs.sb, parent, name)
    if found.answer is not FOUND:
        raise _Perform
    if _who(found) != noted.words or node.identity != noted.words:
        resolve.discard(fs.sb, parent, name, found)
        raise _Perform
    return operations.entry(directory, (node, create.finish_link(fs.sb, node, parent, name)))


def _unlink(operations: Operations, noted: Noted, number: int, name: bytes) -> None:
    """The name is gone, or another object has it. An inode number may have come round: it is the same object when it
    was not changed since (noted: ctime), or was born before that."""
    fs = operations.fs
    dev, ino, ctime, links, was_lower = noted.words
    parent = _directory(fs, number)
    node = parent.children.get(name) or fs.table.find(fs.sb.inomap.number(dev, ino))
    found = resolve.resolve(fs.sb, parent, name)
    if found.answer is FOUND:
        if _who(found) == (dev, ino):
            if found.st.st_ctime_ns & U64 == ctime:
                raise _Perform
            born = syscalls.birth_ns(fs.sb.branch_fd(parent, found.branch), name, ino)
            if 0 < born <= ctime:
                raise _Perform
        elif node is not None and node.identity == _who(found):
            node = None
        resolve.discard(fs.sb, parent, name, found)
    remove.settle(fs.sb, parent, name)
    remove.unlinked_from(fs.sb, parent, name, node, _status(dev, ino, links), was_lower != 0, None, True)


def _rmdir(operations: Operations, noted: Noted, number: int, name: bytes) -> None:
    """The name is gone, or another object has it: what the directory had on branches below stays hidden either way.
    While it was out of sight something may have been put into it."""
    fs = operations.fs
    parent = _directory(fs, number)
    found = resolve.resolve(fs.sb, parent, name)
    if found.answer is FOUND:
        layers = [layer.identity for layer in found.layers or ()]
        resolve.discard(fs.sb, parent, name, found)
        if noted.words in layers:
            raise _Perform
    dev, ino = noted.words
    if remove.restore(fs.sb, parent, name, (dev, ino)):
        raise os_error(errno.ENOTEMPTY)
    remove.settle(fs.sb, parent, name)
    dev, ino = noted.words
    node = parent.children.get(name) or fs.table.find(fs.sb.inomap.number(dev, ino))
    if type(node) is Dir and noted.words in [layer.identity for layer in node.layers]:
        fs.sb.changes.removed(parent, name, node, None, True)


def _rename(operations: Operations, noted: Noted, src_id: int, src: bytes, dst_id: int, dst: bytes, flags: int) -> None:
    """What had the old name has the new one (exchange: or the other way round). It was not done while either has its
    own. Else somebody has changed both since, or one that was changed: they stay as they are."""
    fs = operations.fs
    index, *rest = noted.words
    if index >= len(fs.sb.branches):
        raise _Perform
    branch = fs.sb.branches[index]
    source, target = (rest[0], rest[1]), (rest[2], rest[3])
    src_dir, dst_dir = _directory(fs, src_id), _directory(fs, dst_id)
    at_src, at_dst = _on(fs, src_dir, src, branch), _on(fs, dst_dir, dst, branch)
    if flags & syscalls.RENAME_EXCHANGE:
        if at_src == target or at_dst == source:
            rename.finish_exchange(fs.sb, src_dir, src, dst_dir, dst)
        elif at_src == source or at_dst == target:
            raise _Perform
        return
    if at_dst == source:
        node = src_dir.children.get(src) or fs.table.find(fs.sb.inomap.number(source[0], source[1]))
        old = _status(*target, rest[4]) if rest[3] else None
        rename.finish(fs.sb, src_dir, src, node, dst_dir, dst, branch, old)
    elif at_src == source or (at_src is None and at_dst == target):
        # The number of a target that was replaced may be another one's: not with a source that is not ours.
        raise _Perform


def _was_cut(noted: Noted, st: os.stat_result) -> bool:
    """noted: mtime and size before. Whether a file was truncated since, or written to by others."""
    return (st.st_mtime_ns & U64, st.st_size) != noted.words


def _setattr(
    operations: Operations, noted: Noted, number: int, changes: SetAttr, fh: int | None, caller: Caller
) -> Attributes:
    """Only a size counts: all else may be set twice, and is."""
    fs = operations.fs
    if not _was_cut(noted, fs.sb.stat(fs.table.node(number))):
        raise _Perform
    return operations.setattr(number, changes.without_size(), fh, caller)


def _open(operations: Operations, noted: Noted, number: int, flags: int, caller: Caller) -> Opened:
    """noted: only a handle, until the file is truncated."""
    fs = operations.fs
    if not noted.words or not _was_cut(noted, fs.sb.stat(fs.table.node(number))):
        raise _Perform
    return operations.open(number, flags & ~os.O_TRUNC, caller)


def _write(operations: Operations, noted: Noted, fh: int, offset: int, data: bytes | memoryview, *flags: int) -> int:
    """noted: size before an append. What is behind it may be ours, or the beginning of it when the process was killed
    within the system call; others may have appended, too."""
    fs = operations.fs
    handle = fs.handles.file(fh)
    (before,) = noted.words
    size = os.fstat(handle.fd).st_size
    if size <= before:
        raise _Perform
    with syscalls.readable(handle.fd) as fd:
        behind = os.pread(fd, min(size - before, 2 * len(data)), before)
    whole = bytes(data)
    if whole in behind:
        done = len(whole)
    elif whole.startswith(behind):
        done = len(behind)
    else:
        raise _Perform
    if done < len(whole):
        fs.write_kept(fh, offset, whole[done:], *flags or (0,))
    else:
        fs.sb.changes.before_data(handle.node, handle.fd)
        fs.sb.changes.data(handle.node, True, None, handle.fd)
    return len(whole)


def _attribute(fs: UnionFs, number: int, key: bytes) -> bytes | None:
    try:
        return fs.getxattr(number, key)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        return None


def _setxattr(
    operations: Operations, noted: Noted, number: int, key: bytes, value: bytes, caller: Caller, flags: int, kill: bool
) -> None:
    """noted, with XATTR_CREATE: whether it was there. All else may be done twice."""
    if noted.words[0] or _attribute(operations.fs, number, key) != value:
        raise _Perform
    operations.setxattr(number, key, value, caller, 0, kill)


def _removexattr(operations: Operations, noted: Noted, number: int, key: bytes, caller: Caller) -> None:
    """noted: whether it was there."""
    fs = operations.fs
    if not noted.words[0] or _attribute(fs, number, key) is not None:
        raise _Perform
    fs.sb.changes.data(fs.table.node(number))


def _anew(operations: Operations, noted: Noted, *arguments: object) -> None:
    """Nothing but a handle was given."""
    raise _Perform


class Rule(NamedTuple):
    """done: what is left of an operation that was done, and its result; raises _Perform when it was not. opens: it
    gives a handle, which is noted before all else."""

    done: Callable[..., Any]
    opens: bool = False


RULES: Final[dict[int, Rule]] = {
    wire.MKNOD: Rule(_mknod),
    wire.MKDIR: Rule(_mkdir),
    wire.SYMLINK: Rule(_symlink),
    wire.CREATE: Rule(_create, opens=True),
    wire.TMPFILE: Rule(_anew, opens=True),
    wire.LINK: Rule(_link),
    wire.UNLINK: Rule(_unlink),
    wire.RMDIR: Rule(_rmdir),
    wire.RENAME: Rule(_rename),
    wire.RENAME2: Rule(_rename),
    wire.SETATTR: Rule(_setattr),
    wire.OPEN: Rule(_open, opens=True),
    wire.OPENDIR: Rule(_anew, opens=True),
    wire.WRITE: Rule(_write),
    wire.SETXATTR: Rule(_setxattr),
    wire.REMOVEXATTR: Rule(_removexattr),
}
REPEATED: Final = frozenset(
    {
        wire.FALLOCATE, wire.COPY_FILE_RANGE, wire.COPY_FILE_RANGE_64,
        wire.RELEASE, wire.RELEASEDIR, wire.FLUSH, wire.FSYNC, wire.FSYNCDIR,
    }
)  # fmt: skip
"""What changes something and may be done twice: zeros, holes and copies at given offsets (the kernel asks for no
FALLOC_FL_COLLAPSE_RANGE or FALLOC_FL_INSERT_RANGE, fuse_file_fallocate()); closing, whose EBADF nobody is told."""
