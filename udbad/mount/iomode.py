"""io=: what of it can be, and why not."""

from __future__ import annotations

from udbad.branch.branches import BranchSet
from udbad.coherence.inotify import SILENT_FS
from udbad.settings.options import MountOptions
from udbad.types import Perm
from udbad.union.fs import COPYING

NO_PASSTHROUGH = "no passthrough: the kernel does not offer it (Linux 6.9, CONFIG_FUSE_PASSTHROUGH)"
NO_CACHED = "io=cached cannot be: the kernel does not offer it"


def possible(options: MountOptions, branches: BranchSet, portable: bool) -> tuple[str, list[str]]:
    """What to agree on with the kernel, and a line for each reason why it is not all that was asked for.

    portable: requests come through pyfuse3.
    """
    io = options.io
    if portable:
        return "requests", [] if io in ("auto", "requests") else [f"io={io} cannot be through pyfuse3"]
    if io == "auto":
        io = _suits(options, branches)
    if io == "passthrough":
        copying = [branch.describe() for branch in branches.branches if branch.attrs & COPYING]
        return io, [f"no passthrough on branch {name}: its files are copied up when opened" for name in copying]
    if io == "cached":
        reason = _why_not_cached(options, branches)
        if reason is not None:
            return "requests", [f"io=cached cannot be: {reason}"]
    return io, []


def _suits(options: MountOptions, branches: BranchSet) -> str:
    """What takes least CPU time, as measured (docs/modes.md): a pool is for large files that are written to, and over
    branches that are only read the same files are opened again and again, where that may be cached."""
    if not options.ro and all(branch.perm is Perm.RW for branch in branches.branches):
        return "passthrough"
    return "cached" if _why_not_cached(options, branches) is None else "requests"


def _why_not_cached(options: MountOptions, branches: BranchSet) -> str | None:
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
