"""Has the file system of a branch ask its server, for what it may have in caches of its own.

NFS and CIFS keep attributes for seconds (acregmax, acdirmax: nfs(5)) and names for as long as the attributes of their
directory stay the same. AT_STATX_FORCE_SYNC has attributes asked for; with a directory's, names in it are looked up
again. To open a directory does the same by close-to-open. Their caches are the kernel's, one for all processes, so that
it need not be done in the process of the mount. sshfs has caches in its own process, which nothing empties.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from udbad.branch import syscalls
from udbad.branch.beneath import open_directory


def freshen(top: str, paths: Iterable[str]) -> None:
    """paths: below `top`. What cannot be looked at is left: whoever asks for it next gets the same error."""
    below: dict[str, set[str]] = {}
    for path in paths:
        above, _, name = path.rstrip("/").rpartition("/")
        below.setdefault(above, set()).add(name)
    with contextlib.suppress(OSError):
        top_fd = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for above, names in below.items():
                _freshen_names(top_fd, [os.fsencode(name) for name in above.split("/") if name not in ("", ".")], names)
        finally:
            os.close(top_fd)


def _freshen_names(top_fd: int, above: list[bytes], names: set[str]) -> None:
    with contextlib.suppress(OSError):
        fd = open_directory(top_fd, above)
        try:
            os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd))
            for name in (".", *sorted(names)):
                syscalls.ask_server(fd, os.fsencode(name))
        finally:
            os.close(fd)
