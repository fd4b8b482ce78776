"""Branches and the branch set.

A `Branch` is one directory of the union, held open; a `BranchSet` is an immutable sequence of all
of them in priority order (index 0 on top), swapped whole on reconfiguration. An operation keeps the
set it started with. The acceptance rules that decide what may become a branch are in accept.py.
"""

from __future__ import annotations

import os
from typing import Any, Final, NamedTuple

from udbad.errors import eio, erofs
from udbad.types import Perm


def _is_multigrain(release: str) -> bool:
    """Whether a kernel stamps a change after a stat with a new time, however soon it follows (Linux 6.13)."""
    major, minor = release.split(".")[:2]
    return (int(major), int("".join(c for c in minor if c.isdigit()))) >= (6, 13)


MULTIGRAIN_KERNEL = _is_multigrain(os.uname().release)
_MULTIGRAIN_FS = frozenset({"ext4", "xfs", "btrfs", "tmpfs"})
"""FS_MGTIME in the kernel's sources."""
_BORROWED_TIMES_FS = frozenset({"tmpfs"})
"""Where a directory gets the time of what was linked or unlinked in it, which nobody has looked at (shmem_unlink()):
two such changes within a tick leave it the same times, whatever was looked at between them."""
_LOCAL_FS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "f2fs", "vfat", "exfat"})
"""File systems whose times come from this machine's clock, and whose close(2) has no error to tell (no f_op->flush)."""
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_LISTS_XATTRS_FS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "squashfs", "erofs", "overlay"})
_NO_REFLINK_FS = frozenset({"ext2", "ext3", "ext4", "tmpfs", "ramfs", "vfat", "exfat"})


class BranchSpec(NamedTuple):
    """What the user wrote for one branch: PATH[=PERM[+ATTR…]], perm None when left out.

    udba: coherence mode of this branch alone (none, reval, notify), watch: how changes of it are heard of (inotify,
    fanotify, auto); None follows the mount.
    """

    path: bytes
    perm: Perm | None = None
    attrs: frozenset[str] = frozenset()
    udba: str | None = None
    watch: str | None = None


class Branch:
    """One open branch.

    index: position in the set, 0 is the top. id: never reused while mounted. root_fd: O_PATH
    descriptor of a private clone of the mount, so that nothing mounted below is entered.
    private: it is one, and not that of the mount that everybody uses, because cloning was refused.
    anchor_fd: a descriptor through the visible mount, so that umount of the branch says EBUSY.
    restrictions: those of nosuid, nodev and noexec that its file system is mounted with.
    exact_times: an object that is no directory and has changed after a stat always shows another ctime.
    exact_directory_times: the same of a directory and its names, which is not everywhere the same.
    local: its times come from this machine's clock, and close(2) always succeeds; false where that is not known.
    in_memory: nothing of it outlives the power, so there is nothing to sync.
    keeps_order: content that has been written comes before a later rename after a power failure, too (ordering.py).
    unmarked: its root has nothing of what aufs and we put into a branch that is written to (whiteout.unmarked).
    writes_overlay: where it is written to, whiteouts are made as overlayfs does (notation.py).
    may_reflink: files of it may be able to share blocks.
    lists_xattrs: an object for which listxattr(2) has no names has no extended attributes, nor POSIX ACLs.
    offline: it does not answer; nothing may be asked of it, not even to close a file.
    copying: of a copy to it (copydata.copy_xattrs), its attributes; "overlay" where it is written as overlayfs does.
    overlay: whiteouts and opaque marks of overlayfs count on it, beside those of aufs.

    Never changed: see `but`.
    """

    __slots__ = (
        "anchor_fd", "attrs", "copying", "dev", "exact_directory_times", "exact_times", "fs_type", "id", "in_memory",
        "index", "keeps_order", "lists_xattrs", "local", "may_reflink", "offline", "overlay", "path", "perm", "private",
        "restrictions", "root_fd", "udba", "unmarked", "watch", "whable", "writable", "writes_overlay",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        index: int,
        path: bytes,
        perm: Perm,
        attrs: frozenset[str],
        udba: str | None,
        root_fd: int,
        anchor_fd: int,
        dev: int,
        fs_type: str,
        restrictions: frozenset[str] = frozenset(),
        private: bool = False,
        keeps_order: bool = False,
        offline: bool = False,
        watch: str | None = None,
        unmarked: bool = False,
        writes_overlay: bool = False,
    ) -> None:
        self.id = id
        self.index = index
        self.path = path
        self.perm = perm
        self.attrs = attrs
        self.udba = udba
        self.root_fd = root_fd
        self.anchor_fd = anchor_fd
        self.dev = dev
        self.fs_type = fs_type
        self.restrictions = restrictions
        self.private = private
        self.keeps_order = keeps_order
        self.offline = offline
        self.watch = watch
        self.unmarked = unmarked
        self.writes_overlay = writes_overlay
        self.writable = perm is Perm.RW
        self.whable = perm is Perm.RW or "wh" in attrs
        self.overlay = writes_overlay if self.writable else self.whable and unmarked
        self.copying = attrs | {"overlay"} if writes_overlay else attrs
        self.exact_times = perm is Perm.RR or (MULTIGRAIN_KERNEL and fs_type in _MULTIGRAIN_FS)
        borrowed = perm is not Perm.RR and fs_type in _BORROWED_TIMES_FS
        self.exact_directory_times = self.exact_times and not borrowed
        self.local = fs_type in _LOCAL_FS
        self.in_memory = fs_type in _IN_MEMORY
        self.may_reflink = fs_type not in _NO_REFLINK_FS
        self.lists_xattrs = fs_type in _LISTS_XATTRS_FS

    FIELDS: Final[tuple[str, ...]] = __init__.__code__.co_varnames[1 : __init__.__code__.co_argcount]
    """What __init__ takes; all else follows from it."""
    DEFAULTS: Final[dict[str, Any]] = dict(zip(reversed(FIELDS), reversed(__init__.__defaults__ or ()), strict=False))

    def values(self) -> dict[str, Any]:
        """What it was made of, by `FIELDS`."""
        return {name: getattr(self, name) for name in self.FIELDS}

    def but(self, **changes: Any) -> Branch:
        """The same, but for some `FIELDS`."""
        return Branch(**{**self.values(), **changes})

    def describe(self) -> str:
        """`path=perm+attr`, as aufs shows a branch in sysfs."""
        return os.fsdecode(self.path) + "=" + "+".join([self.perm.value, *sorted(self.attrs)])

    def close(self) -> None:
        os.close(self.root_fd)
        os.close(self.anchor_fd)


class BranchSet:
    """All branches of a mount, top first.

    writable: of each branch, for the policies. close_may_fail: on a branch that is written to. may_plink: there is a
    place for pseudo-links; overlayfs knows none, and would show the directory of them. Never changed.
    """

    __slots__ = ("branches", "close_may_fail", "generation", "may_plink", "writable")

    def __init__(self, branches: tuple[Branch, ...], generation: int = 0) -> None:
        self.branches = branches
        self.generation = generation
        self.writable = tuple(one.writable and not one.offline for one in branches)
        self.close_may_fail = any(one.writable and not one.local for one in branches)
        self.may_plink = not any(one.writes_overlay for one in branches)

    def __len__(self) -> int:
        return len(self.branches)

    @property
    def restrictions(self) -> frozenset[str]:
        """All that some branch is mounted with."""
        return frozenset[str]().union(*(branch.restrictions for branch in self.branches))

    def __getitem__(self, index: int) -> Branch:
        return self.branches[index]

    def writable_above(self, index: int) -> list[Branch]:
        """Writable branches with a smaller index, nearest first."""
        return [b for b in reversed(self.branches[:index]) if b.writable and not b.offline]

    @property
    def answering(self) -> list[Branch]:
        return [branch for branch in self.branches if not branch.offline]

    def refusal(self) -> OSError:
        """Why nothing can be written where a policy has found no branch: one that does not answer might do, or none."""
        missing = any(branch.writable and branch.offline for branch in self.branches)
        return eio() if missing else erofs()

    def close(self) -> None:
        for branch in self.branches:
            branch.close()
