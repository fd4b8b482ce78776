"""Extended attributes of the names that overlayfs and fuse-overlayfs give their records of a layer's objects.

On a branch whose marks of overlayfs count they mean something, so nobody sees or sets them through the union. Those
that an object of the union has, of a union within it for instance, are kept with `overlay.` after the prefix
(Documentation/filesystems/overlayfs.rst, "Nesting overlayfs mounts"; ovl_xattr_escape_name() in fs/overlayfs/xattrs.c).
overlayfs does so with one prefix, which its mount option says; here all of them count, and so all of them are escaped.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final

from udbad.errors import os_error

PREFIXES: Final = (b"trusted.overlay.", b"user.overlay.", b"user.fuseoverlayfs.")
_ESCAPE: Final = b"overlay."
ESCAPED: Final = tuple(prefix + _ESCAPE for prefix in PREFIXES)
_XATTR_NAME_MAX: Final = 255  # linux/limits.h


def kept(key: bytes) -> bytes:
    """The name that an attribute of an object has on such a branch. Raises EOPNOTSUPP when that is too long."""
    for prefix in PREFIXES:
        if key.startswith(prefix):
            if len(key) + len(_ESCAPE) > _XATTR_NAME_MAX:
                raise os_error(errno.EOPNOTSUPP)
            return prefix + _ESCAPE + key[len(prefix) :]
    return key


def shown(names: Iterable[bytes]) -> list[bytes]:
    """The attributes of an object of which such a branch has these: without records, and named as they were set."""
    return [name for name in map(shown_as, names) if name]


def shown_as(name: bytes) -> bytes:
    """The name under which an attribute was set; empty for a record."""
    if name.startswith(ESCAPED):
        prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        return prefix + name[len(prefix) + len(_ESCAPE) :]
    return b"" if name.startswith(PREFIXES) else name
