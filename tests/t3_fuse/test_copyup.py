"""Copy-up through a mount: when it happens, what it keeps, who sees the new data (semantics 6.8 and 10.5).

What a failure leaves is in test_no_room.py.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.merge import diff, read_entry, snapshot
from tests.helpers.mount import UnionFactory, mounted
from tests.t3_fuse.live import PAST, debris, errno_of, file_system, lower, modes, names, opened

pytestmark = pytest.mark.fuse

CAP_NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # vfs_cap_data, linux/capability.h
ACL_OF_BOB = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in ((1, 7, 0xFFFFFFFF), (2, 6, 1002), (4, 5, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
)  # linux/posix_acl_xattr.h: user::rwx user:1002:rw- group::r-x mask::rwx other::---

LABEL = b"system_u:object_r:container_file_t:s0:c1,c2\0"


# -- when -------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_APPEND], ids=["rdwr", "wronly", "append"])
def test_open_for_writing_copies_nothing(union: UnionFactory, tmp_path: Path, udba: str, flags: int) -> None:
    lower(tmp_path)
    mount = union(None, udba)
    with opened(mount.path / "d/f", flags) as fd:
        os.fstat(fd)
        if flags & os.O_ACCMODE == os.O_RDWR:
            assert os.pread(fd, 4, 10) == b"abcd"
    assert names(mount["top"]) == []


@modes
def test_what_does_not_copy(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    os.mkfifo(tmp_path / "base/fifo")
    mount = union(None, udba)
    path = mount.path / "d/f"
    path.read_bytes()
    os.stat(path)
    os.access(path, os.W_OK)
    os.listxattr(path)
    assert errno_of(lambda: os.getxattr(path, "user.none")) == "ENODATA"
    with opened(path, os.O_RDONLY) as fd, mmap.mmap(fd, 16, mmap.MAP_PRIVATE) as private:
        private[0:1] = b"X"
        os.fsync(fd)
    with opened(mount.path / "fifo", os.O_RDWR) as fd:
        os.write(fd, b"x")
    os.listdir(mount.path / "d")
    assert names(mount["top"]) == []
    assert path.read_bytes() == b"0123456789abcdef"


CHANGES: dict[str, Callable[[Path], object]] = {
    "write": lambda path: path.open("r+b", buffering=0).write(b"x"),
    "append": lambda path: path.open("ab", buffering=0).write(b"x"),
    "truncate": lambda path: os.truncate(path, 4),
    "extend": lambda path: os.truncate(path, 100),
    "open-truncate": lambda path: path.write_bytes(b""),
    "chmod": lambda path: path.chmod(0o600),
    "chown": lambda path: os.chown(path, 5, 6),
    "utimes": lambda path: os.utime(path, (1, 2)),
    "setxattr": lambda path: os.setxattr(path, "user.k", b"v"),
    "removexattr": lambda path: os.removexattr(path, "user.note"),
    "link": lambda path: os.link(path, path.with_name("other")),
    "rename": lambda path: path.rename(path.with_name("other")),
}


@modes
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the lambdas leave closing to the reference count
def test_what_copies(union: UnionFactory, tmp_path: Path, udba: str, change: str) -> None:
    """The result is that of the same change made to a copy, and the lower branch stays as it is."""
    path = lower(tmp_path)
    os.setxattr(path, "user.note", b"kept")
    twin = tmp_path / "native/f"
    twin.parent.mkdir()
    subprocess.run(["cp", "-a", str(path), str(twin)], check=True, timeout=20)
    before = snapshot(tmp_path / "base")
    mount = union(None, udba)
    CHANGES[change](mount.path / "d/f")
    CHANGES[change](twin)
    assert diff(snapshot(twin.parent), snapshot(mount.path / "d"), ["mtime_ns"]) == []
    assert diff(before, snapshot(tmp_path / "base")) == []
    assert debris(mount["top"]) == []


# -- what is kept -----------------------------------------------------------------------------


@modes
def test_everything_is_copied(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Owner, mode with suid and sticky bits, times, xattrs of every class, ACL, capability; the parents' too."""
    path = lower(tmp_path, name="a/b/f")
    os.setxattr(path, "user.note", bytes(range(256)))
    os.setxattr(path, "trusted.t", b"")
    os.setxattr(path, "system.posix_acl_access", ACL_OF_BOB)
    os.setxattr(path.parent, "system.posix_acl_default", ACL_OF_BOB)
    os.setxattr(path.parent, "user.dir", b"x")
    # A label: without SELinux in the kernel an attribute as any other.
    os.setxattr(path, "security.selinux", LABEL)
    os.setxattr(path.parent, "security.selinux", LABEL)
    (path.parent / "link").symlink_to("f")
    os.setxattr(path.parent / "link", "security.selinux", LABEL, follow_symlinks=False)
    os.chown(path, 1001, 2001)
    os.setxattr(path, "security.capability", CAP_NET_RAW)
    os.chown(path.parent, 1003, 2003)
    path.parent.chmod(0o3771)
    for directory in (path, path.parent, path.parent.parent):
        os.utime(directory, ns=(PAST, PAST))
    old, old_parents = read_entry(os.fsencode(path)), [os.stat(p) for p in (path.parent, path.parent.parent)]
    mount = union(None, udba)
    top_root = mount["top"].stat().st_mtime_ns
    for name in ("a/b", "a/b/f", "a/b/link"):
        assert os.getxattr(mount.path / name, "security.selinux", follow_symlinks=False) == LABEL
        assert "security.selinux" in os.listxattr(mount.path / name, follow_symlinks=False)
    os.chmod(mount.path / "a/b/f", stat.S_IMODE(path.stat().st_mode))
    copied = mount["top"] / "a/b/f"
    assert read_entry(os.fsencode(copied)) == old
    for parent, was in zip((copied.parent, copied.parent.parent), old_parents, strict=True):
        now = parent.stat()
        assert (now.st_mode, now.st_uid, now.st_gid, now.st_mtime_ns) == (
            was.st_mode, was.st_uid, was.st_gid, was.st_mtime_ns
        )  # fmt: skip
    assert os.getxattr(copied.parent, "system.posix_acl_default") == ACL_OF_BOB
    assert os.getxattr(copied.parent, "user.dir") == b"x"
    assert os.getxattr(copied.parent, "security.selinux") == LABEL
    assert mount["top"].stat().st_mtime_ns == top_root
    os.chown(mount.path / "a/b/link", 5, 6, follow_symlinks=False)
    assert os.getxattr(copied.with_name("link"), "security.selinux", follow_symlinks=False) == LABEL
    os.setxattr(mount.path / "a/b/f", "security.selinux", b"other")
    assert os.getxattr(copied, "security.selinux") == os.getxattr(mount.path / "a/b/f", "security.selinux") == b"other"


@modes
def test_holes_stay_holes(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    path = lower(tmp_path, b"")
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, b"begin", 0)
        os.pwrite(fd, b"middle", 512 << 20)
        os.truncate(fd, 1 << 30)
    mount = union(None, udba)
    with opened(mount.path / "d/f", os.O_RDWR) as fd:
        os.pwrite(fd, b"B", 0)
        assert os.pread(fd, 6, 512 << 20) == b"middle"
    copied = (mount["top"] / "d/f").stat()
    assert copied.st_size == 1 << 30
    assert copied.st_blocks * 512 < 1 << 20


@modes
def test_special_files_and_symlinks(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    os.mkfifo(base / "fifo", 0o640)
    os.mknod(base / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (base / "link").symlink_to("nowhere/at all")
    (base / "dir").mkdir()
    mount = union(None, udba)
    for name in ("fifo", "null", "link", "dir"):
        inode = os.lstat(mount.path / name).st_ino
        os.chown(mount.path / name, 7, 8, follow_symlinks=False)
        now = os.lstat(mount.path / name)
        assert (now.st_ino, now.st_uid, now.st_gid) == (inode, 7, 8)
        copied, old = os.lstat(mount["top"] / name), os.lstat(base / name)
        assert (copied.st_mode, copied.st_rdev) == (old.st_mode, old.st_rdev)
        assert old.st_uid == 0
    assert os.readlink(mount.path / "link") == "nowhere/at all"
    (mount.path / "null").write_bytes(b"swallowed")
    assert debris(mount["top"]) == []


@modes
def test_reflink_on_one_file_system(tmp_path: Path, udba: str) -> None:
    """Sharing blocks: a copy-up of 64 MiB takes next to no space."""
    with file_system(tmp_path / "xfs", "xfs") as disk:
        (disk / "top").mkdir()
        (disk / "base").mkdir()
        (disk / "base/f").write_bytes(os.urandom(64 << 20))
        os.sync()
        before = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        with mounted([f"{disk}/top=rw", f"{disk}/base=ro"], tmp_path / "mnt", udba) as mount:
            with opened(mount.path / "f", os.O_RDWR) as fd:
                os.pwrite(fd, b"x", 5)
                os.fsync(fd)
            assert (disk / "top/f").stat().st_size == 64 << 20
            os.sync()
            after = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            assert before - after < 16 << 20
            assert (disk / "top/f").read_bytes()[6:] == (disk / "base/f").read_bytes()[6:]


@modes
def test_truncation_copies_only_what_stays(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """The rest could not be copied: the top has room for a mebibyte, the file has eight."""
    lower(tmp_path, os.urandom(8 << 20))
    with (
        file_system(tmp_path / "top", "tmpfs", "size=1m"),
        mounted([f"{tmp_path}/top=rw", f"{tmp_path}/base=ro"], tmp_path / "mnt", udba) as mount,
    ):
        os.truncate(mount.path / "d/f", 1000)
        assert (tmp_path / "top/d/f").read_bytes() == (tmp_path / "base/d/f").read_bytes()[:1000]
        with opened(mount.path / "d/f", os.O_RDWR) as fd:
            os.ftruncate(fd, 500)
        assert (mount.path / "d/f").stat().st_size == 500


# -- who sees the new data ----------------------------------------------------------------------


@modes
def test_descriptors_opened_before_see_the_new_data(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    mount = union(None, udba)
    path = mount.path / "d/f"
    with opened(path, os.O_RDONLY) as early, opened(path, os.O_RDWR) as idle, opened(path, os.O_RDWR) as writer:
        assert os.read(early, 4) == b"0123"
        os.pwrite(writer, b"ABCDEF", 4)
        assert os.read(early, 6) == b"ABCDEF"
        assert os.fstat(early).st_ino == os.fstat(writer).st_ino
        os.pwrite(idle, b"!", 0)
        assert os.pread(early, 4, 0) == b"!123"
        os.ftruncate(writer, 2)
        assert os.fstat(early).st_size == 2
        assert os.pread(early, 10, 0) == b"!1"
    assert (mount["top"] / "d/f").read_bytes() == b"!1"


@modes
def test_append_goes_to_the_end(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    mount = union(None, udba)
    flags = os.O_WRONLY | os.O_APPEND
    with opened(mount.path / "d/f", flags) as one, opened(mount.path / "d/f", flags) as two:
        os.write(one, b"1")
        os.write(two, b"2")
        os.write(one, b"3")
    assert (mount["top"] / "d/f").read_bytes() == b"0123456789abcdef123"


@modes
def test_deleted_file_that_is_open_is_written_to(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    mount = union(None, udba)
    path = mount.path / "d/f"
    with opened(path, os.O_RDWR) as writer, opened(path, os.O_RDONLY) as reader:
        path.unlink()
        assert os.read(reader, 4) == b"0123"
        os.pwrite(writer, b"ABCD", 4)
        assert os.read(reader, 4) == b"ABCD"
        os.ftruncate(writer, 6)
        assert os.fstat(reader).st_size == 6
        os.fchmod(writer, 0o600)
        assert stat.S_IMODE(os.fstat(reader).st_mode) == 0o600
        assert os.fstat(writer).st_nlink == 0
        assert names(mount["top"] / "d") == [".wh.f"]
        path.write_bytes(b"another file")
        assert os.pread(reader, 10, 0) == b"0123AB"
    assert path.read_bytes() == b"another file"
    assert (tmp_path / "base/d/f").read_bytes() == b"0123456789abcdef"
    assert debris(mount["top"]) == []


@modes
def test_deleted_directory_of_an_open_file(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    mount = union(None, udba)
    with opened(mount.path / "d/f", os.O_RDWR) as fd:
        (mount.path / "d/f").unlink()
        (mount.path / "d").rmdir()
        os.pwrite(fd, b"ABCD", 0)
        assert os.pread(fd, 6, 0) == b"ABCD45"
    assert names(mount["top"]) == [".wh.d"]
    assert debris(mount["top"]) == []


@modes
def test_shared_mapping_of_a_lower_file(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path, b"0" * 10000)
    mount = union(None, udba)
    with opened(mount.path / "d/f", os.O_RDWR) as fd, opened(mount.path / "d/f", os.O_RDONLY) as reader:
        with mmap.mmap(fd, 10000) as shared:
            shared[5000:5004] = b"ABCD"
            shared.flush()
        os.fsync(fd)
        assert os.pread(reader, 6, 4999) == b"0ABCD0"
    assert (mount["top"] / "d/f").read_bytes()[4999:5005] == b"0ABCD0"
    assert (tmp_path / "base/d/f").read_bytes() == b"0" * 10000


@modes
def test_private_and_read_only_mappings(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path, b"0" * 10000)
    mount = union(None, udba)
    with opened(mount.path / "d/f", os.O_RDONLY) as fd:
        with mmap.mmap(fd, 10000, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private:
            private[5000:5004] = b"ABCD"
            with opened(mount.path / "d/f", os.O_RDWR) as writer:
                os.pwrite(writer, b"1111", 5000)
            assert private[5000:5004] == b"ABCD"
        with mmap.mmap(fd, 10000, mmap.MAP_SHARED, mmap.PROT_READ) as shared:
            assert shared[4999:5005] == b"011110"
    assert (mount["top"] / "d/f").read_bytes()[4999:5005] == b"011110"


@modes
def test_direct_io(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    block = 4096
    lower(tmp_path, b"0" * (4 * block))
    mount = union(None, udba)
    with (
        opened(mount.path / "d/f", os.O_RDWR | os.O_DIRECT) as fd,
        opened(mount.path / "d/f", os.O_RDONLY) as buffered,
        mmap.mmap(-1, block) as memory,
    ):
        assert os.preadv(fd, [memory], block) == block
        assert memory[:] == b"0" * block
        assert os.pread(buffered, 1, block) == b"0"
        memory[:] = b"1" * block
        assert os.pwritev(fd, [memory], block) == block
        assert os.pread(buffered, block + 2, block - 1) == b"0" + b"1" * block + b"0"
    assert (mount["top"] / "d/f").read_bytes() == b"0" * block + b"1" * block + b"0" * (2 * block)


@modes
def test_direct_io_switched_off(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    mount = union(None, udba, "nodio")
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY):
        assert errno_of(lambda: os.open(mount.path / "d/f", flags | os.O_DIRECT)) == "EINVAL"  # noqa: B023  # called at once
    assert names(mount["top"]) == []
    assert (mount.path / "d/f").read_bytes() == b"0123456789abcdef"


# -- while it is under way ----------------------------------------------------------------------


FIFREEZE, FITHAW = 0xC0045877, 0xC0045878  # linux/fs.h


@modes
def test_the_mount_is_served_during_a_copy_up(tmp_path: Path, udba: str) -> None:
    """The target is frozen (FIFREEZE) in the middle of the copy, so it cannot end before the test lets it."""
    path = lower(tmp_path, b"")
    with path.open("wb") as stream:
        for _ in range(64):
            stream.write(os.urandom(4 << 20))
    (path.parent / "other").write_text("other")
    with (
        file_system(tmp_path / "top", "ext4") as disk,
        mounted([f"{disk}=rw", f"{tmp_path}/base=ro"], tmp_path / "mnt", udba) as mount,
    ):
        (mount.path / "d").chmod(0o755)  # the directory exists above: its part of the copy-up is not in question
        before = os.statvfs(disk).f_bfree
        child = os.fork()
        if child == 0:
            try:
                with opened(mount.path / "d/f", os.O_WRONLY) as fd:
                    os.pwrite(fd, b"x", 0)
                os._exit(0)
            finally:
                os._exit(1)
        try:
            deadline = time.monotonic() + 60
            # The copy has no name before it is whole (O_TMPFILE): it is seen by the room that it takes.
            while (before - os.statvfs(disk).f_bfree) * os.statvfs(disk).f_bsize < 1 << 20:
                assert time.monotonic() < deadline, "the copy-up has not begun"
            frozen = os.open(disk, os.O_RDONLY)
            fcntl.ioctl(frozen, FIFREEZE, 0)  # a program that does it would come too late on a busy machine
            try:
                assert not (disk / "d/f").exists(), "too small for this test: copied before the disk froze"
                assert (mount.path / "d/other").read_text() == "other"
                assert sorted(os.listdir(mount.path / "d")) == ["f", "other"]
                assert (mount.path / "d/f").stat().st_size == 256 << 20
                with opened(mount.path / "d/f", os.O_RDONLY) as fd:
                    assert os.pread(fd, 100, 1 << 20) == path.read_bytes()[1 << 20 : (1 << 20) + 100]
                assert mount.control({"op": "stats"})["open_handles"] >= 1
                assert os.waitpid(child, os.WNOHANG) == (0, 0)
                assert not (disk / "d/f").exists()
            finally:
                fcntl.ioctl(frozen, FITHAW, 0)
                os.close(frozen)
        finally:
            _, status = os.waitpid(child, 0)
        assert status == 0
        assert debris(disk) == []
        assert (disk / "d/f").stat().st_size == 256 << 20
        with (disk / "d/f").open("rb") as copy, path.open("rb") as source:
            assert copy.read(1) == b"x"
            source.seek(1)
            while chunk := source.read(1 << 20):
                assert copy.read(1 << 20) == chunk


@modes
def test_many_writers_make_one_copy(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path, b"0" * (8 << 20))
    mount = union(None, udba)
    children = []
    for i in range(8):
        child = os.fork()
        if child == 0:
            try:
                with opened(mount.path / "d/f", os.O_WRONLY) as fd:
                    os.pwrite(fd, b"%d" % i, i)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert (mount.path / "d/f").read_bytes() == b"01234567" + b"0" * ((8 << 20) - 8)
    assert debris(mount["top"]) == []
