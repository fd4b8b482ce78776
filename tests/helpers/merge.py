"""The merged tree computed straight from the branch directories, and the same shape read from a mount.

An oracle: it shares no code with udbad and may not import it. It follows semantics 4 and 5 with the
two decisions in which udbad differs from aufs: NAME beside `.wh.NAME` in one branch is visible (the
whiteout hides lower branches only), and the topmost opaque directory is the boundary. Pseudo-links (semantics
10.3) are followed: the file PLINKS/<number>.<inode>.<birth> of a branch stands for every name of that inode
on the branches below if it was born then.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

WH_PREFIX = b".wh."
OPAQUE = b".wh..wh..opq"
PLINKS = b".wh..wh.plnk"
REDIRECT = "trusted.overlay.redirect"
"""On a directory that was renamed: its path on the branches below. A mark, and so no attribute of the object."""
RECORDS = ("trusted.overlay.", "user.overlay.", "user.fuseoverlayfs.")
"""By these overlayfs and fuse-overlayfs note something in a layer: no attributes of an object, where they count."""
NFS_ACL = "system.nfs4_acl"
"""What a client of NFS makes of the mode: no attribute that anybody has set."""
NO_XATTRS = (("", b"not supported"),)
"""The extended attributes of an object where there are none."""
OVERLAY = 2
"""In the place of True, where it is asked whether the whiteouts of a branch count: those of overlayfs, too."""
MAX_NAME = 242
"""Longest name the union knows, bytes (semantics 1)."""

_TEMPORARY = re.compile(rb"\.wh\.\.wh\..+\.[0-9a-f]{4,}", re.DOTALL)


class InconsistentBranch(Exception):
    """A whiteout that is no regular file: the name beside it answers EIO (semantics 4.2)."""


@dataclass(frozen=True)
class Entry:
    """One visible object. Directories: size, nlink and mtime are None, they are no part of the promise.

    type: S_IFMT bits. mode: permission bits with suid, sgid, sticky. size in bytes, mtime in ns.
    nlink: only for a file with a single link on disk, else None. sha: sha256 of a regular file.
    """

    type: int
    mode: int
    uid: int
    gid: int
    size: int | None = None
    mtime_ns: int | None = None
    rdev: int = 0
    target: bytes | None = None
    sha: str | None = None
    nlink: int | None = None
    xattrs: tuple[tuple[str, bytes], ...] = field(default=())

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.type)


Tree = dict[bytes, Entry]
"""Path relative to the root of the union, without a leading slash -> what is there."""


def read_entry(path: bytes) -> Entry:
    """The object at `path`, itself and not what a symlink points to."""
    info = os.lstat(path)
    kind = stat.S_IFMT(info.st_mode)
    is_dir = stat.S_ISDIR(kind)
    sha = None
    if stat.S_ISREG(kind):
        with open(path, "rb", buffering=0) as stream:
            sha = hashlib.file_digest(stream, "sha256").hexdigest()
            xattrs = _xattrs(stream.fileno())  # by its descriptor: each path may be a request for every component
    else:
        xattrs = _xattrs(path)
    return Entry(
        type=kind,
        mode=stat.S_IMODE(info.st_mode),
        uid=info.st_uid,
        gid=info.st_gid,
        size=None if is_dir else info.st_size,
        mtime_ns=None if is_dir else info.st_mtime_ns,
        rdev=info.st_rdev if stat.S_ISCHR(kind) or stat.S_ISBLK(kind) else 0,
        target=os.readlink(path) if stat.S_ISLNK(kind) else None,
        sha=sha,
        nlink=1 if not is_dir and info.st_nlink == 1 else None,
        xattrs=xattrs,
    )


def _xattrs(file: bytes | int) -> tuple[tuple[str, bytes], ...]:
    follow = isinstance(file, int)  # with a descriptor there is nothing to follow, and no other value is allowed
    try:
        listed = os.listxattr(file, follow_symlinks=follow)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return NO_XATTRS
    names = sorted(name for name in listed if name not in (REDIRECT, NFS_ACL))
    return tuple((name, os.getxattr(file, name, follow_symlinks=follow)) for name in names)


def snapshot(path: Path) -> Tree:
    """The whole tree below `path` (not `path` itself) as any program sees it through readdir and stat."""
    tree: Tree = {}
    root = os.fsencode(path)
    todo = [b""]
    while todo:
        relative = todo.pop()
        names = os.listdir(os.path.join(root, relative))
        if len(names) != len(set(names)):
            raise AssertionError(f"a name is listed twice in {relative!r}: {sorted(names)!r}")
        for name in names:
            child = os.path.join(relative, name)
            tree[child] = read_entry(os.path.join(root, child))
            if tree[child].is_dir:
                todo.append(child)
    return tree


def _is_device(path: bytes) -> bool:
    """A whiteout of overlayfs; a file system of another kind cannot have it in the place of an object."""
    try:
        info = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def _is_opaque(path: bytes, whable: int) -> bool:
    if os.path.lexists(os.path.join(path, OPAQUE)):
        return True
    return whable == OVERLAY and any(
        name.endswith(".opaque") and os.getxattr(path, name) == b"y" for name in os.listxattr(path)
    )


def _is_whiteout(directory: bytes, name: bytes, whable: int) -> bool:
    if whable == OVERLAY and _is_device(os.path.join(directory, name)):
        return True
    try:
        info = os.lstat(os.path.join(directory, WH_PREFIX + name))
    except OSError:  # absent, or `.wh.NAME` longer than the branch's file system allows: no whiteout
        return False
    if not stat.S_ISREG(info.st_mode):
        raise InconsistentBranch(os.path.join(directory, WH_PREFIX + name))
    return True


def _redirected(path: bytes, tops: Sequence[tuple[bytes, int]]) -> list[tuple[bytes, int]] | None:
    """Where a directory that was renamed is on lower branches; None when it was not. tops: the roots."""
    try:
        target = os.getxattr(path, REDIRECT)
    except OSError:
        return None
    index = next(number for number, (root, _) in enumerate(tops) if path.startswith(root + b"/"))
    lower = list(tops[index + 1 :])
    for part in target.strip(b"/").split(b"/"):
        lower = resolve(lower, part, tops, stat.S_IFDIR)
    return lower


def resolve(
    directories: Sequence[tuple[bytes, int]],
    name: bytes,
    tops: Sequence[tuple[bytes, int]] = (),
    kind: int | None = None,
) -> list[tuple[bytes, int]]:
    """Where NAME of one merged directory lives, top first (the loop of semantics 4.2).

    directories: (path on the branch, whether the branch's whiteouts count, or OVERLAY). Several results only for a
    directory; none when the name is absent. tops: the roots of all branches, where directories may have been renamed.
    kind: what it is further up (S_IFDIR).
    Raises InconsistentBranch.
    """
    hits: list[tuple[bytes, int]] = []
    for directory, whable in directories:
        path = os.path.join(directory, name)
        try:
            found: int | None = stat.S_IFMT(os.lstat(path).st_mode)
        except FileNotFoundError:
            found = None
        whited = whable and _is_whiteout(directory, name, whable)
        if whable == OVERLAY and _is_device(path):
            break
        if found is not None and kind in (None, found):
            kind = found
            hits.append((path, whable))
            if not stat.S_ISDIR(found) or (whable and _is_opaque(path, whable)):
                break
            lower = _redirected(path, tops) if whable and tops else None
            if lower is not None:
                hits += lower
                break
        if whited:
            break
    return hits


def _plinks(branch: bytes) -> dict[tuple[int, int], bytes]:
    """Inode number and birth time (ns) on a lower branch -> the copy on this one."""
    directory = os.path.join(branch, PLINKS)
    if not os.path.isdir(directory):
        return {}
    found = {}
    for name in os.listdir(directory):
        _, inode, birth = name.split(b".")
        found[int(inode), int(birth)] = os.path.join(directory, name)
    return found


def _birth_ns(path: bytes) -> int:
    out = subprocess.run([b"stat", b"--format=%.9W", path], check=True, capture_output=True).stdout
    return int(out.replace(b".", b""))


def _content(path: bytes, branches: Sequence[bytes], plinks: Sequence[dict[tuple[int, int], bytes]]) -> bytes:
    """Where the data and attributes of the visible object `path` are: there, or in the copy that has its place."""
    info = os.lstat(path)
    if stat.S_ISDIR(info.st_mode):
        return path
    for branch, known in zip(branches, plinks, strict=True):
        if path.startswith(branch + b"/"):
            break
        if any(info.st_ino == inode for inode, _ in known):
            home = known.get((info.st_ino, _birth_ns(path)))
            if home is not None:
                return home
    return path


def merge(branches: Iterable[tuple[Path, int]]) -> Tree:
    """The union of `branches` (directory, whable: rw or +wh, as for `resolve`), top first, root itself left out."""
    tree: Tree = {}
    tops = [(os.fsencode(path), whable) for path, whable in branches]
    roots = [path for path, _ in tops]
    plinks = [_plinks(path) for path in roots]
    todo = [(b"", tops)]
    while todo:
        relative, directories = todo.pop()
        names = {name for directory, _ in directories for name in os.listdir(directory)}
        for name in names:
            if name.startswith(WH_PREFIX):
                continue
            hits = resolve(directories, name, tops)
            if not hits:
                continue
            child = os.path.join(relative, name)
            entry = read_entry(_content(hits[0][0], roots, plinks))
            if hits[0][1] == OVERLAY:
                entry = replace(entry, xattrs=tuple(one for one in entry.xattrs if not one[0].startswith(RECORDS)))
            tree[child] = entry
            if tree[child].is_dir:
                todo.append((child, hits))
    return tree


def diff(a: Tree, b: Tree, ignore: Iterable[str] = ()) -> list[str]:
    """What differs, one line each, [] when equal.

    ignore: names of Entry fields to leave out. A link count is compared only where both sides know it.
    """
    lines = [f"only in the first: {path!r}" for path in sorted(a.keys() - b.keys())]
    lines += [f"only in the second: {path!r}" for path in sorted(b.keys() - a.keys())]
    names = [f.name for f in fields(Entry) if f.name not in set(ignore)]
    for path in sorted(a.keys() & b.keys()):
        for name in names:
            left, right = getattr(a[path], name), getattr(b[path], name)
            if name == "nlink" and None in (left, right):
                continue
            if left != right:
                lines.append(f"{path!r}: {name} {left!r} != {right!r}")
    return lines


def temporary_names(top: Path) -> list[bytes]:
    """Paths below `top` that are temporary names of copy-ups and removals: what nothing may leave behind."""
    return [
        os.path.join(directory, name)
        for directory, subdirectories, files in os.walk(os.fsencode(top))
        for name in (*subdirectories, *files)
        if _TEMPORARY.fullmatch(name)
    ]
