"""What may become a branch: the acceptance tests of semantics 3, and making a branch ready to be written.

Opens branches, never decides anything about names inside them, and changes a branch only in
prepare_writable(). The mount point itself is located but not asked for anything: a dead or wedged
mount may still lie on it. For the same reason the type of a branch's file system is looked up before
anything else is asked of it.

Invariants: open_branches() gives a whole, checked BranchSet or raises UserError (BRANCH) with one line
that names the offender, no descriptor left open. Two branches never share an object.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Final, NamedTuple

from udbad.branch import capabilities, mountinfo, notation, syscalls, whiteout
from udbad.branch.branches import Branch, BranchSet, BranchSpec
from udbad.branch.mountinfo import FS_TYPE, Mount
from udbad.branch.ordering import keeps_order
from udbad.branch.spec import shown
from udbad.errors import ExitCode, UserError
from udbad.types import Perm

MAX_BRANCHES: Final = 32767
"""The largest AUFS_BRANCH_MAX (fs/aufs/Kconfig)."""


_FILE: Final = (st_mod.S_IFREG, "regular file")
_DIRECTORY: Final = (st_mod.S_IFDIR, "directory")
_MIN_NAME_MAX: Final = 255
_BASE_MODE: Final = 0o444
_OTHERS_MAY_WRITE: Final = 0o022

_MEDIUM_NEVER_CHANGES: Final = frozenset({"squashfs", "iso9660", "cramfs", "romfs", "erofs"})

_UNSUPPORTED: Final = frozenset(
    {
        "proc", "sysfs", "configfs", "debugfs", "securityfs", "tracefs", "xenfs", "ecryptfs", "aufs",
        "cgroup", "cgroup2", "cpuset", "bpf", "pstore", "efivarfs", "devpts", "mqueue", "hugetlbfs", "binfmt_misc",
        "fusectl", "autofs", "selinuxfs", "smackfs", "rpc_pipefs", "nfsd", "resctrl", "functionfs",
    }
)  # fmt: skip
"""au_br_test: windows into the kernel, not places for files; and unions. Ours are told by a message of their own."""

_RESTRICTIONS: Final = {"nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}
"""Flags of a mount that keep what lies on it from being executed or used as a device: names in mount(8), statvfs(3)."""

_OPEN_DIR: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class _Place(NamedTuple):
    """Where a directory is: its path as the kernel gives it, and `inner`, its path in the file system itself.

    (device, inner) shows that two directories are nested also when bind mounts hide it from their paths.
    """

    path: bytes
    mount_id: int
    device: tuple[int, int]
    inner: bytes
    fs_type: str


class _Candidate(NamedTuple):
    spec: BranchSpec
    place: _Place
    perm: Perm
    anchor_fd: int
    root_fd: int
    private: bool
    dev: int
    ino: int
    restrictions: frozenset[str]

    @property
    def name(self) -> str:
        return shown(self.spec.path)


def open_branches(specs: Sequence[BranchSpec], ro: bool, mount_point: bytes, whiteouts: str = "auto") -> BranchSet:
    """Open and check all branches of a new mount, top first.

    ro: the mount itself is read-only, which only changes the default permission of the first branch.
    mount_point: an existing directory, where the union will be mounted. A permission left out becomes rr
    where the medium can never change, else rw for the first branch of a writable mount, else ro. Relative
    paths are taken from the current directory; the resulting Branch.path is absolute and free of links.
    whiteouts: in what notation writable branches are written (MountOptions.whiteouts).
    Raises UserError: BRANCH, or MOUNT_POINT when the mount point cannot be opened.
    """
    if not specs:
        raise _refused("no branch given")
    if len(specs) > MAX_BRANCHES:
        raise _refused(f"{len(specs)} branches given, at most {MAX_BRANCHES} are possible")
    with ExitStack() as opened:
        anchors = [_open_anchor(spec, opened) for spec in specs]
        # Read only now: looking up a path may have mounted something (autofs).
        mounts = _read_mounts()
        found: list[_Candidate] = []
        seen: dict[tuple[int, int], _Candidate] = {}
        for spec, anchor_fd in zip(specs, anchors, strict=True):
            default = Perm.RO if found or ro else Perm.RW
            candidate = _examine(spec, anchor_fd, mounts, default, opened)
            twin = seen.setdefault((candidate.dev, candidate.ino), candidate)
            if twin is not candidate:
                same = "" if twin.name == candidate.name else f", it is the same directory as {twin.name}"
                raise _refused(f"branch {candidate.name} is given twice{same}")
            found.append(candidate)
        _refuse_nested(found, seen)
        _refuse_mount_point(found, mount_point, mounts)
        branches = tuple(
            Branch(
                id=index,
                index=index,
                path=one.place.path,
                perm=one.perm,
                attrs=one.spec.attrs,
                udba=one.spec.udba,
                watch=one.spec.watch,
                root_fd=one.root_fd,
                anchor_fd=one.anchor_fd,
                dev=one.dev,
                fs_type=one.place.fs_type,
                restrictions=one.restrictions,
                private=one.private,
                keeps_order=keeps_order(one.place.fs_type, one.dev),
                unmarked=whiteout.unmarked(one.root_fd),
                writes_overlay=one.perm is Perm.RW and _writes_overlay(one, whiteouts),
            )
            for index, one in enumerate(found)
        )
        opened.pop_all()
    return BranchSet(branches)


def _writes_overlay(one: _Candidate, whiteouts: str) -> bool:
    """Raises UserError where a branch is in the other notation than the one that is asked for."""
    if whiteouts == "auto":
        return notation.is_overlay(one.root_fd)
    if whiteouts == "aufs" and syscalls.exists_at(one.root_fd, whiteout.OVERLAY_DIR):
        raise _refused(f"branch {one.name} has whiteouts of overlayfs ({shown(whiteout.OVERLAY_DIR)})")
    if whiteouts == "overlay" and not whiteout.unmarked(one.root_fd):
        raise _refused(
            f"branch {one.name} has whiteouts of aufs; `udbad convert aufs overlay {one.name}` rewrites them"
        )
    return whiteouts == "overlay"


def permission_warnings(branches: BranchSet) -> list[str]:
    """One line for each branch root whose owner, group or mode differ from the first branch's (warn_perm)."""
    first = _permissions(branches[0])
    warnings = []
    for branch in branches.branches[1:]:
        other = _permissions(branch)
        if other != first:
            warnings.append(
                f"branch {shown(branch.path)}: uid/gid/mode {_permissions_text(other)} differ from "
                f"{_permissions_text(first)} of the first branch {shown(branches[0].path)}"
            )
    return warnings


def _permissions(branch: Branch) -> tuple[int, int, int]:
    st = os.fstat(branch.root_fd)
    return st.st_uid, st.st_gid, st_mod.S_IMODE(st.st_mode)


def _permissions_text(permissions: tuple[int, int, int]) -> str:
    uid, gid, mode = permissions
    return f"{uid}/{gid}/{mode:04o}"


def _refused(message: str) -> UserError:
    return UserError(message, ExitCode.BRANCH)


# -- one branch -----------------------------------------------------------------------------------


def _open_anchor(spec: BranchSpec, opened: ExitStack) -> int:
    # Symbolic links on the way are followed, as by kern_path(LOOKUP_FOLLOW) in aufs: the user named them.
    try:
        fd = os.open(spec.path, _OPEN_DIR)
    except FileNotFoundError:
        raise _refused(f"branch {shown(spec.path)} does not exist") from None
    except NotADirectoryError:
        raise _refused(f"branch {shown(spec.path)} is not a directory") from None
    except OSError as error:
        raise _refused(f"branch {shown(spec.path)}: {error.strerror}") from None
    opened.callback(os.close, fd)
    return fd


def _examine(
    spec: BranchSpec, anchor_fd: int, mounts: dict[int, Mount], default: Perm, opened: ExitStack
) -> _Candidate:
    """The tests that need no other branch."""
    name = shown(spec.path)
    place = _locate(anchor_fd, mounts)
    if place.fs_type == os.fsdecode(FS_TYPE):
        raise _refused(f"branch {name} is in a udbad mount itself")
    if place.fs_type in _UNSUPPORTED:
        raise _refused(f"branch {name}: file system type {place.fs_type} cannot be a branch")
    if place.fs_type in _MEDIUM_NEVER_CHANGES:
        default = Perm.RR
    perm = default if spec.perm is None else spec.perm
    try:
        st = os.fstat(anchor_fd)
        fs = os.fstatvfs(anchor_fd)
        root_fd, private = _clone(anchor_fd)
    except OSError as error:
        raise _refused(f"branch {name}: {error.strerror}") from None
    opened.callback(os.close, root_fd)
    if st.st_nlink == 0 and place.path.endswith(b" (deleted)"):  # reached through /proc/PID/cwd or the like
        raise _refused(f"branch {name} has been removed")
    if perm is Perm.RW and fs.f_flag & os.ST_RDONLY:
        raise _refused(f"branch {name} cannot be rw: its file system is read-only")
    if perm is Perm.RW and fs.f_namemax < _MIN_NAME_MAX:
        raise _refused(
            f"branch {name} cannot be rw: its file system takes names of at most {fs.f_namemax} bytes, "
            f"{_MIN_NAME_MAX} are needed"
        )
    restrictions = frozenset(name for name, bit in _RESTRICTIONS.items() if fs.f_flag & bit)
    return _Candidate(spec, place, perm, anchor_fd, root_fd, private, st.st_dev, st.st_ino, restrictions)


def _clone(anchor_fd: int) -> tuple[int, bool]:
    """A private clone of the mount at exactly this directory, or a plain descriptor where that is refused (False).

    open_tree(2): EPERM without CAP_SYS_ADMIN, ENOSYS before Linux 5.2, EINVAL when the mount is not of
    this name space or covers something that an unprivileged one must not uncover.
    """
    try:
        fd = syscalls.clone_mount(syscalls.proc_path(anchor_fd))
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EINVAL):
            raise
    else:
        # Whoever opens a device does so through the union, where the kernel opens it. Root shall not open one that
        # somebody puts in the place of a file.
        with suppress(OSError):  # Linux 5.12
            syscalls.set_mount_attributes(fd, syscalls.MOUNT_ATTR_NODEV, 0)
        return fd, True
    return os.open(b".", _OPEN_DIR, dir_fd=anchor_fd), False


# -- places ---------------------------------------------------------------------------------------


_UNLISTED: Final = Mount(-1, -1, (-1, -1), b"/", b"/", b"", b"unknown", b"", b"")
"""Stands for a mount that mountinfo does not show: the one below a chroot(2) that is no mount point."""


def _read_mounts() -> dict[int, Mount]:
    """All mounts of this name space by mount id."""
    return {mount.id: mount for mount in mountinfo.read()}


def _locate(fd: int, mounts: dict[int, Mount]) -> _Place:
    """Asks only the kernel's own tables, never the file system behind `fd`."""
    path = os.readlink(syscalls.proc_path(fd))
    mount_id = mountinfo.mount_id(fd)
    mount = mounts.get(mount_id, _UNLISTED)
    inside = path if mount.point == b"/" else path[len(mount.point) :]
    inner = (mount.root.rstrip(b"/") + inside).rstrip(b"/") or b"/"
    return _Place(path, mount_id, mount.device, inner, os.fsdecode(mount.fs_type))


def _ancestors(path: bytes) -> Iterator[bytes]:
    """The proper ancestors of an absolute path, nearest first."""
    while path != b"/":
        path = os.path.dirname(path)
        yield path


def _below(path: bytes, top: bytes) -> bytes:
    """`path` relative to its ancestor `top`."""
    return path[len(top.rstrip(b"/")) + 1 :]


# -- branches among each other --------------------------------------------------------------------


def _refuse_nested(found: Sequence[_Candidate], by_identity: dict[tuple[int, int], _Candidate]) -> None:
    """au_test_nested: no branch may be an ancestor of another on the same file system.

    One on another file system that is mounted below a branch is fine, it is not part of that branch.
    Two ways, each sees what the other misses: the parents through `..`, by identity, and the path inside
    the file system, which knows nothing of bind mounts, but is a hint only (the roots of two NFS exports
    are both called `/`) and so has to be confirmed.
    """
    by_place = {(one.place.device, one.place.inner): one for one in found}
    for inner in found:
        try:
            outer = next((by_identity[identity] for identity in _parents(inner) if identity in by_identity), None)
        except OSError as error:
            raise _refused(f"branch {inner.name}: its parent directories: {error.strerror}") from None
        if outer is not None:
            raise _overlap(inner, outer)
        for path in _ancestors(inner.place.inner):
            outer = by_place.get((inner.place.device, path))
            if outer is not None and _reaches(outer, inner.place, (inner.dev, inner.ino)):
                raise _overlap(inner, outer)


def _overlap(inner: _Candidate, outer: _Candidate) -> UserError:
    return _refused(f"branches overlap: {inner.name} is inside {outer.name}")


def _parents(one: _Candidate) -> Iterator[tuple[int, int]]:
    """Identities of the directories above a branch, up to the root of its mount."""
    identity = (one.dev, one.ino)
    fd = os.open(b"..", _OPEN_DIR, dir_fd=one.anchor_fd)
    try:
        while mountinfo.mount_id(fd) == one.place.mount_id:
            st = os.fstat(fd)
            if (st.st_dev, st.st_ino) == identity:  # the root is its own parent
                return
            identity = (st.st_dev, st.st_ino)
            yield identity
            above = os.open(b"..", _OPEN_DIR, dir_fd=fd)
            os.close(fd)
            fd = above
    finally:
        os.close(fd)


def _reaches(outer: _Candidate, place: _Place, identity: tuple[int, int]) -> bool:
    """Whether the directory of this identity is where its path says, seen from `outer`."""
    try:
        st = os.stat(_below(place.inner, outer.place.inner), dir_fd=outer.root_fd, follow_symlinks=False)
    except OSError:
        return False
    return (st.st_dev, st.st_ino) == identity


def _refuse_mount_point(found: Sequence[_Candidate], mount_point: bytes, mounts: dict[int, Mount]) -> None:
    """Nothing of a branch may be found through the mount, nor the mount through a branch: a request of the
    daemon to itself would wait for ever.
    """
    name = shown(mount_point)
    try:
        fd = os.open(mount_point, _OPEN_DIR)
    except OSError as error:
        raise UserError(f"mount point {name}: {error.strerror}", ExitCode.MOUNT_POINT) from None
    try:
        place = _locate(fd, mounts)
        for one in found:
            if one.place.path == place.path:
                raise _refused(f"branch {one.name} is the mount point")
            if place.path in _ancestors(one.place.path):
                raise _refused(f"branch {one.name} is inside the mount point {name}")
            if one.place.path in _ancestors(place.path) or _holds(one, place, fd):
                raise _refused(f"the mount point {name} is inside branch {one.name}")
    finally:
        os.close(fd)


def _holds(outer: _Candidate, place: _Place, fd: int) -> bool:
    """Whether a bind mount hides that `fd` is below a branch.

    The very directory of a branch, seen through a bind mount, may be the mount point: that is how a
    directory gets a union put over it. The descriptor is only asked when it is on the same file system as
    the branch, so not when a dead mount lies on the mount point.
    """
    if place.device != outer.place.device or outer.place.inner not in _ancestors(place.inner):
        return False
    st = os.fstat(fd)
    return _reaches(outer, place, (st.st_dev, st.st_ino))


# -- making a branch ready to be written ----------------------------------------------------------


def check_names(branch: Branch, plink: bool) -> None:
    """Raises UserError (BRANCH) when `prepare_writable` would, for a name of the wrong type; changes nothing."""
    types = {whiteout.BASE: _FILE, whiteout.ORPHAN_DIR: _DIRECTORY} | (
        {whiteout.PLINK_DIR: _DIRECTORY} if plink else {}
    )
    if branch.overlay:
        types, plink = {whiteout.OVERLAY_DIR: _DIRECTORY}, False
    for name, (wanted, word) in types.items():
        if syscalls.exists_at(branch.root_fd, name):
            _require_type(branch, name, wanted, word)
    if plink:
        _require_own_plinks(branch)


def is_foreign(root: os.stat_result, st: os.stat_result) -> bool:
    """Whether somebody may have put the administrative directory `st` into a branch who could not have replaced what is
    in the branch's root as well: by then nobody has to be believed less. Such are the sticky bit (/tmp), and a careless
    mode. root: status of the branch's root."""
    if root.st_mode & _OTHERS_MAY_WRITE and not root.st_mode & st_mod.S_ISVTX:
        return False
    return st.st_uid not in (0, os.geteuid(), root.st_uid) or bool(st.st_mode & _OTHERS_MAY_WRITE)


def _require_own_plinks(branch: Branch) -> None:
    """Pseudo-links say what names anywhere on lower branches show."""
    try:
        st = syscalls.stat_at(branch.root_fd, whiteout.PLINK_DIR)
    except FileNotFoundError:
        return
    if is_foreign(os.fstat(branch.root_fd), st):
        raise _refused(
            f"branch {shown(branch.path)}: {shown(whiteout.PLINK_DIR)} belongs to uid {st.st_uid} with mode "
            f"{st_mod.S_IMODE(st.st_mode):04o}, so others may have written what is there; change that, or use noplink"
        )


def prepare_writable(branch: Branch, plink: bool) -> None:
    """What aufs puts into the root of a branch that becomes writable (semantics 3, au_wbr_init).

    The base file that whiteouts are links to (removed with +nolwh), the directory of pseudo-links with
    `plink`, the directory of orphans. What exists already stays as it is. Raises UserError (BRANCH) when
    such a name is of the wrong type, when link(2) is needed and the file system has none (nothing is left
    behind then), and when the branch cannot be written. One in the notation of overlayfs has all it needs by its lock.
    """
    if branch.overlay:
        return
    use_base = "nolwh" not in branch.attrs
    try:
        _require_ours(branch)
        existed = _base_exists(branch)
        if use_base or plink:
            _require_link(branch, existed)
        if not use_base and syscalls.exists_at(branch.root_fd, whiteout.BASE):
            syscalls.unlink_at(branch.root_fd, whiteout.BASE)
        # Servers that map root to nobody need search permission there (fs/aufs/whout.c, au_whdir).
        mode = 0o711 if branch.fs_type.startswith("nfs") else 0o700
        if plink:
            _ensure_dir(branch, whiteout.PLINK_DIR, mode)
            _require_own_plinks(branch)
        _ensure_dir(branch, whiteout.ORPHAN_DIR, mode)
    except OSError as error:
        raise _refused(f"branch {shown(branch.path)} cannot be made writable: {error.strerror}") from None


def _require_ours(branch: Branch) -> None:
    """An ordinary user can neither link nor look into what another one's mount has put there."""
    if capabilities.acts_for_others():
        return
    for name in (whiteout.BASE, whiteout.PLINK_DIR, whiteout.ORPHAN_DIR):
        with suppress(FileNotFoundError):
            uid = syscalls.stat_at(branch.root_fd, name).st_uid
            if uid != os.geteuid():
                what = f"{shown(name)} belongs to uid {uid}, whose mount has made it; chown it"
                raise _refused(f"branch {shown(branch.path)}: {what}")


def _base_exists(branch: Branch) -> bool:
    if not syscalls.exists_at(branch.root_fd, whiteout.BASE):
        return False
    _require_type(branch, whiteout.BASE, *_FILE)
    return True


def _require_type(branch: Branch, name: bytes, wanted: int, word: str) -> None:
    if st_mod.S_IFMT(syscalls.stat_at(branch.root_fd, name).st_mode) != wanted:
        raise _refused(f"branch {shown(branch.path)}: {shown(name)} exists and is not a {word}")


def _require_link(branch: Branch, existed: bool) -> None:
    """Make the base file if need be, and see whether it can be linked (test_linkable)."""
    if not existed:
        os.close(syscalls.create_file_at(branch.root_fd, whiteout.BASE, os.O_WRONLY, _BASE_MODE))
        syscalls.chmod_at(branch.root_fd, whiteout.BASE, _BASE_MODE)  # whatever the umask took away
    # Temporary names in the form that is swept after a crash (semantics 1).
    names = (whiteout.BASE + b".%04x" % number for number in range(0x10000))
    probe = next(name for name in names if not syscalls.exists_at(branch.root_fd, name))
    try:
        syscalls.link_at(branch.root_fd, whiteout.BASE, branch.root_fd, probe)
    except OSError as error:
        if error.errno == errno.EMLINK:  # linked as often as can be: links do work
            return
        if not existed:
            syscalls.unlink_at(branch.root_fd, whiteout.BASE)
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise _refused(
                f"branch {shown(branch.path)}: its file system ({branch.fs_type}) has no hard links, "
                "use rw+nolwh and noplink"
            ) from None
        raise
    syscalls.unlink_at(branch.root_fd, probe)


def _ensure_dir(branch: Branch, name: bytes, mode: int) -> None:
    try:
        syscalls.mkdir_at(branch.root_fd, name, 0o700)
    except FileExistsError:
        _require_type(branch, name, *_DIRECTORY)
        return
    if mode != 0o700:
        syscalls.chmod_at(branch.root_fd, name, mode)
