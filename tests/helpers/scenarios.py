"""The tree and the system calls of the comparison with a native directory (tests/t3_fuse/test_native_parity.py).

Scenarios run in a forked child with the ids of an Identity, their working directory in a tree that
`make_tree` made; see tests/helpers/posix.py. They must be deterministic: what depends on the time of day,
on inode numbers or on sizes of directories is not recorded.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path

from tests.helpers import scenarios_ranges
from tests.helpers.posix import EXCHANGE, NOREPLACE, Identity, Probe, Scenario, cached_mode, renameat2

ALICE, BOB, TEAM = 1001, 1002, 2000

IDENTITIES = (
    Identity("alice", ALICE, ALICE),
    Identity("bob-in-team", BOB, BOB, groups=(TEAM, 2001), umask=0o002),
    Identity("carol-of-team", 1003, TEAM, umask=0o077),
    Identity("root", 0, 0, umask=0),
)

# -- the tree ---------------------------------------------------------------------------------

_ACL_TAGS = {"user::": 1, "user:": 2, "group::": 4, "group:": 8, "mask": 16, "other": 32}
CAP_NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # vfs_cap_data, linux/capability.h


def acl(*entries: tuple[str, int, int]) -> bytes:
    """The value of system.posix_acl_*: (tag, permission bits, id), linux/posix_acl_xattr.h."""
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", _ACL_TAGS[tag], p, i & 0xFFFFFFFF) for tag, p, i in entries
    )


ACL = acl(
    ("user::", 7, -1), ("user:", 7, BOB), ("group::", 5, -1), ("group:", 6, 2001), ("mask", 7, -1), ("other", 0, -1)
)


def make_tree(root: Path) -> None:
    """Directories and files of every owner and mode that the scenarios need; runs as root."""

    def put(name: str, mode: int, uid: int = ALICE, gid: int = ALICE, text: str | None = "text") -> Path:
        path = root / name
        if text is None:
            path.mkdir()
        else:
            path.write_text(text)
        os.chown(path, uid, gid)
        path.chmod(mode)
        return path

    root.mkdir()
    root.chmod(0o755)
    put("own", 0o755, text=None)
    put("own/file", 0o644)
    put("own/readonly", 0o444)
    put("own/secret", 0o600)
    put("own/empty", 0o755, text=None)
    put("own/full", 0o755, text=None)
    put("own/full/child", 0o644)
    put("open", 0o777, text=None)
    put("open/file", 0o666)
    put("open/team", 0o660, ALICE, TEAM)
    put("open/teamread", 0o640, ALICE, TEAM)
    put("open/none", 0o000)
    put("open/other", 0o606, ALICE, TEAM)
    put("open/dir", 0o755, text=None)
    put("open/dir2", 0o777, text=None)
    put("open/full", 0o777, text=None)
    put("open/full/child", 0o666)
    put("group", 0o2775, 0, TEAM, text=None)
    put("group/file", 0o664, 0, TEAM)
    put("group/sub", 0o2775, 0, TEAM, text=None)
    put("sticky", 0o1777, 0, 0, text=None)
    put("sticky/alice", 0o666)
    put("sticky/bob", 0o666, BOB, BOB)
    put("sticky/bobdir", 0o777, BOB, BOB, text=None)
    put("stickyowned", 0o1777, ALICE, ALICE, text=None)
    put("stickyowned/bob", 0o666, BOB, BOB)
    put("stickyowned/root", 0o666, 0, 0)
    put("closed", 0o700, 0, 0, text=None)
    put("closed/file", 0o666)
    put("search", 0o711, 0, 0, text=None)
    put("search/file", 0o644)
    put("list", 0o744, 0, 0, text=None)
    put("list/file", 0o644)
    for name, mode in (("suid", 0o4777), ("sgid", 0o2777), ("both", 0o6777), ("lock", 0o2666), ("cap", 0o777)):
        os.setxattr(put(f"open/{name}", mode, ALICE, TEAM), "user.note", name.encode())
    os.setxattr(root / "open/cap", "security.capability", CAP_NET_RAW)
    put("acl", 0o770, text=None)
    os.setxattr(put("acl/file", 0o640), "system.posix_acl_access", ACL)
    for kind in ("access", "default"):
        os.setxattr(root / "acl", f"system.posix_acl_{kind}", ACL)
    put("links", 0o777, text=None)
    put("links/target", 0o666)
    os.link(root / "links/target", root / "links/hard")
    for name, target in (("soft", "target"), ("loop", "loop"), ("dangling", "made"), ("dir", "../open"), ("up", "..")):
        os.symlink(target, root / "links" / name)
        os.lchown(root / "links" / name, ALICE, ALICE)
    put("xattr", 0o777, text=None)
    for key in ("user.a", "user.empty", "trusted.t"):
        os.setxattr(put(f"xattr/{key}", 0o664, ALICE, TEAM), key, b"" if key == "user.empty" else b"value")
    os.mkfifo(root / "own/fifo")
    os.mknod(root / "own/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    for path in root.rglob("*"):
        os.utime(path, (1, 2), follow_symlinks=False)


# -- calls that have no function of one line ----------------------------------------------------


def create(path: str, mode: int, flags: int = os.O_EXCL) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | flags, mode))


def read(fd: int) -> bytes:
    return os.pread(fd, 100, 0)


def nothing(_fd: int) -> None:
    return None


def write(fd: int, data: bytes) -> int:
    return os.write(fd, data)


def pwrite(fd: int, data: bytes, offset: int) -> int:
    return os.pwrite(fd, data, offset)


def write_twice(fd: int) -> bytes:
    """write(2), then pwrite(2) at 0, which O_APPEND turns into an append (pwrite(2), BUGS)."""
    os.write(fd, b"one")
    os.pwrite(fd, b"two", 0)
    return b"%d" % os.fstat(fd).st_size


def unlink_and_use(path: str) -> tuple[object, ...]:
    fd = os.open(path, os.O_RDWR)
    try:
        os.unlink(path)
        os.write(fd, b"after")
        return os.fstat(fd).st_nlink, os.pread(fd, 100, 0), os.fstat(fd).st_size
    finally:
        os.close(fd)


def rename(src: str, dst: str, flags: int = 0) -> None:
    renameat2(os.fsencode(src), os.fsencode(dst), flags)


def set_times(path: str, atime_ns: int, mtime_ns: int) -> None:
    os.utime(path, ns=(atime_ns, mtime_ns), follow_symlinks=False)


def touch_now(path: str) -> None:
    os.utime(path)


def times(path: str) -> tuple[int, int]:
    info = os.lstat(path)
    return info.st_atime_ns, info.st_mtime_ns


def bind_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


def listed(path: str) -> list[str]:
    return sorted(os.listdir(path))


def xattrs(path: str) -> list[tuple[str, bytes]]:
    return [
        (key, os.getxattr(path, key, follow_symlinks=False))
        for key in sorted(os.listxattr(path, follow_symlinks=False))
    ]


# -- scenarios ------------------------------------------------------------------------------------

DIRECTORIES = ("own", "open", "group", "group/sub", "sticky", "acl", "closed", "search")


def create_modes(p: Probe) -> None:
    for directory in DIRECTORIES:
        for mode in (0o666, 0o777, 0o7777, 0o2755, 0o2745, 0o600, 0o000):
            p.do(create, f"{directory}/f{mode:o}", mode)
            p.stat(f"{directory}/f{mode:o}")


def mkdir_modes(p: Probe) -> None:
    for directory in DIRECTORIES:
        for mode in (0o777, 0o7777, 0o700, 0o2750):
            p.do(os.mkdir, f"{directory}/d{mode:o}", mode)
            p.do(create, f"{directory}/d{mode:o}/inside", 0o666)
            p.do(os.mkdir, f"{directory}/d{mode:o}/sub", 0o777)


def make_nodes(p: Probe) -> None:
    for directory in DIRECTORIES:
        p.do(os.mknod, f"{directory}/fifo2", stat.S_IFIFO | 0o666)
        p.do(os.mknod, f"{directory}/sock", stat.S_IFSOCK | 0o777)
        p.do(os.mknod, f"{directory}/reg", stat.S_IFREG | 0o6666)
        p.do(os.mknod, f"{directory}/chr", stat.S_IFCHR | 0o666, os.makedev(1, 7))
        p.do(os.mknod, f"{directory}/blk", stat.S_IFBLK | 0o660, os.makedev(250, 3))
        p.do(os.mknod, f"{directory}/dir", stat.S_IFDIR | 0o755)
        p.do(os.symlink, "x" * 300, f"{directory}/symlink")
        p.do(bind_socket, f"{directory}/bound")


def sticky_directories(p: Probe) -> None:
    for path in ("sticky/alice", "sticky/bob", "stickyowned/bob", "stickyowned/root"):
        p.do(rename, path, f"{path}.moved")
        p.do(os.unlink, path)
        p.do(os.unlink, f"{path}.moved")
    p.do(os.rmdir, "sticky/bobdir")
    p.do(create, "sticky/new", 0o666)
    p.do(rename, "sticky/new", "stickyowned/root")
    p.do(rename, "sticky/new", "sticky/bob")


def sticky_open(p: Probe) -> None:
    for path in ("sticky/alice", "sticky/bob", "stickyowned/bob"):  # fs.protected_regular, proc(5)
        p.fd(path, os.O_RDWR | os.O_CREAT, write, b"new")
        p.fd(path, os.O_RDWR, write, b"NEW")


def write_drops_privileges(p: Probe) -> None:
    for name in ("suid", "sgid", "both", "lock", "cap"):
        p.fd(f"open/{name}", os.O_WRONLY, write, b"x")
        p.stat(f"open/{name}")
        p.do(xattrs, f"open/{name}")


def append_drops_privileges(p: Probe) -> None:
    for name in ("suid", "sgid", "both", "lock", "cap"):
        p.fd(f"open/{name}", os.O_WRONLY | os.O_APPEND, write, b"x")
        p.stat(f"open/{name}")


def truncate_drops_privileges(p: Probe) -> None:
    for name in ("suid", "sgid", "both", "lock", "cap"):
        p.do(os.truncate, f"open/{name}", 2)
        p.stat(f"open/{name}")
        p.do(xattrs, f"open/{name}")


def open_trunc_drops_privileges(p: Probe) -> None:
    for name in ("suid", "sgid", "both", "lock", "cap"):
        p.fd(f"open/{name}", os.O_WRONLY | os.O_TRUNC, nothing)
        p.stat(f"open/{name}")
        p.do(xattrs, f"open/{name}")


def open_trunc_for_reading(p: Probe) -> None:
    """O_TRUNC empties a file whatever it is opened for (may_open, handle_truncate in fs/namei.c)."""
    for name in ("file", "suid", "sgid", "both", "lock", "cap", "team", "teamread", "none", "dir"):
        p.fd(f"open/{name}", os.O_RDONLY | os.O_TRUNC, read)
        p.stat(f"open/{name}")


def ftruncate_drops_privileges(p: Probe) -> None:
    for name in ("suid", "sgid", "both", "lock", "cap"):
        p.fd(f"open/{name}", os.O_WRONLY, os.ftruncate, 2)
        p.stat(f"open/{name}")


def chown_drops_privileges(p: Probe) -> None:
    for name in ("suid", "sgid", "both", "lock", "cap"):
        p.do(os.chown, f"open/{name}", -1, TEAM)
        p.stat(f"open/{name}")
        p.do(xattrs, f"open/{name}")


def chown_rights(p: Probe) -> None:
    p.do(create, "open/mine", 0o6777)
    for path in ("own/file", "open/mine", "group/file", "own/empty"):
        for uid, gid in ((-1, TEAM), (-1, 2001), (-1, 3000), (BOB, -1), (0, 0)):
            p.do(os.chown, path, uid, gid)
            p.stat(path)
    p.do(os.lchown, "links/soft", -1, TEAM)
    p.stat("links/soft")
    p.stat("links/target")


def chmod_rights(p: Probe) -> None:
    p.do(create, "open/mine", 0o666)
    p.do(create, "group/mine", 0o666)
    p.do(os.mkdir, "group/minedir", 0o777)
    for path in ("own/file", "open/mine", "group/mine", "group/minedir", "group/file", "own/empty", "links/soft"):
        for mode in (0o600, 0o6755, 0o2644, 0o1777, 0o000, 0o666):
            p.do(os.chmod, path, mode)
            p.stat(path)


def open_permissions(p: Probe) -> None:
    for path in ("own/file", "own/readonly", "own/secret", "open/team", "open/teamread", "open/none", "open/other"):
        p.fd(path, os.O_RDONLY, read)
        p.fd(path, os.O_WRONLY, write, b"w")
        p.fd(path, os.O_RDWR | os.O_TRUNC, write, b"trunc")
    for path in ("closed/file", "search/file", "list/file", "group/file", "acl/file", "closed", "own"):
        p.fd(path, os.O_RDONLY, nothing)
        p.fd(path, os.O_RDWR, nothing)


def access_rights(p: Probe) -> None:
    for path in (
        "own",
        "own/file",
        "own/readonly",
        "open/none",
        "open/team",
        "open/other",
        "closed",
        "closed/file",
        "search",
    ):
        for mode in range(8):
            p.do(os.access, path, mode)
            p.do(os.access, path, mode, effective_ids=True)


def directory_rights(p: Probe) -> None:
    for path in ("own", "closed", "search", "list", "group", "acl", "sticky"):
        p.do(listed, path)
        p.stat(f"{path}/file")
        p.stat(f"{path}/absent")
        p.do(listed, f"{path}/.")


def unlink_errors(p: Probe) -> None:
    for path in ("own/file", "own/empty", "own/full", "own/absent", "own/file/below", "closed/file", "search/file"):
        p.do(os.unlink, path)
    for path in (
        "own/file",
        "own/full",
        "own/absent",
        "open/.",
        "open/..",
        "own/empty",
        "open/full",
        "open/dir/",
        "links/dir",
    ):
        p.do(os.rmdir, path)
    for path in ("open/file/", "links/dir/", "links/soft", "group/file", "acl/file"):
        p.do(os.unlink, path)
    p.do(listed, "open")
    p.do(listed, "links")


def rename_errors(p: Probe) -> None:
    for src, dst in (
        ("open/dir", "open/full"),
        ("open/dir", "open/file"),
        ("open/file", "open/dir"),
        ("open/full", "open/full/child/x"),
        ("open/full", "open/full/below"),
        ("open/full/child", "open/full"),
        ("open/absent", "open/x"),
        ("open/file", "open/absent/x"),
        ("open/file", "open/team/x"),
        ("open/file", "open/new/"),
        ("open/file", "open/."),
        ("open/.", "open/x"),
        ("open/dir", "open/new/"),
        ("open/file", "closed/x"),
        ("closed/file", "open/x"),
        ("own/file", "open/x"),
        ("open/file", "own/x"),
        ("open/team", "open/team"),
        ("links/target", "links/hard"),
        ("links/soft", "links/moved"),
        ("links/loop", "open/loop"),
        ("own/empty", "open/empty"),
        ("open/dir", "group/dir"),
        ("group/sub", "open/sub"),
        ("open/dir2", "own/dir2"),
        ("open/team", "open/teamread"),
        ("open/none", "group/none"),
    ):
        p.do(rename, src, dst)
    for directory in ("open", "links", "own", "group"):
        p.do(listed, directory)


def rename_flags(p: Probe) -> None:
    p.do(rename, "open/file", "open/team", NOREPLACE)
    p.do(rename, "open/file", "open/fresh", NOREPLACE)
    p.do(rename, "open/absent", "open/fresh", NOREPLACE)
    p.do(rename, "open/team", "open/absent", EXCHANGE)
    p.do(rename, "open/team", "links/target", EXCHANGE)
    p.do(rename, "open/none", "open/dir2", EXCHANGE)
    p.do(rename, "links/soft", "open/other", EXCHANGE)
    p.do(rename, "own/file", "open/other", EXCHANGE)
    p.do(rename, "open/fresh", "open/team", NOREPLACE | EXCHANGE)
    p.do(rename, "open/full", "open/full/child", EXCHANGE)
    p.do(rename, "sticky/alice", "sticky/bob", EXCHANGE)


def hard_links(p: Probe) -> None:
    for src, dst in (
        ("links/target", "links/third"),
        ("links/target", "links/hard"),
        ("own/file", "open/linked"),
        ("open/file", "open/linked2"),
        ("open/dir", "open/linkeddir"),
        ("open/absent", "open/linked3"),
        ("open/file", "closed/linked"),
        ("open/suid", "open/linkedsuid"),
        ("open/file", "own/file/x"),
        ("links/soft", "links/soft2"),
        ("own/fifo", "open/fifo"),
    ):
        p.do(os.link, src, dst, follow_symlinks=False)
    for name in ("links/target", "links/hard", "links/third", "open/linked", "open/file", "open/linked2"):
        p.stat(name)
    p.fd("links/hard", os.O_WRONLY, write, b"through hard")
    p.fd("links/target", os.O_RDONLY, read)
    p.do(os.unlink, "links/target")
    p.stat("links/hard")
    p.do(os.chmod, "links/hard", 0o640)
    p.do(rename, "links/third", "links/target")
    p.stat("links/target")


def open_flags(p: Probe) -> None:
    for path in (
        "open/file",
        "open/dir",
        "links/soft",
        "links/loop",
        "links/dangling",
        "links/dir/file",
        "own/null",
        "open/new",
    ):
        for flags in (
            os.O_WRONLY | os.O_CREAT | os.O_EXCL,
            os.O_RDONLY | os.O_NOFOLLOW,
            os.O_RDONLY | os.O_DIRECTORY,
            os.O_PATH | os.O_NOFOLLOW,
            os.O_RDONLY | os.O_CREAT,
            os.O_RDWR | os.O_TRUNC,
        ):
            p.fd(path, flags | os.O_NONBLOCK, nothing)  # a FIFO would wait for its other end
    p.fd("links/loop/x", os.O_RDONLY, nothing)
    p.fd("open/file/x", os.O_RDONLY, nothing)
    p.fd("open/file/", os.O_RDONLY, nothing)
    p.fd("open/created/", os.O_RDWR | os.O_CREAT, nothing)
    p.fd("own/fifo", os.O_WRONLY | os.O_NONBLOCK, nothing)


def write_and_append(p: Probe) -> None:
    p.fd("open/file", os.O_RDWR | os.O_APPEND, write_twice)
    p.fd("open/file", os.O_RDONLY, read)
    p.fd("open/file", os.O_RDONLY, write, b"x")
    p.fd("open/file", os.O_WRONLY, read)
    p.fd("open/team", os.O_RDWR, pwrite, b"far", 10000)
    p.fd("open/other", os.O_RDWR | os.O_TRUNC, write, b"short")
    p.do(unlink_and_use, "open/file")
    p.do(unlink_and_use, "links/target")


def truncate_rights(p: Probe) -> None:
    for path in (
        "open/file",
        "own/file",
        "own/readonly",
        "open/none",
        "open/team",
        "acl/file",
        "open/dir",
        "own/fifo",
        "links/soft",
        "links/loop",
    ):
        for size in (2, 5000, -1):
            p.do(os.truncate, path, size)
        p.stat(path)
    p.fd("open/file", os.O_RDONLY, os.ftruncate, 1)
    p.fd("open/file", os.O_RDWR, os.ftruncate, 0)


def time_rights(p: Probe) -> None:
    for path in ("open/file", "own/file", "open/none", "own/empty", "links/soft", "own/fifo", "closed/file"):
        for stamps in ((1_500_000_000_123_456_789, 1_400_000_000_987_654_321), (10_000_000_000_000_000_001, 1)):
            p.do(set_times, path, *stamps)
            if p.outcomes[-1][1] is None:  # else the times are those of whoever looked last
                p.do(times, path)
        p.do(touch_now, path)


def user_xattrs(p: Probe) -> None:
    for path in (
        "xattr/user.a",
        "open/file",
        "own/file",
        "open/dir2",
        "sticky",
        "stickyowned",
        "links/soft",
        "own/fifo",
    ):
        p.do(os.setxattr, path, "user.k", b"value", follow_symlinks=False)
        p.do(os.setxattr, path, "user.k", b"again", os.XATTR_CREATE, follow_symlinks=False)
        p.do(os.setxattr, path, "user.k", b"another", os.XATTR_REPLACE, follow_symlinks=False)
        p.do(os.setxattr, path, "user.new", b"x", os.XATTR_REPLACE, follow_symlinks=False)
        p.do(os.setxattr, path, "user.made", b"x", os.XATTR_CREATE, follow_symlinks=False)
        p.do(os.setxattr, path, "user.empty", b"", follow_symlinks=False)
        p.do(os.setxattr, path, "user.huge", b"x" * 70000, follow_symlinks=False)
        p.do(os.setxattr, path, "nospace.k", b"v", follow_symlinks=False)
        p.do(os.setxattr, path, "trusted.k", b"v", follow_symlinks=False)
        p.do(os.setxattr, path, "security.k", b"v", follow_symlinks=False)
        p.do(os.setxattr, path, "security.capability", CAP_NET_RAW, follow_symlinks=False)
        p.do(xattrs, path)
        p.do(os.removexattr, path, "user.k", follow_symlinks=False)
        p.do(os.removexattr, path, "user.k", follow_symlinks=False)


def read_xattrs(p: Probe) -> None:
    for key in ("user.a", "user.empty", "trusted.t"):
        p.do(xattrs, f"xattr/{key}")
        for other in ("user.a", "user.absent", "trusted.t", "trusted.absent", "security.capability", "nospace.k"):
            p.do(os.getxattr, f"xattr/{key}", other)
    p.do(xattrs, "own/secret")
    p.do(os.getxattr, "own/secret", "user.absent")


def acl_checks(p: Probe) -> None:
    p.fd("acl/file", os.O_RDONLY, read)
    p.fd("acl/file", os.O_WRONLY, write, b"w")
    p.do(xattrs, "acl")
    p.do(xattrs, "acl/file")
    p.do(os.chmod, "acl/file", 0o604)
    p.do(xattrs, "acl/file")
    p.do(create, "acl/new", 0o666)
    p.do(os.mkdir, "acl/newdir", 0o777)
    p.do(create, "acl/newdir/new", 0o640)
    p.do(os.symlink, "x", "acl/newlink")
    for name in ("new", "newdir", "newdir/new"):
        p.stat(f"acl/{name}")
        p.do(xattrs, f"acl/{name}")
    for path in ("open/file", "own/file", "acl/newdir", "own/empty"):
        for kind in ("access", "default"):
            p.do(os.setxattr, path, f"system.posix_acl_{kind}", ACL)
            p.stat(path)
            p.do(xattrs, path)
            p.do(os.removexattr, path, f"system.posix_acl_{kind}")
    p.do(os.setxattr, "open/file", "system.posix_acl_access", b"nonsense")
    minimal = acl(("user::", 6, -1), ("group::", 4, -1), ("other", 4, -1))
    p.do(os.setxattr, "open/file", "system.posix_acl_access", minimal)
    p.do(xattrs, "open/file")
    p.stat("open/file")


def acl_costs_setgid(p: Probe) -> None:
    """Who is not in the file's group loses setgid with an access ACL (posix_acl_update_mode in fs/posix_acl.c)."""
    p.do(create, "group/mine", 0o666)
    p.do(os.chmod, "group/mine", 0o2775)
    for path in ("open/sgid", "open/both", "open/lock", "open/team", "group/mine"):
        for kind in ("default", "access"):
            p.do(os.setxattr, path, f"system.posix_acl_{kind}", ACL)
            p.do(cached_mode, path)
            p.do(os.removexattr, path, f"system.posix_acl_{kind}")
            p.do(cached_mode, path)
    p.do(os.mkdir, "group/dir", 0o777)
    for kind in ("default", "access"):
        p.do(os.setxattr, "group/dir", f"system.posix_acl_{kind}", ACL)
        p.do(cached_mode, "group/dir")


def symlinks(p: Probe) -> None:
    for directory in ("own", "open", "closed", "sticky"):
        p.do(os.symlink, "target", f"{directory}/s")
        p.do(os.readlink, f"{directory}/s")
        p.stat(f"{directory}/s")
    p.do(os.symlink, "", "open/emptytarget")
    p.do(os.symlink, "t" * 4095, "open/long")
    p.do(os.symlink, "t" * 4096, "open/longer")
    p.do(os.readlink, "open/file")
    p.do(os.chmod, "links/dangling", 0o600)
    p.fd("links/dangling", os.O_WRONLY | os.O_CREAT, write, b"made")
    p.stat("links/made")
    p.stat("links/up/own/file")


SCENARIOS: tuple[Scenario, ...] = (
    create_modes,
    mkdir_modes,
    make_nodes,
    sticky_directories,
    sticky_open,
    write_drops_privileges,
    append_drops_privileges,
    truncate_drops_privileges,
    open_trunc_drops_privileges,
    open_trunc_for_reading,
    ftruncate_drops_privileges,
    chown_drops_privileges,
    chown_rights,
    chmod_rights,
    open_permissions,
    access_rights,
    directory_rights,
    unlink_errors,
    rename_errors,
    rename_flags,
    hard_links,
    open_flags,
    write_and_append,
    truncate_rights,
    time_rights,
    user_xattrs,
    read_xattrs,
    acl_checks,
    acl_costs_setgid,
    symlinks,
    *scenarios_ranges.SCENARIOS,
)
