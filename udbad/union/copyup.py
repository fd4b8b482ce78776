"""Copy-up: bringing an object to a writable branch before it is changed (semantics 6.8).

Three steps, so that the bytes can travel in a worker thread while the mount is served:

    begin     event loop: choose the branch, make parents, open source and a file without a name there
    transfer  any thread: content, owner, mode, xattrs, times (`copy`), then the disk (`put_on_disk`); only descriptors
              and bytes
    commit    event loop: give the copy its name, where nothing has it, then publish the new home

Everything but regular files is small enough to be done inside `begin`. A failure leaves the lower
object untouched and visible and no temporary behind. While a copy-up is under way node.busy is set,
and operations on that node wait (edge/waiting.py).

The data is on disk before the name is (as in overlayfs, ovl_copy_up_file): else a power failure could leave an empty
file that hides the whole lower one. Names, directories and attributes need no sync for that: file systems keep them in
order, and a rename that is lost with the power leaves the lower file visible. Where a file system keeps the data in
that order too once it is written (branch/ordering.py), it is written and not synced.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from collections.abc import Callable
from time import perf_counter

from udbad.branch import compare, copydata, datacalls, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.branch.origin import Place
from udbad.branch.state import is_racy, object_stamp, stamp
from udbad.branch.syscalls import fstat, stat_at
from udbad.errors import GONE, erofs, estale, os_error
from udbad.inodes.handles import backing_id
from udbad.inodes.node import Dir, Node
from udbad.types import MADE, MOVED_TO, CopyMethod, Trigger
from udbad.union import copydirs, lookup, plink, resolve
from udbad.union.resolve import FOUND
from udbad.union.superblock import NeedCopyUp, Superblock, is_object

_ATTEMPTS = 3
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
"""open(2) with O_TMPFILE on a file system that has no files without a name."""


class Job:
    """One copy-up of a regular file under way. tmp: the temporary name of the copy, b"" where it can do without.

    dirfd: where it gets its name; -1: it gets none (orphan). Of the union, until `hold`.

    length: bytes of the content that are wanted, None for all. fsync: there is content that has to be on disk.
    parent_times: (atime_ns, mtime_ns) of the target directory, put back after the rename.
    waited: seconds that the disk has taken, when it was waited for. prepare: NeedCopyUp.prepare.
    """

    __slots__ = (
        "as_link", "branch", "copied", "dirfd", "dst_fd", "fsync", "length", "method", "name", "node", "owns_dirfd",
        "parent", "parent_times", "prepare", "progress", "source", "src_fd", "st", "tmp", "trigger", "waited",
    )  # fmt: skip

    def __init__(
        self,
        node: Node,
        trigger: Trigger,
        source: Branch,
        parent: Dir | None,
        name: bytes,
        branch: Branch,
        dirfd: int,
        tmp: bytes,
        src_fd: int,
        dst_fd: int,
        st: os.stat_result,
        length: int | None,
        fsync: bool,
        parent_times: tuple[int, int] | None,
        as_link: bool = False,
    ) -> None:
        self.node = node
        self.trigger = trigger
        self.source = source
        self.parent = parent
        self.name = name
        self.branch = branch
        self.dirfd = dirfd
        self.owns_dirfd = False
        self.tmp = tmp
        self.src_fd = src_fd
        self.dst_fd = dst_fd
        self.st = st
        self.length = length
        self.fsync = fsync
        self.parent_times = parent_times
        self.as_link = as_link
        self.method = CopyMethod.NONE
        self.copied = 0
        self.progress = 0
        self.waited: float | None = None
        self.prepare: Callable[[int], object] | None = None


def begin(sb: Superblock, need: NeedCopyUp) -> Job | None:
    """Start the copy-up that an operation asked for; None when it is done already.

    Raises OSError: EROFS without a writable branch, ESTALE when the object is gone, and what the branch says.
    """
    node = need.node
    if type(node) is Dir:
        if node is sb.root:
            raise erofs()  # it is on every branch already: what is read-only is its top one
        if node.parent is None:
            raise estale()  # taken out of the union directly
        if need.trigger is Trigger.OPEN:
            copydirs.ensure_dir(sb, node, sb.branches.writable_above(node.branch.index)[0])
        else:
            copydirs.ensure_dir(sb, node, copydirs.target_branch(sb, node.parent, node.branch.index))
        return None
    if backing_id(node):
        # The kernel goes on with the file that it has.
        raise os_error(errno.EXDEV if need.trigger in (Trigger.RENAME, Trigger.LINK) else errno.EBUSY)
    src_fd, st = _open_known(sb, need)
    job = None
    try:
        job = _begin_file(sb, need, src_fd, st)
    finally:
        if src_fd >= 0 and (job is None or job.src_fd != src_fd):
            os.close(src_fd)
    if job is not None:
        job.prepare = need.prepare
    return job


def _open_known(sb: Superblock, need: NeedCopyUp) -> tuple[int, os.stat_result | None]:
    """The regular file to copy, open, and its status, where the directory's view alone says that its name leads there
    and to nothing else (as `_still_there` finds); -1 and None where more has to be asked."""
    node = need.node
    parent = node.parent
    if need.name is not None or parent is None or node.dead or node.kind != st_mod.S_IFREG or node.plink is not None:
        return -1, None
    if lookup.only_on(sb, parent, node.name) != node.branch.index:
        return -1, None
    try:
        fd, st = syscalls.open_file_at(sb.branch_fd(parent, node.branch), node.name, os.O_RDONLY)
    except OSError:
        return -1, None  # which error that is, is found again
    if is_object(node, st):
        return fd, st
    os.close(fd)
    return -1, None


def _begin_file(sb: Superblock, need: NeedCopyUp, src_fd: int, st: os.stat_result | None) -> Job | None:
    """`begin` of what is no directory. src_fd, st: from `_open_known`."""
    node = need.node
    as_link = need.trigger is Trigger.LINK and need.name is not None
    parent, name = need.name if need.name is not None else (node.parent, node.name)
    if parent is None or node.dead or (need.name is None and st is None and (st := _still_there(sb, node)) is None):
        return _begin_orphan(sb, need)
    source = node.branch.index if need.limit is None else min(node.branch.index, need.limit + 1)
    resolve.check_top(parent, node.branch.index)
    if node.plink is not None and node.plink.branch.writable:  # else it is copied up like any other file
        if need.limit is not None and node.plink.branch.index > need.limit:
            raise os_error(errno.EXDEV)  # its one copy is where the new name would be hidden
        if not as_link:
            _link_plink(sb, node, parent, name)
            return None
    if need.trigger is Trigger.OPEN:  # coo_*, moo: the nearest one, whatever cpup= says (semantics 3)
        branch = sb.branches.writable_above(source)[0]
    else:
        branch = copydirs.target_branch(sb, parent, source)
    src_dirfd, src_name = sb.locate(node)
    if _has_names(sb, node, as_link, stat_at(src_dirfd, src_name) if st is None else st):
        plink.directory(sb, branch)  # while nothing has been changed: it may fail
    try:
        dirfd = copydirs.ensure_dir(sb, parent, branch)
    except OSError as error:
        if as_link or error.errno not in GONE or sb.held_fd(node) < 0:
            raise
        return _begin_orphan(sb, need)  # its directory is gone
    before = fstat(dirfd)
    times = (before.st_atime_ns, before.st_mtime_ns)
    if node.kind != st_mod.S_IFREG:
        _copy_special(sb, node, parent, name, branch, src_dirfd, src_name, dirfd, times, as_link)
        return None
    opened = -1
    if src_fd < 0 or st is None:
        opened, st = syscalls.open_file_at(src_dirfd, src_name, os.O_RDONLY)
        src_fd = opened
    try:
        if not is_object(node, st):
            raise estale()
        tmp, dst_fd = _new_file(dirfd, name)
    except BaseException:
        if opened >= 0:
            os.close(opened)
        raise
    length, fsync = _extent(sb, branch, st, need.length)
    return Job(
        node, need.trigger, node.branch, parent, name, branch, dirfd, tmp, src_fd, dst_fd, st, length, fsync, times,
        as_link,
    )  # fmt: skip


def hold(job: Job) -> None:
    """Before anything else is served, which may have the descriptor of the directory closed. Raises OSError."""
    if not job.owns_dirfd and job.dirfd >= 0:
        job.dirfd = os.dup(job.dirfd)
        job.owns_dirfd = True


def _new_file(dirfd: int, name: bytes) -> tuple[bytes, int]:
    """The file that becomes the copy, and its temporary name. Without one (b"") where the file system has such files:
    nobody sees it, nothing is left of it after a crash, and a directory changes once and not twice."""
    try:
        return b"", syscalls.open_tmpfile(dirfd, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    tmp = whiteout.temporary_name(name)
    return tmp, syscalls.create_file_at(dirfd, tmp, os.O_RDWR, 0o600)


def _has_names(sb: Superblock, node: Node, as_link: bool, st: os.stat_result) -> bool:
    """Whether the copy needs a pseudo-link, as a file with attributes `st` that has further names."""
    return sb.plink and (as_link or st.st_nlink > 1 or node.plink is not None)


def _extent(sb: Superblock, branch: Branch, st: os.stat_result, length: int | None) -> tuple[int | None, bool]:
    """(Job.length, Job.fsync). A file that is empty now is copied so, for whether to sync decides about the thread."""
    if st.st_size == 0 or length == 0:
        return 0, False
    return length, sb.options.fsync_copyup and not branch.in_memory


def _publish(job: Job, parent: Dir) -> int:
    """The system call that makes the copy visible; which event it sends (types.MADE and the like). As `_publish_in`."""
    if job.tmp:
        _publish_in(parent, job.dirfd, job.tmp, job.dirfd, job.name)
        job.tmp = b""
        return MOVED_TO
    try:
        syscalls.link_fd(job.dst_fd, job.dirfd, job.name)
    except FileExistsError:
        parent.doubt(job.name)
        raise estale() from None
    return MADE


def _publish_in(parent: Dir, src_dirfd: int, tmp: bytes, dst_dirfd: int, name: bytes) -> None:
    """`publish` under a name of the union: ESTALE when it stands for something else by now, which is found next."""
    try:
        copydirs.publish(src_dirfd, tmp, dst_dirfd, name)
    except FileExistsError:
        parent.doubt(name)
        raise estale() from None


def _still_there(sb: Superblock, node: Node) -> os.stat_result | None:
    """The status of a node that its name still leads to; None if only descriptors do."""
    if node.plink is None and node.parent is not None:
        # Nothing newer is above it, either: copying it up there would overwrite that.
        if lookup.only_on(sb, node.parent, node.name) == node.branch.index:
            try:
                st = syscalls.stat_at(sb.branch_fd(node.parent, node.branch), node.name)
            except OSError as error:
                if error.errno not in GONE:
                    raise
            else:
                if is_object(node, st):
                    return st
        found = resolve.resolve(sb, node.parent, node.name)
        if found.answer is FOUND:
            if found.layers is None and is_object(node, found.st):
                return found.st
            resolve.discard(sb, node.parent, node.name, found)
    try:
        st = sb.stat(node)
        dirfd, name = sb.locate(node)
        here = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    except OSError as error:
        if error.errno in GONE:
            return None
        raise
    if (here.st_dev, here.st_ino) != (st.st_dev, st.st_ino):
        return None
    if node.plink is not None or node.parent is None:
        return here
    # Hidden by something newer above it; or that name was lost, and there is another one.
    found = resolve.resolve(sb, node.parent, node.name)
    if found.answer is FOUND:
        resolve.discard(sb, node.parent, node.name, found)
        if found.layers is None and is_object(node, found.st):
            return found.st
    node.parent.doubt(node.name)
    return None


def _begin_orphan(sb: Superblock, need: NeedCopyUp) -> Job:
    """A deleted file that is still open: its copy lives without a name, while it is open (semantics 6.8)."""
    node = need.node
    source = sb.held_fd(node)
    if node.orphan_fd >= 0 or source < 0 or node.kind != st_mod.S_IFREG:
        raise estale()
    above = sb.branches.writable_above(node.branch.index)
    if sb.options.read_only:
        raise erofs()
    if not above:
        raise sb.branches.refusal()
    branch = above[0]
    src_fd = syscalls.reopen(source, os.O_RDONLY)
    try:
        st = os.fstat(src_fd)
        if not node.dead and _has_names(sb, node, False, st):  # that we do not know, on a lower branch
            return _begin_home(sb, need, branch, src_fd, st)
        dst_fd = _unnamed_file(branch)
    except BaseException:
        os.close(src_fd)
        raise
    return Job(
        node, need.trigger, node.branch, None, b"", branch, -1, b"", src_fd, dst_fd, st, need.length, False, None
    )  # fmt: skip


def _begin_home(sb: Superblock, need: NeedCopyUp, branch: Branch, src_fd: int, st: os.stat_result) -> Job:
    """The name it was opened by is gone, others are not: the copy goes where those find it, as a pseudo-link."""
    node = need.node
    dirfd = plink.directory(sb, branch)
    tmp = whiteout.temporary_name(b"plink")
    dst_fd = syscalls.create_file_at(dirfd, tmp, os.O_RDWR, 0o600)
    name = plink.home_name(node, Place(src_fd, b"", st))
    length, fsync = _extent(sb, branch, st, need.length)
    return Job(node, need.trigger, node.branch, None, name, branch, dirfd, tmp, src_fd, dst_fd, st, length, fsync, None)


def _unnamed_file(branch: Branch) -> int:
    tmp, fd = _new_file(branch.root_fd, b"orphan")
    if tmp:
        syscalls.unlink_at(branch.root_fd, tmp)
    return fd


def transfer(job: Job, cancelled: Callable[[], bool] | None = None) -> None:
    """`copy`, and have it on disk. Any thread. Raises as both do.

    Of what is large the disk gets the beginning while the rest is copied, from another thread: to give it the pages
    takes half as long as copying them.
    """
    if job.fsync and job.st.st_size > copydata.KERNEL_CHUNK and job.length is None:
        from concurrent.futures import ThreadPoolExecutor  # a mount begins without it

        with ThreadPoolExecutor(1, "write out") as writer:
            copy(job, cancelled, lambda at, count: writer.submit(datacalls.start_writing, job.dst_fd, at, count))
    else:
        copy(job, cancelled)
    put_on_disk(job)


def copy(
    job: Job, cancelled: Callable[[], bool] | None = None, write_out: Callable[[int, int], object] | None = None
) -> None:
    """Copy content and metadata. Any thread; touches only descriptors of the job. write_out: as for copy_contents.

    What is published is a state that the source had, however others write to it meanwhile. It is copied again when
    its ctime says that it has changed, or cannot tell yet, unless nothing that was copied has: what is the same in the
    copy and, afterwards, in the source was all there at one moment, the one in between. So a log that is appended to
    without a pause is copied as it was at the beginning. A reflink is one state by itself (FICLONE locks the file).

    Raises OSError: EBUSY when it was overwritten during each attempt; what the branches said.
    """
    for attempt in range(_ATTEMPTS):
        if attempt:
            os.ftruncate(job.dst_fd, 0)
            job.st = fstat(job.src_fd)
        st = job.st
        small = None
        if not (attempt or job.branch.may_reflink):
            listed = job.source.lists_xattrs and job.branch.lists_xattrs
            small = copydata.copy_small(st, job.src_fd, job.dst_fd, job.length, listed)
        result = small or _copy_in_steps(job, cancelled, write_out)
        job.method = result.method
        job.copied = result.bytes_copied
        job.progress = max(job.progress, result.size)
        now = fstat(job.src_fd)
        if not is_racy(job.source, st) and stamp(now) == stamp(st):
            return
        if small and now.st_size != st.st_size:
            continue  # as many bytes as there were in `begin`, of what may have been written since
        if result.method is CopyMethod.REFLINK or compare.same_bytes(job.dst_fd, job.src_fd, result.size):
            job.st = now
            _copy_attributes(job)
            return
    raise os_error(errno.EBUSY)


def _copy_in_steps(
    job: Job, cancelled: Callable[[], bool] | None, write_out: Callable[[int, int], object] | None
) -> copydata.CopyResult:
    def report(offset: int) -> None:
        job.progress = max(job.progress, offset)

    result = copydata.copy_contents(
        job.src_fd, job.dst_fd, job.length, report, cancelled, job.branch.may_reflink, write_out
    )
    job.method = result.method
    if _has_to_be_on_disk(job):
        datacalls.start_writing(job.dst_fd, 0, 0)  # while the rest is done
    _copy_attributes(job)
    return result


def put_on_disk(job: Job) -> None:
    """Wait until what was copied is on disk, where it has to be there before the name is, and ask what closing it would
    tell. Any thread. Raises OSError."""
    if not _has_to_be_on_disk(job):
        if not job.branch.local:
            datacalls.flush(job.dst_fd)
        return
    start = perf_counter()
    if job.branch.keeps_order:
        datacalls.write_out(job.dst_fd)
    else:
        os.fsync(job.dst_fd)
    job.waited = perf_counter() - start


def _has_to_be_on_disk(job: Job) -> bool:
    return job.fsync and job.method is not CopyMethod.REFLINK  # blocks that are shared are on disk already


def _copy_attributes(job: Job) -> None:
    copydata.copy_metadata(job.st, job.src_fd, job.dst_fd, job.branch.copying, follow_symlinks=True)


def commit(sb: Superblock, job: Job, at_once: bool = False) -> None:
    """Publish the copy and move the node to it. Raises OSError (EEXIST: a direct change was faster).

    at_once: nothing was served since `begin`. What was changed directly in between then counts as changed afterwards,
    but that a name which has appeared is not replaced (`publish`).
    """
    node = job.node
    if job.parent is not None and not at_once:
        _check_unmoved(sb, job)
    if job.prepare is not None:
        job.prepare(job.dst_fd)
    made = fstat(job.dst_fd)
    if job.dirfd < 0:
        _note(sb, node, None, b"", job.branch, made, False, 0)
        dst_fd, job.dst_fd = job.dst_fd, -1
        arrived_nameless(sb, node, job.branch, dst_fd, made)
        return
    if job.parent is None:
        names = job.st.st_nlink + node.nlink_extra
        _note(sb, node, None, job.name, job.branch, made, False, names)
        copydirs.publish(job.dirfd, job.tmp, job.dirfd, job.name)
        job.tmp = b""
        sb.move_data(node, job.branch, made, job.dst_fd)
        sb.inomap.alias(made.st_dev, made.st_ino, node.id)
        plink.adopt_home(sb, node, job.branch, job.name, job.st, names)
        return
    assert job.parent_times is not None
    _note(sb, node, job.parent, job.name, job.branch, made, job.as_link, _names_left(node, job.st, job.as_link))
    event = _publish(job, job.parent)
    copied = Place(job.src_fd, b"", job.st)
    arrived(sb, node, job.parent, job.name, job.branch, job.dst_fd, copied, made, job.as_link, event)
    copydirs.restore_times(job.dirfd, job.parent_times)


def _note(
    sb: Superblock, node: Node, parent: Dir | None, name: bytes, branch: Branch, made: os.stat_result, as_link: bool,
    names: int, links: int = 0,
) -> None:  # fmt: skip
    if sb.notes is not None:
        sb.notes.publish(node, parent, name, branch, made, as_link, names, links)


def takes_away(job: Job) -> bool:
    """Whether the source of a committed copy-up has to go (moo): `settle_names`, then `take_away`."""
    return job.trigger is Trigger.OPEN and "moo" in job.source.attrs and job.source.writable


def settle_names(sb: Superblock, job: Job) -> None:
    """Have the name of the copy on disk, and the directories made for it, before the source goes. Any thread."""
    if sb.options.fsync_copyup and not job.branch.in_memory:
        with datacalls.syncing(job.branch.root_fd) as fd:
            datacalls.sync_fs(fd)


def take_away(sb: Superblock, job: Job) -> None:
    """Remove the source, unless somebody has changed it since it was copied or is about to: then it stays, covered."""
    parent = job.parent
    layer = None if parent is None else parent.layer(job.source.index)
    if parent is None or layer is None:
        return
    try:
        dirfd = sb.layer_fd(parent, layer)
        st = syscalls.stat_at(dirfd, job.name)
        if object_stamp(st) != object_stamp(job.st):
            return
        if not syscalls.is_being_written(dirfd, job.name):
            syscalls.unlink_at(dirfd, job.name)
    except OSError as error:
        if error.errno not in GONE:
            raise


def _check_unmoved(sb: Superblock, job: Job) -> None:
    """The world went on while the bytes travelled: ESTALE, and a new start, unless the name still is the source."""
    parent, node = job.parent, job.node
    assert parent is not None
    if node.dead or (not job.as_link and parent.children.get(job.name) is not node):
        raise estale()
    if node.identity != (job.st.st_dev, job.st.st_ino):  # another of its names was faster
        raise estale()
    found = resolve.resolve(sb, parent, job.name)
    if found.answer is FOUND:
        resolve.discard(sb, parent, job.name, found)
    if job.as_link:
        if found.answer is FOUND:
            parent.doubt(job.name)
            raise os_error(errno.EEXIST)
        return
    if found.answer is FOUND:
        if (found.st.st_dev, found.st.st_ino) == node.identity:
            return
        if node.plink is not None and found.layers is None and lookup.intern(sb, parent, job.name, found)[0] is node:
            return
    parent.doubt(job.name)
    raise estale()


def abort(job: Job) -> None:
    """Remove what a copy-up that did not commit has left, and close its descriptors (also after commit)."""
    try:
        if job.tmp:
            syscalls.unlink_at(job.dirfd, job.tmp)
    finally:
        job.tmp = b""
        if not job.owns_dirfd:
            job.dirfd = -1
        for fd in (job.src_fd, job.dst_fd, job.dirfd):
            if fd >= 0:
                datacalls.close_quietly(fd)  # `transfer` has asked for what closing the copy would tell
        job.src_fd = job.dst_fd = job.dirfd = -1
        job.owns_dirfd = False


def arrived_nameless(sb: Superblock, node: Node, branch: Branch, fd: int, made: os.stat_result) -> None:
    """The copy behind `fd`, which is the node's from here on, has no name."""
    node.orphan_fd = fd
    node.nlink_extra = 0
    sb.move_data(node, branch, made, fd)


def arrived(
    sb: Superblock, node: Node, parent: Dir, name: bytes, branch: Branch, fd: int,
    source: Place, made: os.stat_result, as_link: bool, event: int = MOVED_TO,
) -> None:  # fmt: skip
    """The copy has its name: from now on the node's data is there, under the number it always had.

    fd: a descriptor of the copy, O_PATH unless it is a regular file. event: what giving it the name has sent.
    """
    parent.note_stacked(name)  # whatever fails from here on, the name is there
    src = source.st
    names = _names_left(node, src, as_link)
    linked = _has_names(sb, node, as_link, src)
    several = src.st_nlink > 1 or node.plink is not None
    node.nlink_extra = 0
    node.plink = None
    sb.move_data(node, branch, made, fd)
    sb.inomap.alias(made.st_dev, made.st_ino, node.id)
    if linked:
        plink.make(sb, node, branch, fd, name, source, names)
    if several and node.plink is None:
        # Without a pseudo-link the other names stay behind, as the lower file that they are (semantics 10.2).
        for other in node.names():
            if other != (parent, name):
                sb.changes.lost(node, *other)
    sb.changes.copied_up(node, parent, name, as_link, event)


def _names_left(node: Node, src: os.stat_result, as_link: bool) -> int:
    """On lower branches, once a file of status `src` has a copy: all that were not removed, but the copy's own."""
    return src.st_nlink + node.nlink_extra - (0 if as_link else 1)


def _copy_special(
    sb: Superblock, node: Node, parent: Dir, name: bytes, branch: Branch, src_dirfd: int, src_name: bytes,
    dirfd: int, times: tuple[int, int], as_link: bool,
) -> None:  # fmt: skip
    """Symlinks, devices, FIFOs and sockets: made anew under a temporary name."""
    st = syscalls.stat_at(src_dirfd, src_name)
    if (st.st_dev, st.st_ino) != node.identity:
        raise estale()
    if branch.overlay and whiteout.is_device(st):
        raise os_error(errno.EPERM)  # it would be a whiteout there
    tmp = whiteout.temporary_name(name)
    fd = copydata.copy_special(st, src_dirfd, src_name, dirfd, tmp, branch.copying)
    try:
        made = os.fstat(fd)
        try:
            _note(sb, node, parent, name, branch, made, as_link, _names_left(node, st, as_link))
            _publish_in(parent, dirfd, tmp, dirfd, name)
        except BaseException:
            syscalls.unlink_at(dirfd, tmp)
            raise
        arrived(sb, node, parent, name, branch, fd, Place(src_dirfd, src_name, st), made, as_link)
    finally:
        os.close(fd)
    copydirs.restore_times(dirfd, times)


def _link_plink(sb: Superblock, node: Node, parent: Dir, name: bytes) -> None:
    """Another name of a file that was copied up already: link the copy, do not copy twice."""
    home = node.plink
    assert home is not None
    dirfd = copydirs.ensure_dir(sb, parent, home.branch)
    before = os.fstat(dirfd)
    tmp = whiteout.temporary_name(name)
    copy = syscalls.stat_at(home.dirfd, home.name)
    _note(sb, node, parent, name, home.branch, copy, False, home.pending, copy.st_nlink)
    syscalls.link_at(home.dirfd, home.name, dirfd, tmp)
    try:
        _publish_in(parent, dirfd, tmp, dirfd, name)
    except BaseException:
        syscalls.unlink_at(dirfd, tmp)
        raise
    plink.name_arrived(sb, node)
    sb.changes.copied_up(node, parent, name)
    copydirs.restore_times(dirfd, (before.st_atime_ns, before.st_mtime_ns))


def run(sb: Superblock, need: NeedCopyUp) -> bool:
    """A whole copy-up in the calling thread (tests); whether there was something to copy."""
    job = begin(sb, need)
    if job is None:
        return False
    try:
        transfer(job)
        commit(sb, job)
        if takes_away(job):
            settle_names(sb, job)
            take_away(sb, job)
        return True
    finally:
        abort(job)
