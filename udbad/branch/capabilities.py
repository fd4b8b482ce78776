"""What this process may do: the one place that tells root from an ordinary user.

Most of what only root may do is tried, and the kernel's refusal taken where it comes: a private mount of a branch
(accept.py), its flags (mountflags.py), the descriptor limit, devices (mknod(2) is EPERM, as natively). Here is what
has to be known before anything is tried. An ordinary user serves a union to himself alone: what is made in it is his,
as everything is that he does to the branches.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)

_VERSION_3: Final = 0x20080522
_CAP_SYS_ADMIN: Final = 1 << 21  # linux/capability.h

SYSTEM_RUN_DIR: Final = "/run/udbad"
SYSTEM_CONFIG: Final = "/etc/udbad/udbad.toml"


class Header(ctypes.Structure):
    """cap_user_header_t, capget(2)."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class Data(ctypes.Structure):
    """One half of cap_user_data_t, capget(2)."""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


DataPair = Data * 2


def header() -> Header:
    """Of the calling thread."""
    return Header(_VERSION_3, 0)


def read() -> tuple[int, int, int]:
    """Effective, permitted and inheritable capabilities of the calling thread, as bits. Raises OSError."""
    data = DataPair()
    if _libc.capget(ctypes.byref(header()), ctypes.byref(data)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return (
        data[0].effective | data[1].effective << 32,
        data[0].permitted | data[1].permitted << 32,
        data[0].inheritable | data[1].inheritable << 32,
    )


def acts_for_others() -> bool:
    """Whether objects get the owner that they are to have, whoever that is. Else everything is our own user's: copies
    of what belongs to others become his, and lose what set-id bits and file capabilities would then mean."""
    return os.geteuid() == 0


def may_trust() -> bool:
    """Whether `trusted.` attributes are ours to read and to set: CAP_SYS_ADMIN in the first user namespace (xattr(7)),
    which maps every number to itself."""
    if not read()[0] & _CAP_SYS_ADMIN:
        return False
    try:
        with open("/proc/self/uid_map", encoding="ascii") as lines:
            return lines.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return False


def may_mount() -> bool:
    """Whether mount(2) and /dev/fuse are ours to use. Without a /dev/fuse they are, for the error that it is."""
    device = "/dev/fuse"
    usable = os.access(device, os.R_OK | os.W_OK, effective_ids=True) or not os.path.exists(device)
    return usable and bool(read()[0] & _CAP_SYS_ADMIN)


def namespace_user() -> int | None:
    """Who is outside what root is in this user namespace; None in the first one, and for everybody else.

    A root that is an ordinary user outside may mount(2) and use the devices of file systems there, as rootless podman
    does, but the places of the system are not his.
    """
    if os.geteuid() != 0:
        return None
    try:
        with open("/proc/self/uid_map", encoding="ascii") as lines:
            inside, outside, count = map(int, lines.readline().split())
    except (OSError, ValueError):  # no such namespaces here, or nobody has given this one its ids
        return None
    return None if inside == outside == 0 and count == 0xFFFFFFFF else outside


def run_dir() -> str:
    """Where sockets and what is known of mounts go: root's place, or one of the user's own.

    What lies there is believed only where nobody else can have written it (control/private.py); so a name in /tmp,
    where there is nothing better, is no more than that.
    """
    user = os.geteuid() or namespace_user()
    if user is None:
        return SYSTEM_RUN_DIR
    place = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{user}"
    return f"{place}/udbad" if os.path.isdir(place) else f"/tmp/udbad-{user}"


def config_file() -> str:
    """The configuration of the daemon: root's, or the user's own (XDG Base Directory Specification)."""
    if os.geteuid() == 0:
        return SYSTEM_CONFIG
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(home, "udbad", "udbad.toml")
