"""Acting on a branch as the caller: file system ids, umask and the capabilities that go with them.

The kernel has checked the caller's permission on the mount already (default_permissions). Objects are
then created on the branch with the caller's fsuid and fsgid, so that owner, group of setgid
directories, default ACLs, reserved blocks and quota come out as on the branch's own file system, and
an object never exists with a wider owner or mode. setfsuid(2) away from 0 takes the file system
capabilities out of the effective set; DAC_OVERRIDE and FSETID are put back for creations, because
membership in supplementary groups was checked by the kernel (which has taken a setgid bit away where it
had to, vfs_prepare_mode) and is not known here. For writes nothing is put back:
without CAP_FSETID the branch drops suid, sgid and file capabilities as it does for any writer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from udbad.branch import capabilities, syscalls
from udbad.types import Caller

_libc = ctypes.CDLL(None, use_errno=True)

_CAP_DAC_OVERRIDE = 1 << 1
_CAP_DAC_READ_SEARCH = 1 << 2
_CAP_FSETID = 1 << 4
_CAP_SYS_RESOURCE = 1 << 24
_CAP_MKNOD = 1 << 27
_FS_CAPS = 0b1_1111 | 1 << 9 | 1 << 27 | 1 << 32  # CAP_FS_SET, include/linux/capability.h


def _data(effective: int, permitted: int, inheritable: int) -> ctypes.Array[capabilities.Data]:
    mask = 0xFFFFFFFF
    return capabilities.DataPair(
        capabilities.Data(effective & mask, permitted & mask, inheritable & mask),
        capabilities.Data(effective >> 32, permitted >> 32, inheritable >> 32),
    )


class Credentials:
    """Switches the event loop's thread to a caller and back.

    Built once per mount process: gives up CAP_SYS_RESOURCE for good, which would let callers exceed
    quota and use blocks reserved for root (ext4_has_free_clusters, dquot ignore_hardlimit). Threads
    started later inherit that. When not root, switching does nothing: everything is the user's own.
    """

    def __init__(self) -> None:
        self.privileged = capabilities.acts_for_others()
        self.groups = os.getgroups()
        os.umask(0)
        if not self.privileged:
            return
        effective, permitted, inheritable = capabilities.read()
        effective &= ~_CAP_SYS_RESOURCE
        keep = effective & (_CAP_DAC_OVERRIDE | _CAP_DAC_READ_SEARCH | _CAP_FSETID | _CAP_MKNOD)
        self._header = ctypes.byref(capabilities.header())
        self._creating = _data(effective & ~_FS_CAPS | keep, permitted, inheritable)
        self._passing = _data(effective & ~_CAP_FSETID, permitted, inheritable)
        self._usual = _data(effective, permitted, inheritable)
        _libc.capset(self._header, ctypes.byref(self._usual))
        self._creating_ref = ctypes.byref(self._creating)

    def creating(self, caller: Caller, mode: int) -> AbstractContextManager[None]:
        """Create objects of this mode as `caller`, with the caller's umask (ignored by the kernel under a default ACL).

        Nothing is switched where that makes no difference: not the umask, of which most callers have taken the bits
        out of the mode already, and no ids for root.
        """
        umask = mode & caller.umask
        others = self.privileged and (caller.uid != 0 or caller.gid != 0)
        return _Creating(self, caller, umask, others) if umask or others else _AS_WE_ARE

    def become(self, caller: Caller) -> None:
        """From now on act with the file system ids of somebody else."""
        syscalls.set_fs_ids(caller.uid, caller.gid)
        if caller.uid != 0:
            _libc.capset(self._header, self._creating_ref)

    def writing(self, uid: int, gid: int, group: int | None = None) -> AbstractContextManager[None]:
        """Change content as this user: suid, sgid and capabilities go as on a native file system.

        group: a supplementary group that matters (`sgid_group`).
        """
        return _Writing(self, uid, gid, group) if self.privileged and uid != 0 else _AS_WE_ARE

    @contextmanager
    def passing(self, uid: int, gid: int) -> Iterator[None]:
        """Give the kernel a file that this user has opened, and others may open: it goes on with these credentials.

        Never with CAP_FSETID, so that suid, sgid and capabilities go whoever writes.
        """
        if self.privileged and uid == 0:
            _libc.capset(self._header, ctypes.byref(self._passing))
            try:
                yield
            finally:
                _libc.capset(self._header, ctypes.byref(self._usual))
            return
        with self.writing(uid, gid):
            yield


class _AsWeAre:
    """Nothing is switched. nullcontext() says the same, and is interpreted."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_AS_WE_ARE = _AsWeAre()


class _Creating:
    """The `with` of `Credentials.creating`; a generator in its place would take several times as long."""

    __slots__ = ("_caller", "_creds", "_others", "_umask")

    def __init__(self, creds: Credentials, caller: Caller, umask: int, others: bool) -> None:
        self._creds = creds
        self._caller = caller
        self._umask = umask
        self._others = others

    def __enter__(self) -> None:
        if self._umask:
            os.umask(self._umask)
        if self._others:
            self._creds.become(self._caller)

    def __exit__(self, *_: object) -> None:
        if self._others:
            syscalls.set_fs_ids(0, 0)
        if self._umask:
            os.umask(0)


class _Writing:
    """The `with` of `Credentials.writing`, for the same reason."""

    __slots__ = ("_creds", "_gid", "_group", "_uid")

    def __init__(self, creds: Credentials, uid: int, gid: int, group: int | None) -> None:
        self._creds = creds
        self._uid = uid
        self._gid = gid
        self._group = group

    def __enter__(self) -> None:
        syscalls.set_fs_ids(self._uid, self._gid)
        if self._group is not None:
            try:
                syscalls.set_groups((self._group,))
            except BaseException:
                self.__exit__()
                raise

    def __exit__(self, *_: object) -> None:
        syscalls.set_fs_ids(0, 0)
        if self._group is not None:
            syscalls.set_groups(self._creds.groups)


def sgid_group(caller: Caller, st: os.stat_result) -> int | None:
    """The file's group, when the caller's being in it keeps the setgid bit through a write.

    That is so for files with setgid and without group execution (setattr_should_drop_sgid in fs/attr.c), which are
    rare enough for a look into /proc.
    """
    if st.st_mode & 0o2010 != 0o2000 or caller.uid == 0 or caller.gid == st.st_gid:
        return None
    return st.st_gid if in_group(caller, st.st_gid) else None


def in_group(caller: Caller, gid: int) -> bool:
    """Whether it is the caller's group, or one of his supplementary ones: /proc knows."""
    if caller.gid == gid:
        return True
    try:
        with open(f"/proc/{caller.pid}/status") as lines:
            for line in lines:
                if line.startswith("Groups:"):
                    return str(gid) in line.split()[1:]
    except OSError:
        pass
    return False
