"""rsync and tar carry a tree with everything a file system has out of a union and back; nothing differs."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.system.support import (
    Manifest,
    assert_same,
    below,
    each_mode,
    manifest,
    require,
    run,
    unchanged,
)

pytestmark = [pytest.mark.system, pytest.mark.fuse]

ODD_NAMES = [
    b" leading and trailing ",
    b"-rf",
    b"new\nline",
    b"tab\tand\x01control",
    b"not utf-8 \xff\xfe\x80",
    "ünïcödé 文件".encode(),
    b"quote'\"`$(x)\\",
    b"*?[a]",
    b".hidden",
    b".wha",
    b"wh-name",  # not "wh.name": the ".wh.name.XXXXXX" of rsync would be a whiteout, which is refused
    b"..three",
    b"~",
    # rsync writes to .NAME.XXXXXX first, and a union's names end at 242 bytes (semantics 1).
    b"n" * (242 - 8),
]
SPARSE_SIZE = 16 << 20
SPARSE_DATA = {0: b"begin", 5 << 20: b"middle", SPARSE_SIZE - 3: b"end"}
OLD_NS = 86_400_000_000_007
"""A day into 1970, with nanoseconds that no coarser time stamp can hold."""

_EFFECTIVE = 1
_VFS_CAP_REVISION_2 = 0x02000000


def capability(bits: int) -> bytes:
    """A security.capability value (linux/capability.h, struct vfs_cap_data revision 2)."""
    return struct.pack("<5I", _VFS_CAP_REVISION_2 | _EFFECTIVE, bits, 0, 0, 0)


def make_tree(tree: Path, label: bytes) -> None:
    """One directory with hard links, sparse files, ACLs, xattrs, special files and odd names."""
    tree.mkdir(parents=True)
    odd = os.fsencode(tree) + b"/odd"
    os.mkdir(odd)
    for n, name in enumerate(ODD_NAMES):
        if n % 3 == 2:
            os.mkdir(odd + b"/" + name)
            Path(os.fsdecode(odd + b"/" + name), "inside").write_bytes(label)
        else:
            Path(os.fsdecode(odd + b"/" + name)).write_bytes(label * n)
    os.symlink(b"nowhere/\xff\n" + label, odd + b"/dangling")
    os.symlink(b"../links", odd + b"/to-directory")

    links = tree / "links"
    links.mkdir()
    (links / "one").write_bytes(label * 5000)
    os.link(links / "one", links / "two")
    os.link(links / "one", links / "three")
    os.link(links / "one", tree / "elsewhere")

    (tree / "empty").mkdir(mode=0o1777)
    (tree / "empty").chmod(0o1777)
    (tree / "nothing").touch()
    with (tree / "sparse").open("wb") as file:
        for offset, data in SPARSE_DATA.items():
            file.seek(offset)
            file.write(data)

    special = tree / "special"
    special.mkdir()
    os.mkfifo(special / "fifo", 0o640)
    os.mknod(special / "null", 0o20666, os.makedev(1, 3))
    os.mknod(special / "block", 0o60600, os.makedev(259, 300_000))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        # The path of a socket has at most 107 bytes (unix(7)), and that of the test may be longer.
        here = os.open(special, os.O_PATH)
        server.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)

    owned = tree / "owned"
    owned.mkdir()
    for n, mode in enumerate((0o4755, 0o2755, 0o6711, 0o0000, 0o0444, 0o7777)):
        path = owned / f"mode{mode:o}"
        path.write_bytes(label)
        os.chown(path, 1000 + n, 4_000_000_000 - n)
        path.chmod(mode)
    os.chown(owned, 12345, 54321)
    owned.chmod(0o2775)

    with_xattrs = tree / "xattrs"
    with_xattrs.mkdir()
    (with_xattrs / "file").write_bytes(label)
    for path in (with_xattrs, with_xattrs / "file"):
        os.setxattr(path, "user.text", label)
        os.setxattr(path, "user.binary", bytes(range(256)))
        os.setxattr(path, "user.empty", b"")
        os.setxattr(path, "trusted.note", b"for root")
    (with_xattrs / "ping").write_bytes(b"#!/bin/sh\n")
    (with_xattrs / "ping").chmod(0o755)
    os.setxattr(with_xattrs / "ping", "security.capability", capability(1 << 13))
    (with_xattrs / "acl").write_bytes(label)
    run("setfacl", "-m", "u:1001:rw,g:1002:r,m::rw", with_xattrs / "acl")
    run("setfacl", "-m", "u:1001:rwx,d:u:1001:rwx,d:g:1002:rx,d:o::-", with_xattrs)

    for n, path in enumerate(sorted(tree.rglob("*"), reverse=True)):
        os.utime(path, ns=(OLD_NS, OLD_NS + n * 1_000_000_007), follow_symlinks=False)
    os.utime(tree, ns=(OLD_NS, OLD_NS))


def assert_sparse(path: Path) -> None:
    st = path.stat()
    assert st.st_size == SPARSE_SIZE
    assert st.st_blocks * 512 < SPARSE_SIZE // 8, f"{path} lost its holes: {st.st_blocks} blocks"


def rsync(source: Path, target: Path, *options: str) -> str:
    return run("rsync", "-aHAX", "--checksum", "--sparse", *options, f"{source}/", f"{target}/")


def tar(source: Path, target: Path, archive: Path) -> None:
    # raw: FUSE has no SEEK_HOLE here, so tar has to look for zeros itself.
    options = ["--xattrs", "--xattrs-include=*", "--acls", "--sparse", "--numeric-owner"]
    create = ["--format=posix", "--hole-detection=raw", "--sort=name", "--create", "--file", str(archive)]
    # Exit code 1 would mean "file changed as we read it"; a socket is left out with a message only.
    run("tar", *options, *create, "-C", str(source), ".")
    target.mkdir()
    run("tar", *options, "--extract", "--same-permissions", "--file", str(archive), "-C", str(target))
    archive.unlink()


def without_sockets(entries: Manifest) -> Manifest:
    """What tar can hold: no sockets, hence no modification time of the directory that had one."""
    return {path: entry for path, entry in entries.items() if entry.kind != "s"}


def archives_at_work(root: Path, outside: Path) -> None:
    """`root`/tree out by rsync and tar, back into `root`, and over an existing copy in `root`."""
    source = root / "tree"
    expected = manifest(source)
    rsync(source, outside / "rsync")
    assert_same(manifest(outside / "rsync"), expected, "rsync out of the union")
    assert rsync(source, outside / "rsync", "--dry-run", "--itemize-changes", "--delete") == ""
    rsync(outside / "rsync", root / "rsync")
    assert_same(manifest(root / "rsync"), expected, "rsync into the union")
    assert rsync(source, root / "rsync", "--dry-run", "--itemize-changes", "--delete") == ""

    tar(source, outside / "tar", outside / "out.tar")
    assert_same(manifest(outside / "tar"), without_sockets(expected), "tar out of the union")
    tar(outside / "tar", root / "tar", outside / "in.tar")
    assert_same(manifest(root / "tar"), without_sockets(expected), "tar into the union")
    for place in (outside / "rsync", outside / "tar", root / "rsync", root / "tar"):
        for tree in ("a", "b"):
            assert_sparse(place / tree / "sparse")

    # Over what the lower layers hold, with deletions: b's content replaces a's, name by name.
    run("rsync", "-aHAX", "--checksum", "--sparse", "--delete", f"{source}/b/", f"{source}/a/")
    assert_same(manifest(source / "a"), manifest(source / "b"), "rsync over a lower layer")


@each_mode
def test_rsync_and_tar(union: UnionFactory, udba: str, tmp_path: Path) -> None:
    require("rsync", "tar", "setfacl")
    make_tree(tmp_path / "base/tree/a", b"a")
    make_tree(tmp_path / "mid/tree/b", b"bb")
    make_tree(tmp_path / "base/tree/gone", b"g")
    (tmp_path / "base/tree/a/only here").write_text("the mirror of b must delete this")
    (tmp_path / "mid/tree/.wh.gone").touch(0o444)
    # rsync takes times within one second for equal where it could skip setting them: not now, that is.
    for touched in ("base/tree/a", "base/tree", "mid/tree"):
        os.utime(tmp_path / touched, ns=(OLD_NS, OLD_NS))
    (tmp_path / "outside").mkdir()
    mount = union({"top": "rw", "mid": "ro+wh", "base": "ro"}, udba)
    with unchanged(mount["mid"], mount["base"]):
        archives_at_work(mount.path, tmp_path / "outside")
        before = below(mount.path)
        assert b"tree/gone" not in before
        mount.remount()
        assert_same(below(mount.path), before, "after a remount")
