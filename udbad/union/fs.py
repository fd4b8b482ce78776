"""One synchronous method per file system operation; the facade that edge/operations.py calls.

Locking: there is none. An operation is atomic because nothing else runs on the event loop until it
returns; no method awaits, and only `copyup.transfer` runs in another thread, on descriptors of its
own. An operation that needs a copy-up first raises NeedCopyUp before it has changed anything and is
started again afterwards.

Methods take node ids, bytes and Caller, return nodes with their os.stat_result, and raise OSError.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, Literal, TypeVar

from udbad.branch import datacalls, state, syscalls, whiteout
from udbad.branch.credentials import Credentials, sgid_group
from udbad.branch.syscalls import fstat, unpin
from udbad.errors import REPLACED, eio, erofs, estale, os_error
from udbad.inodes.handles import ID_BITS, OpenDir, OpenFile, backing_id, note_id_bits
from udbad.inodes.node import Dir, Node
from udbad.inodes.slot import U64
from udbad.types import Caller, Trigger
from udbad.union import copyup, create, lookup, ranges, readdir, remove, rename, resolve
from udbad.union.held import HeldWalks
from udbad.union.kept import KeptFiles
from udbad.union.readdir import Name, Run
from udbad.union.superblock import NeedCopyUp, Superblock, is_object
from udbad.union.xattrs import Xattrs

T = TypeVar("T")
_ATTR, _TRUNCATE, _XATTR = Trigger.ATTR, Trigger.TRUNCATE, Trigger.XATTR
Attributes = tuple[Node, os.stat_result]
Number = int

_OPEN_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_NOATIME
COPYING = frozenset({"coo_reg", "coo_all", "moo"})
"""Attributes of branches whose files are copied up when they are opened."""
_ATTEMPTS = 8
"""To hold what a name stands for, while somebody replaces it all the time."""

NOW: Final = "now"
"""As a time: what the branch's own clock says, as UTIME_NOW of utimensat(2). Ours may be ahead of it, so that a file
stamped with it looks newer than one that is written to afterwards."""
Time = int | Literal["now"]


class SetAttr:
    """What setattr changes; None leaves it. Times in nanoseconds or NOW, size in bytes."""

    __slots__ = ("atime_ns", "gid", "mode", "mtime_ns", "size", "uid")

    def __init__(
        self,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: Time | None = None,
        mtime_ns: Time | None = None,
    ) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.size = size
        self.atime_ns = atime_ns
        self.mtime_ns = mtime_ns

    def without_size(self) -> SetAttr:
        """The rest of what it changes."""
        return SetAttr(self.mode, self.uid, self.gid, None, self.atime_ns, self.mtime_ns)


def _note_privileges(handle: OpenFile, st: os.stat_result, caller: Caller) -> None:
    """What a write through this handle may take away from the file, and what keeps it."""
    if st.st_mode & ID_BITS:
        handle.group = sgid_group(caller, st)
        handle.id_bits = st.st_mode & ID_BITS


class UnionFs:
    """The union of one mount."""

    def __init__(self, sb: Superblock, creds: Credentials) -> None:
        self.sb = sb
        self.creds = creds
        self.table = sb.table
        self.handles = sb.handles
        self.walks = HeldWalks(sb)
        self.xattrs = Xattrs(sb)
        self.on_unused_backing: Callable[[int], None] = lambda number: None
        """The last open file with this backing id was closed; replaced by who gives them out."""
        self.kept: KeptFiles | None = None
        """The open files of io=cached; None: the kernel tells of each open(2)."""

    def keep_files(self, most: int) -> None:
        """The kernel opens files by itself (kept.py). most: how many of them to keep open."""
        self.kept = KeptFiles(self.sb, most, self._open_fd)
        self.sb.kernel_opens = True

    # -- names --------------------------------------------------------------------------------

    def lookup(self, parent_id: Number, name: bytes) -> Attributes | None:
        """Node and attributes of a name; None when it does not exist. EPERM for .wh.*, ENAMETOOLONG."""
        parent = self.table.find(parent_id)
        if type(parent) is not Dir:
            raise estale()
        if name.startswith(b".wh."):
            if not self.sb.options.show_whiteouts:
                raise os_error(errno.EPERM)
            return readdir.show_whiteout(self.sb, parent, name)
        found = lookup.lookup(self.sb, parent, name)
        if found is None and len(name) > whiteout.NAME_MAX:  # some file systems have such names
            raise os_error(errno.ENAMETOOLONG)
        return found

    def look_again(self, pid: int, parent_id: int, name: bytes, found: Attributes | None) -> Attributes | None:
        """`lookup` for a process that may be walking a path again (held.py); found: what it has just found."""
        parent = self.table.find(parent_id)
        for _ in range(_ATTEMPTS):
            if found is None or type(parent) is not Dir:
                break
            held = self.walks.hold(pid, parent, name, found)
            if held is not None:
                return held
            found = self.lookup(parent_id, name)
        return found

    def create(
        self, parent_id: int, name: bytes, flags: int, mode: int, caller: Caller
    ) -> tuple[OpenFile, os.stat_result]:
        """Make a file and open it; EEXIST with O_EXCL.

        Without, what has appeared under the name is to be opened by the same rules, permissions among them, as anything
        else: by the kernel, which looks it up again after ESTALE (LOOKUP_REVAL, do_filp_open in fs/namei.c).
        """
        parent = self._changing(parent_id)
        kept = self.kept
        wanted = ((flags & _OPEN_FLAGS) if kept is None else os.O_RDWR) | (os.O_TRUNC & flags)
        try:
            node, st, fd = create.create_file(self.sb, self.creds, parent, name, wanted, mode, caller)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            raise estale() from None
        if kept is not None:
            return kept.created(node, fd, st), st
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        handle = self.handles.add_file(node, fd, flags & _OPEN_FLAGS, caller, writable)
        _note_privileges(handle, st, caller)
        return handle, st

    def tmpfile(self, parent_id: int, flags: int, mode: int, caller: Caller) -> tuple[OpenFile, os.stat_result]:
        """Make and open a file without a name, which `link` can give one. EOPNOTSUPP where its branch has no such."""
        wanted = flags & _OPEN_FLAGS
        node, st, fd = create.tmpfile(self.sb, self.creds, self._changing(parent_id), wanted, mode, caller)
        handle = self.handles.add_file(node, fd, wanted, caller, True)
        _note_privileges(handle, st, caller)
        return handle, st

    def mknod(self, parent_id: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attributes:
        return create.mknod(self.sb, self.creds, self._changing(parent_id), name, mode, rdev, caller)

    def mkdir(self, parent_id: int, name: bytes, mode: int, caller: Caller) -> Attributes:
        return create.mkdir(self.sb, self.creds, self._changing(parent_id), name, mode, caller)

    def symlink(self, parent_id: int, name: bytes, target: bytes, caller: Caller) -> Attributes:
        return create.symlink(self.sb, self.creds, self._changing(parent_id), name, target, caller)

    def link(self, node_id: int, parent_id: int, name: bytes) -> Attributes:
        parent = self._changing(parent_id)
        node = self.table.node(node_id)
        return node, create.link(self.sb, node, parent, name)

    def unlink(self, parent_id: int, name: bytes) -> None:
        parent = self._changing(parent_id)
        if self.kept is not None:
            self.kept.hold(parent.children.get(name))
        remove.unlink(self.sb, parent, name)

    def rmdir(self, parent_id: int, name: bytes) -> None:
        remove.rmdir(self.sb, self._changing(parent_id), name)

    def removed_later(self, parent_id: int) -> None:
        """What a removal in this directory had left for the background is done: the directory has changed again."""
        node = self.table.find(parent_id)
        if type(node) is Dir and not node.dead:
            self.sb.count_links(node)
            self.sb.changes.attributes(node)

    def rename(self, src_id: int, src: bytes, dst_id: int, dst: bytes, flags: int) -> None:
        src_dir, dst_dir = self._changing(src_id), self._changing(dst_id)
        if self.kept is not None:
            self.kept.hold(dst_dir.children.get(dst))
        rename.rename(self.sb, src_dir, src, dst_dir, dst, flags)

    def _changing(self, parent_id: int) -> Dir:
        if self.sb.options.read_only:
            raise erofs()
        return self.table.directory(parent_id)

    # -- attributes ---------------------------------------------------------------------------

    def getattr(self, node_id: Number) -> Attributes:
        node = self.table.node(node_id)
        if type(node) is Dir and not node.trusted and not node.dead:
            self._refresh_if_there(node)
        return node, self.sb.stat(node)

    def birth_ns(self, node: Node) -> int:
        """When the object behind a node was made, ns since the epoch; 0 where its branch does not tell.

        A copy-up is a birth, too, as on overlayfs: what was born is the object that the attributes are of.
        """
        fd = self.sb.held_fd(node)
        dirfd, name = (fd, b"") if fd >= 0 else self.sb.locate(node)
        return syscalls.birth_ns(dirfd, name, node.ino)

    def _refresh_if_there(self, node: Dir) -> None:
        """Bring an untrusted directory up to date, unless it is gone: then the descriptor serves, as natively.

        A name that was a directory a moment ago, when the kernel looked it up, may be another object by now, but
        it need not have been missing in between: ENOENT would be wrong. Raises ESTALE without a descriptor, which
        has the kernel look the path up again.
        """
        try:
            lookup.refresh(self.sb, node)
        except FileNotFoundError:
            if node.layers[0].fd < 0:
                raise estale() from None

    def setattr(self, node_id: Number, changes: SetAttr, fh: Number | None, caller: Caller) -> Attributes:
        """chmod, chown, truncate, utimens in one. Raises NeedCopyUp on a branch that is not writable."""
        node = self.table.node(node_id)
        sb = self.sb
        if sb.options.read_only:
            raise erofs()
        size, times = changes.size, changes.atime_ns is not None or changes.mtime_ns is not None
        if size is None and node.kind == st_mod.S_IFREG and not node.branch.writable:
            need = NeedCopyUp(node, _ATTR)
            need.prepare = partial(self._set_attributes, changes, caller)
            need.then = partial(self._attributes_set, node, changes)
            raise need
        self.need_writable(node, _ATTR if size is None else _TRUNCATE, size)
        fd, owned = sb.open_object(node)
        try:
            if times or size is not None:
                sb.changes.before_data(node, fd)
            if size is not None:
                self._truncate(node, fd, size, fh, caller)
            self._set_attributes(changes, caller, fd)
            st = fstat(fd)
            sb.changes.data(node, times or size is not None, st, fd, changes.mtime_ns is not None)
            if node.handles:
                note_id_bits(node, st)
            return node, st
        finally:
            if owned:
                unpin(fd)

    def _set_attributes(self, changes: SetAttr, caller: Caller, fd: Number) -> None:
        """All but the size, of the object behind `fd`."""
        if changes.uid is not None or changes.gid is not None:
            self._chown(fd, changes, caller)
        if changes.mode is not None:
            syscalls.chmod_fd(fd, changes.mode & 0o7777)
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            syscalls.utime_fd(fd, changes.atime_ns, changes.mtime_ns)

    def _attributes_set(self, node: Node, changes: SetAttr) -> Attributes:
        """The end of a `setattr` that was made to the copy of a file."""
        st = self.sb.stat(node)
        mtime = changes.mtime_ns is not None
        self.sb.changes.data(node, mtime or changes.atime_ns is not None, st, -1, mtime)
        if node.handles:
            note_id_bits(node, st)
        return node, st

    @staticmethod
    def _chown(fd: int, changes: SetAttr, caller: Caller) -> None:
        """chown drops suid and sgid by itself, but for the setgid bit without group execution, which goes
        unless the caller is in the group (setattr_should_drop_sgid)."""
        st = None if caller.uid == 0 else os.fstat(fd)
        syscalls.chown_fd(fd, -1 if changes.uid is None else changes.uid, -1 if changes.gid is None else changes.gid)
        if st is None:
            return
        odd = st_mod.S_ISREG(st.st_mode) and st.st_mode & 0o2010 == 0o2000
        if odd and caller.gid != st.st_gid and sgid_group(caller, st) is None:
            syscalls.chmod_fd(fd, st_mod.S_IMODE(os.fstat(fd).st_mode) & ~st_mod.S_ISGID)

    def _truncate(self, node: Node, fd: int, size: int, fh: int | None, caller: Caller) -> None:
        handle = None if fh is None else self.handles.files.get(fh)
        if handle is not None and handle.writable:
            fd = handle.fd
        self._cut(fd, size, caller, os.fstat(fd))

    def _cut(self, fd: int, size: int, caller: Caller, st: os.stat_result) -> None:
        """ftruncate(2) as the caller, so that suid and sgid go as they do natively.

        Opened by ourselves: that the caller may write was decided by the kernel, who knows all of the caller's groups.
        """
        with syscalls.writable(fd) as target, self.creds.writing(caller.uid, caller.gid, sgid_group(caller, st)):
            if self.sb.slot is not None:
                self.sb.slot.intend(2, st.st_mtime_ns & U64, st.st_size)
            os.ftruncate(target, size)

    def need_writable(self, node: Node, trigger: Trigger, length: Number | None = None) -> None:
        """Raises NeedCopyUp unless the node's data is on a writable branch (or in an unnamed copy)."""
        if type(node) is Dir:
            if not node.trusted and not node.dead:
                lookup.refresh(self.sb, node)
            resolve.check_top(node, node.branch.index)
            if not node.branch.writable:
                raise NeedCopyUp(node, trigger)
        elif not node.branch.writable:
            raise NeedCopyUp(node, trigger, length)

    def readlink(self, node_id: int) -> bytes:
        """Target of a symbolic link. Raises EINVAL for anything else (readlink(2) says ENOENT of a descriptor)."""
        node = self.table.node(node_id)
        if node.kind != st_mod.S_IFLNK:
            raise os_error(errno.EINVAL)
        fd, owned = self.sb.open_object(node)
        try:
            st = syscalls.fstat(fd)
            target = syscalls.readlink_fd(fd)
            node.seen = (0 if state.is_racy(node.branch, st) else st.st_ctime_ns, target)
            return target
        finally:
            if owned:
                os.close(fd)

    # -- extended attributes ------------------------------------------------------------------

    def find_xattr(self, node_id: Number, key: bytes) -> bytes | None:
        """`getxattr`; None for ENODATA, which most are told."""
        return self.xattrs.find(self.table.node(node_id), key)

    def getxattr(self, node_id: int, key: bytes) -> bytes:
        value = self.find_xattr(node_id, key)
        if value is None:
            raise os_error(errno.ENODATA)
        return value

    def listxattr(self, node_id: int, caller: Caller) -> list[bytes]:
        return self.xattrs.names(self.table.node(node_id), caller)

    def setxattr(
        self, node_id: int, key: bytes, value: bytes, caller: Caller, flags: int = 0, kill_sgid: bool = False
    ) -> None:
        """flags: XATTR_CREATE (EEXIST), XATTR_REPLACE (ENODATA). kill_sgid: the caller is neither in the file's group
        nor privileged, so that an ACL costs the setgid bit (posix_acl_update_mode)."""
        self.xattrs.check_changing(key, caller)
        self.xattrs.set(self._changing_xattr(node_id), key, value, flags, kill_sgid)

    def removexattr(self, node_id: int, key: bytes, caller: Caller) -> None:
        self.xattrs.check_changing(key, caller)
        self.xattrs.remove(self._changing_xattr(node_id), key)

    def _changing_xattr(self, node_id: int) -> Node:
        node = self.table.node(node_id)
        if self.sb.options.read_only:
            raise erofs()
        self.need_writable(node, _XATTR)
        return node

    # -- files --------------------------------------------------------------------------------

    def open(self, node_id: int, flags: int, caller: Caller) -> tuple[OpenFile, os.stat_result]:
        """Open a regular file; a lower one read-only until it is written to (semantics 6.8)."""
        node = self.table.node(node_id)
        if flags & os.O_DIRECT and not self.sb.options.direct_io:
            raise os_error(errno.EINVAL)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        truncating = flags & os.O_TRUNC != 0  # with O_RDONLY, too: the kernel asks for permission to write then
        if (writing or truncating) and self.sb.options.read_only:
            raise erofs()
        branch = node.branch
        if branch.attrs and not node.dead:
            self._copy_on_open(node)
        wanted = flags & _OPEN_FLAGS
        writable = writing
        if not branch.writable and (writing or truncating) and node.orphan_fd < 0:
            if truncating:
                raise NeedCopyUp(node, Trigger.TRUNCATE, 0)
            if not self.sb.branches.writable_above(branch.index):
                raise self.sb.branches.refusal()
            if backing_id(node):
                raise os_error(errno.EBUSY)  # since the branch, or the mount, was made another one
            wanted = wanted & ~(os.O_ACCMODE | os.O_APPEND) | os.O_RDONLY
            writable = False
        fd, st = self._open_fd(node, wanted)
        try:
            if truncating:
                self.sb.changes.before_data(node, fd)
                self._cut(fd, 0, caller, st)
                before, st = st, syscalls.fstat(fd)
                self.sb.changes.data(node, True, st, fd)
                if (before.st_mode ^ st.st_mode) & ID_BITS:
                    ranges.id_bits_went(self.sb, node, st)
            handle = self.handles.add_file(node, fd, flags & _OPEN_FLAGS, caller, writable)
            if writing:
                _note_privileges(handle, st, caller)
            return handle, st
        except BaseException:
            datacalls.close_quietly(fd)
            raise

    def _copy_on_open(self, node: Node) -> None:
        """coo_reg, coo_all, moo: every open copies up, to the nearest writable branch above (semantics 3)."""
        if node.branch.attrs & COPYING and self.sb.branches.writable_above(node.branch.index):
            raise NeedCopyUp(node, Trigger.OPEN)

    def _open_fd(self, node: Node, flags: int) -> tuple[int, os.stat_result]:
        if node.orphan_fd >= 0:
            fd = syscalls.reopen(node.orphan_fd, flags)
            return fd, os.fstat(fd)
        while True:
            try:
                dirfd, name = self.sb.locate(node)
                fd, st = syscalls.open_file_at(dirfd, name, flags)
            except OSError as error:
                if error.errno not in REPLACED:
                    raise
            else:
                if is_object(node, st):
                    return fd, st
                datacalls.close_quietly(fd)
            held = self.sb.held_fd(node)
            if held >= 0:
                fd = syscalls.reopen(held, flags)
                return fd, os.fstat(fd)
            self.sb.lost_name(node)

    def write(self, fh: int, offset: int, data: bytes | memoryview) -> int:
        """Bytes written. Raises NeedCopyUp at the first write to a lower file."""
        handle = self.handles.file(fh)
        if not handle.writable:
            ranges.require_writable(handle)
        changes = self.sb.changes
        changes.before_data(handle.node, handle.fd)
        if handle.flags & os.O_APPEND and self.sb.slot is not None:
            self.sb.slot.intend(1, syscalls.fstat(handle.fd).st_size)
        if handle.uid:
            with self.creds.writing(handle.uid, handle.gid, handle.group):
                count = os.pwrite(handle.fd, data, offset)
        else:
            count = os.pwrite(handle.fd, data, offset)
        changes.data(handle.node, True, None, handle.fd)
        if handle.id_bits:
            ranges.look_at_id_bits(self.sb, handle)
        return count

    def write_kept(self, fh: int, offset: int, data: bytes | memoryview, flags: int) -> int:
        """`write`, perhaps to a kept file. flags: of the open(2) that the kernel has not told of."""
        if fh >= 0 or self.kept is None:
            return self.write(fh, offset, data)
        return self.kept.write(self.creds, self.handles.file(fh), offset, data, flags)

    def fallocate(self, fh: int, mode: int, offset: int, length: int) -> ranges.Change:
        """To be run in a thread, then given to `changed` (ranges.py). mode: FALLOC_FL_*; offset, length: bytes."""
        handle = self.handles.file(fh)
        change = ranges.fallocate(self.sb, self.creds, handle, mode, offset, length)
        self._begin(change, handle)
        return change

    def copy_file_range(self, fh_in: int, offset_in: int, fh_out: int, offset_out: int, length: int) -> ranges.Change:
        """To be run in a thread, then given to `changed` (ranges.py). offsets, length: bytes."""
        source, target = self.handles.file(fh_in), self.handles.file(fh_out)
        change = ranges.copy(self.sb, self.creds, source, offset_in, target, offset_out, length)
        self._begin(change, source, target)
        return change

    def _begin(self, change: ranges.Change, *handles: OpenFile) -> None:
        """A thread uses the descriptors, until `changed`."""
        if self.kept is not None:
            self.kept.begin(change, [handle for handle in handles if handle.fh < 0])

    def changed(self, change: ranges.Change, failed: bool) -> None:
        """A change was run; failed: it raised."""
        if self.kept is not None:
            self.kept.end(change)
        ranges.end(self.sb, change, failed)

    def needs_flush(self, flags: int) -> bool:
        """Whether close(2) of a file opened with `flags` has to be asked about (FLUSH).

        Who wrote may have an error to be told, on a branch of that kind. Who can map the file shared always is: in
        FLUSH the kernel writes what is dirty of the mappings, and tells how that went (fuse_flush).
        """
        access = flags & os.O_ACCMODE
        return access == os.O_RDWR or (access == os.O_WRONLY and self.sb.branches.close_may_fail)

    def flush(self, fh: int) -> int | None:
        """The descriptor to ask what close(2) would say, in a thread (datacalls.flush); None: nothing can be wrong."""
        handle = self.handles.file(fh)
        return handle.fd if handle.writable and not handle.node.branch.local else None

    def stays(self, node: Node, st: os.stat_result) -> bool:
        """Whether a file's data stays where it is while it is open, and may be written without us: no copy-up can
        become due for a write, close(2) has no error to tell, and no setuid or setgid bit goes with new content.

        A rename or link that would copy it up to a branch above is EXDEV then (copyup.begin).
        """
        branch = node.branch
        return (
            (branch.writable or self.sb.options.read_only)
            and branch.local
            and not branch.attrs & COPYING
            and node.busy is None
            and not st.st_mode & ID_BITS
        )

    def release(self, fh: int) -> None:
        if self.kept is not None and not fh:
            return
        if self.handles.lost:
            lost = self.handles.drop_lost(fh)
            if lost is not None:
                self.table.release_handles(lost.node)
                return
        if self.kept is not None:
            self.kept.released(self.handles.file(fh))
        handle = self.handles.remove_file(fh)
        if handle.backing_id and not handle.node.handles:
            self.on_unused_backing(handle.backing_id)
        self.table.release_handles(handle.node)

    # -- directories --------------------------------------------------------------------------

    def opendir(self, node_id: int, pid: int = 0) -> OpenDir:
        node = self.table.directory(node_id)
        if node.dead:
            # Of a removed directory the descriptor is left; of one on a removed branch nothing, and ESTALE here, not
            # after the open, has the kernel look the path up again.
            self.sb.layer_fd(node, node.layers[0])
        elif not node.trusted:
            self._refresh_if_there(node)
        branch = node.branch
        if "coo_all" in branch.attrs and node.parent is not None and self.sb.branches.writable_above(branch.index):
            raise NeedCopyUp(node, Trigger.OPEN)
        return self.handles.add_dir(node, pid)

    def readdir(self, fh: int, start: int) -> Iterator[readdir.Entry]:
        return readdir.entries(self.sb, self.handles.directory(fh), start)

    def readdir_names(self, fh: int, start: int) -> Iterator[Name | Run]:
        return readdir.names_only(self.sb, self.handles.directory(fh), start)

    def releasedir(self, fh: int) -> None:
        self.handles.remove_dir(fh)

    def directory_fds(self, fh: int) -> list[int]:
        """Readable descriptors, to be closed by the caller, of the writable branch directories (fsyncdir)."""
        node = self.handles.directory(fh).node
        if node.offline:
            raise eio()  # what was changed there may not be on its disk
        fds: list[int] = []
        try:
            for layer in node.layers:
                if layer.branch.writable:
                    fds.append(syscalls.open_listing(self.sb.layer_fd(node, layer)))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    # -- the whole ----------------------------------------------------------------------------

    def statfs(self) -> list[os.statvfs_result]:
        """Status of branch 0, or with the sum option of every distinct branch file system (semantics 10.6), of those
        that answer."""
        branches = self.sb.branches.answering
        if not branches:
            raise eio()
        if not self.sb.options.sum_space:
            return [os.statvfs(syscalls.proc_path(branches[0].root_fd))]
        distinct = {branch.dev: branch for branch in reversed(branches)}
        return [os.statvfs(syscalls.proc_path(branch.root_fd)) for branch in distinct.values()]

    def forget(self, node_id: int, count: int) -> None:
        if self.kept is not None:
            node = self.table.find(node_id)
            if node is not None and node.nlookup <= count:
                self.kept.forget(node_id)
        self.table.forget(node_id, count)

    def recover(self, node_id: int) -> None:
        """A branch changed underneath: ask the branches about a directory and its ancestors, trusted or not.

        Raises OSError: ESTALE when the directory is dead, ENOENT when it is gone.
        """
        node = self.table.directory(node_id)
        if node.dead:
            raise estale()  # no name to ask by; the kernel looks the path up again, which may lead elsewhere by now
        lookup.ask_again(self.sb, node)

    def run(self, operation: Callable[[], T]) -> T:
        """Perform an operation with the copy-ups it needs, all in this thread (for tests)."""
        while True:
            try:
                return operation()
            except NeedCopyUp as need:
                copied = copyup.run(self.sb, need)
                if need.then is not None and (copied or need.prepare is None):
                    return need.then()  # type: ignore[no-any-return]  # what the operation returns
