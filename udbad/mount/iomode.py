"""io=: what of it can be, and why not."""

from __future__ import annotations

from udbad.branch.branches import BranchSet
from udbad.coherence.inotify import SILENT_FS
from udbad.settings.options import MountOptions
from udbad.types import Perm
from udbad.union.fs import COPYING

NO_PASSTHROUGH = "no passthrough: the kernel does not offer it (Linux 6.9, CONFIG_FUSE_PASSTHROUGH)"
NO_CACHED = "io=cached cannot be: the kernel does not offer it"


def why_not_cached(options: MountOptions, branches: BranchSet) -> str | None:
    """What needs to be told of each open(2), so that the kernel cannot open files by itself; None: nothing."""
    for branch in branches.branches:
        if branch.attrs & COPYING:
            return f"{branch.describe()} copies files up when they are opened"
        mode = branch.udba or ("none" if branch.perm is Perm.RR else options.udba)
        silent = mode == "notify" and branch.udba is None and _is_silent(branch.fs_type)
        if mode == "reval" or silent:
            return f"{branch.describe()} is served as reval, which looks at a file each time it is opened"
    if branches.close_may_fail and not options.ro:
        return "close(2) may have an error to tell on a branch that is written to"
    if not options.dio:
        return "nodio is about each open(2)"
    with open("/proc/self/fdinfo/0", encoding="ascii") as stream:
        if "ino:" not in stream.read():
            return "who has a file open cannot be found out (Linux 5.14)"
    return None


def _is_silent(fs_type: str) -> bool:
    return fs_type in SILENT_FS or fs_type.startswith("fuse")
