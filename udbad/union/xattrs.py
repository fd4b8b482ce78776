"""Extended attributes of an object of the union: which there are, what is remembered of those that there are not.

Hardly any file has one, and the same few are asked for again and again: by `ls -l`, by who packs an image (five times a
file), by the kernel before a write. So one question, to list them, answers most others, for as long as the attributes
that the kernel holds would be believed (`Hooks.known_state`).
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from collections.abc import Callable
from typing import Final, TypeVar

from udbad.branch import overlayattr, syscalls
from udbad.branch.branches import Branch
from udbad.branch.syscalls import getxattr, lists_nothing, proc_path, unpin
from udbad.errors import os_error
from udbad.inodes.node import ALL_XATTRS, XATTR_BITS, Node
from udbad.types import Caller
from udbad.union.superblock import Superblock

T = TypeVar("T")
Fd = int
Bits = int
_Sure = tuple[tuple[bytes, ...], int]
"""What an object has only if it is listed: prefixes, and as bits of `Node.lacks`."""

_ACL_PREFIX: Final = b"system.posix_acl_"
_SYSTEM_PREFIX: Final = b"system."
_ACL_ACCESS: Final = b"system.posix_acl_access"
_ACL_BITS: Final = XATTR_BITS[_ACL_ACCESS] | XATTR_BITS[b"system.posix_acl_default"]
_CAPABILITY_BIT: Final = XATTR_BITS[b"security.capability"]
_LISTED: Final = (b"user.", b"trusted.", b"security.")
"""Prefixes of attributes that are listed where `Branch.lists_xattrs`. What has one and is not listed, is either refused
as well (trusted.* to who has no CAP_SYS_ADMIN, xattr(7)), or made up by a security module, which then answers for the
union before that is asked (xattr_getsecurity() in fs/xattr.c)."""
_LABEL: Final = b"security.selinux"
_ABSENT: Final = b"udbad.none"
"""What nothing has: how a file system says so, tells whether it has attributes of that prefix."""
_LACKING: Final = [(bits, True) for bits in range(2 * ALL_XATTRS)]
"""Of `Node.lacks` where the state is always the same, so that it need not be made for each of a million nodes."""


def selinux_enabled(file_systems: str = "/proc/filesystems") -> bool:
    """Whether the kernel has SELinux; true where nobody can tell.

    It has registered selinuxfs then, when it booted (selinuxfs_exists() in libselinux, without which
    is_selinux_enabled(3) says no), and takes ENODATA for "no label yet", all else for an error
    (inode_doinit_use_xattr() in security/selinux/hooks.c).
    """
    try:
        with open(file_systems, encoding="ascii") as lines:
            return "selinuxfs" in lines.read().split()
    except OSError:
        return True


class Xattrs:
    """Those of one mount. Everything raises OSError: EOPNOTSUPP, ENODATA, and as `Superblock.open_object`."""

    def __init__(self, sb: Superblock) -> None:
        self.sb = sb
        self._sure: dict[int, _Sure] = {}
        """By the id of a branch."""
        self._selinux: bool | None = None
        """Whether the kernel has it; None: nobody has asked for a label."""

    # -- what there is ----------------------------------------------------------------------------

    def find(self, node: Node, key: bytes) -> bytes | None:
        """The value of an attribute; None for ENODATA, which most are told.

        A label that is missing where there is no SELinux is EOPNOTSUPP, "no labels here", unless the option labels is
        set: ls(1) asks no other file of the file system then (getfilecon_cache() in its src/ls.c). The kernel remembers
        neither answer, only ENOSYS, and that for all attributes (fuse_getxattr() in fs/fuse/xattr.c).
        """
        value = self._find(node, key)
        if value is None and key == _LABEL and not self.sb.options.labels:
            if self._selinux is None:
                self._selinux = selinux_enabled()
            if not self._selinux:
                raise os_error(errno.EOPNOTSUPP)
        return value

    def _find(self, node: Node, key: bytes) -> bytes | None:
        bit = XATTR_BITS.get(key, 0)
        if bit & _ACL_BITS or not bit:
            self._check(key)
        state = self.sb.changes.known_state(node)
        known = self._known(node, state)
        if known & bit:
            return None
        name = key if bit else self._kept(node, key)
        told = 0
        if state is not None:
            prefixes, bits = self._sure_of(node.branch)
            if bit & bits or name.startswith(prefixes):
                if known & ALL_XATTRS:
                    return None
                told = bits
        fd, owned = self.sb.open_object(node)
        try:
            target = self._target(node, fd)
            if told and lists_nothing(target):
                self._note(node, known | told, state)
                return None
            value = syscalls.get_acl(target, name) if bit & _ACL_BITS else getxattr(target, name)
        finally:
            if owned:
                unpin(fd)
        if value is None and state is not None and bit:
            self._note(node, known | bit, state)
        return value

    def names(self, node: Node, caller: Caller) -> list[bytes]:
        """Of all attributes that the caller is to see."""
        state = self.sb.changes.known_state(node)
        known = self._known(node, state)
        if known & ALL_XATTRS:
            return []
        names = self._on_object(node, syscalls.listxattr)
        if not names:
            told = self._sure_of(node.branch)[1]
            if told and state is not None:
                self._note(node, known | told, state)
            return names
        if caller.uid != 0:
            names = [key for key in names if not key.startswith(b"trusted.")]  # xattr(7)
        if node.branch.overlay:
            names = overlayattr.shown(names)
        elif self.sb.redirect_key in names:
            names.remove(self.sb.redirect_key)
        return names if self.sb.options.acl else [key for key in names if not key.startswith(_ACL_PREFIX)]

    # -- what is remembered -------------------------------------------------------------------------

    def note_new(self, node: Node) -> None:
        """A file was just made, which has no capabilities then: the kernel asks before the first write."""
        state = self.sb.changes.known_state(node)
        if state is not None:
            self._note(node, _CAPABILITY_BIT, state)

    def _known(self, node: Node, state: object | None) -> Bits:
        """What it was found not to have, and still has not: XATTR_BITS and ALL_XATTRS. state: its `known_state`."""
        lacks = node.lacks
        if state is None or lacks is None or lacks[1] != state:
            return 0
        return lacks[0]

    def _note(self, node: Node, bits: Bits, state: object) -> None:
        """state: its `known_state` before it was asked."""
        node.lacks = _LACKING[bits] if state is True else (bits, state)

    def _sure_of(self, branch: Branch) -> _Sure:
        sure = self._sure.get(branch.id)
        if sure is None:
            sure = self._sure[branch.id] = _ask(branch) if branch.lists_xattrs else ((), 0)
        return sure

    # -- what is changed ----------------------------------------------------------------------------

    def check_changing(self, key: bytes, caller: Caller) -> None:
        """system.* is checked by each file system itself, not by the kernel (xattr_permission() in fs/xattr.c), but for
        POSIX ACLs; and we change it as root. So NFSv4 ACLs and their kind are root's. Raises EOPNOTSUPP."""
        self._check(key)
        if caller.uid != 0 and key.startswith(_SYSTEM_PREFIX) and not key.startswith(_ACL_PREFIX):
            raise os_error(errno.EOPNOTSUPP)

    def set(self, node: Node, key: bytes, value: bytes, flags: int, kill_sgid: bool) -> None:
        """Of an object on a writable branch. Parameters: UnionFs.setxattr."""
        name = self._kept(node, key)

        def change(target: syscalls.Object) -> None:
            if flags & os.XATTR_CREATE and self.sb.slot is not None:
                self.sb.slot.intend(1, syscalls.has_xattr(target, name))
            syscalls.setxattr(target, name, value, flags)
            if kill_sgid and key == _ACL_ACCESS:
                mode = os.stat(target).st_mode
                if mode & st_mod.S_ISGID:
                    syscalls.chmod(target, st_mod.S_IMODE(mode) & ~st_mod.S_ISGID)

        self._on_object(node, change)
        node.lacks = None
        self.sb.changes.data(node)

    def remove(self, node: Node, key: bytes) -> None:
        """Of an object on a writable branch."""
        name = self._kept(node, key)

        def change(target: syscalls.Object) -> None:
            if self.sb.slot is not None:
                self.sb.slot.intend(1, syscalls.has_xattr(target, name))
            syscalls.removexattr(target, name)

        self._on_object(node, change)
        self.sb.changes.data(node)

    # -- names and objects --------------------------------------------------------------------------

    def _check(self, key: bytes) -> None:
        """Raises EOPNOTSUPP."""
        if not self.sb.options.acl and key.startswith(_ACL_PREFIX):
            raise os_error(errno.EOPNOTSUPP)

    def _kept(self, node: Node, key: bytes) -> bytes:
        """The name that an attribute has on the object's branch. Raises EOPNOTSUPP for what is a mark there, or would
        be one on a copy."""
        if node.branch.overlay:
            return overlayattr.kept(key)
        if key == self.sb.redirect_key:
            raise os_error(errno.EOPNOTSUPP)
        return key

    def _on_object(self, node: Node, call: Callable[[syscalls.Object], T]) -> T:
        """`call` on the object itself: capabilities must not go to whatever has its name now."""
        fd, owned = self.sb.open_object(node)
        try:
            return call(self._target(node, fd))
        finally:
            if owned:
                unpin(fd)

    def _target(self, node: Node, fd: Fd) -> syscalls.Object:
        """What the calls take, of a descriptor of `open_object`."""
        return fd if node.handles or node.orphan_fd >= 0 else proc_path(fd)


def _ask(branch: Branch) -> _Sure:
    root = proc_path(branch.root_fd)
    prefixes = tuple(prefix for prefix in _LISTED if _knows(root, prefix + _ABSENT))
    bits = sum(bit for key, bit in XATTR_BITS.items() if key.startswith(prefixes))
    return prefixes, bits | _ACL_BITS | ALL_XATTRS


def _knows(root: bytes, absent: bytes) -> bool:
    """Whether nobody is told anything else than ENODATA: EOPNOTSUPP with nouser_xattr, say (mount(8))."""
    try:
        return getxattr(root, absent) is None
    except OSError:
        return False
