"""The replies of kernel/wire.py, taken apart again after linux/fuse.h; nothing of the packing is repeated here."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

import pytest

from udbad.branch.branches import Branch
from udbad.inodes.node import Dir, Layer, Node
from udbad.kernel import wire
from udbad.types import Perm

# struct fuse_attr: 6 words of 8 bytes, 10 of 4.
ATTR = "QQQqqqIIIIIIIIII"


@pytest.fixture
def branch() -> Branch:
    return Branch(0, 0, b"/b", Perm.RW, frozenset(), None, -1, -1, 1, "ext4")


def attr_of(raw: bytes) -> dict[str, int]:
    names = "ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags"
    assert len(raw) == 88
    return dict(zip(names.split(), struct.unpack("<" + ATTR, raw), strict=True))


def check_attr(found: dict[str, int], node: Node, st: os.stat_result) -> None:
    for name in ("size", "blocks", "mode", "nlink", "uid", "gid", "rdev", "blksize"):
        assert found[name] == getattr(st, f"st_{name}"), name
    for name in ("atime", "mtime", "ctime"):
        assert found[name] * 10**9 + found[f"{name}nsec"] == getattr(st, f"st_{name}_ns"), name
    assert (found["ino"], found["flags"]) == (node.id, 0)


# Before 1970 too: the seconds are negative, the nanoseconds never.
@pytest.mark.parametrize("mtime", [0, 1, 10**9, 1_700_000_000_123_456_789, -1, -1_500_000_000])
def test_attributes(tmp_path: Path, branch: Branch, mtime: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    os.utime(path, ns=(mtime, mtime))
    st = path.stat()
    node = Node(1 << 50 | 7, stat.S_IFREG, branch, st.st_dev, st.st_ino)
    raw = wire.attributes(node, st, 1.5)
    assert struct.unpack_from("<QII", raw) == (1, 500_000_000, 0)
    check_attr(attr_of(raw[16:]), node, st)
    raw = wire.entry(node, st, 2.25, 1e9)
    assert struct.unpack_from("<QQQQII", raw) == (node.id, 0, 2, 10**9, 250_000_000, 0)
    check_attr(attr_of(raw[40:]), node, st)
    assert len(raw) == wire.ENTRY_SIZE == len(wire.NO_ENTRY) == len(wire.negative(1.0))


@pytest.mark.parametrize("birth", [0, 1, 1_700_000_000_123_456_789])
def test_statx(tmp_path: Path, branch: Branch, birth: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    os.utime(path, ns=(-1, 1_700_000_000_123_456_789))
    st = path.stat()
    node = Node(1 << 50 | 7, stat.S_IFREG, branch, st.st_dev, st.st_ino)
    raw = wire.statx(node, st, 1.5, birth)
    # struct fuse_statx_out, then struct fuse_statx
    assert struct.unpack_from("<QIIQQ", raw) == (1, 500_000_000, 0, 0, 0)
    found = struct.unpack("<IIQIIIHHQQQQ" + "qIi" * 4 + "IIII14Q", raw[32:])
    assert len(raw) == 288
    mask, blksize, attributes, nlink, uid, gid, mode, _, ino, size, blocks, attributes_mask = found[:12]
    assert mask == 0x7FF | (0x800 if birth else 0)  # STATX_BASIC_STATS, STATX_BTIME
    assert (blksize, nlink, uid, gid) == (st.st_blksize, st.st_nlink, st.st_uid, st.st_gid)
    assert (mode, ino, size, blocks) == (st.st_mode, node.id, st.st_size, st.st_blocks)
    assert (attributes, attributes_mask) == (0, 0)
    times = [found[at] * 10**9 + found[at + 1] for at in (12, 15, 18, 21)]
    assert times == [st.st_atime_ns, birth, st.st_ctime_ns, st.st_mtime_ns]
    assert found[24:] == (0,) * 18
    device = Path("/dev/null").stat()
    assert struct.unpack_from("<II", wire.statx(node, device, 1.5, 0), 32 + 128) == (1, 3)


def test_links_and_times_that_only_the_union_knows(tmp_path: Path, branch: Branch) -> None:
    st = tmp_path.stat()
    node = Dir(5, [Layer(branch, st.st_dev, st.st_ino, st.st_nlink, -1)])
    node.nlink_extra, node.mtime_offset = 3, 2
    found = attr_of(wire.attributes(node, st, 0.0)[16:])
    assert found["nlink"] == st.st_nlink + 3
    assert found["mtime"] * 10**9 + found["mtimensec"] == st.st_mtime_ns + 2


@pytest.mark.parametrize("name", [b"a", b"1234567", b"12345678", b"x" * 242])
def test_dirent(name: bytes) -> None:
    raw = wire.dirent(77, stat.S_IFLNK, name, 1 << 40 | 9)
    ino, after, length, kind = struct.unpack_from("<QQII", raw)
    assert (ino, after, length, kind) == (77, 1 << 40 | 9, len(name), 10)  # DT_LNK
    assert raw[24:].rstrip(b"\0") == name
    assert len(raw) % 8 == 0
    assert len(raw) < 24 + len(name) + 8


def test_negative_entry() -> None:
    assert struct.unpack_from("<QQQQII", wire.negative(3.0)) == (0, 0, 3, 0, 0, 0)
