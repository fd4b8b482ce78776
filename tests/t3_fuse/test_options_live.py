"""What the mount options and branch attributes of semantics 2, 3 and 7 do to a live mount."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.leaks import mount_on
from tests.helpers.merge import diff, snapshot
from tests.helpers.mount import Mount, UnionFactory, mounted
from tests.helpers.posix import EXCHANGE, renameat2
from tests.t3_fuse.live import debris, errno_of, file_system, modes, names
from udbad.branch.accept import open_branches
from udbad.branch.spec import parse_branches
from udbad.types import Perm
from udbad.union.xattrs import selinux_enabled

pytestmark = pytest.mark.fuse


def fill(tmp_path: Path) -> None:
    """file and dir on each branch, lower and lowerdir on base only."""
    for branch in ("top", "base"):
        (tmp_path / branch / "dir").mkdir(parents=True)
        (tmp_path / branch / "file").write_text(branch)
    (tmp_path / "base/lower").write_text("lower")
    (tmp_path / "base/lowerdir").mkdir()
    (tmp_path / "base/lowerdir/in").write_text("in")


def mount_line(mount: Mount) -> tuple[set[str], str]:
    """Options of the mount and the name of its source, as /proc/self/mountinfo shows them."""
    found = mount_on(mount.path)
    return {*found.options, *found.super_options}, found.source


# -- ro ---------------------------------------------------------------------------------------


def changes(root: Path) -> dict[str, Callable[[], object]]:
    """Every operation that changes something, on what `fill` has made."""
    file, lower, directory = root / "file", root / "lower", root / "dir"
    return {
        "create": lambda: os.open(root / "new", os.O_CREAT | os.O_RDONLY),
        "open for writing": lambda: os.open(file, os.O_WRONLY),
        "open lower for writing": lambda: os.open(lower, os.O_RDWR),
        "open with O_TRUNC": lambda: os.open(file, os.O_WRONLY | os.O_TRUNC),
        "truncate": lambda: os.truncate(file, 1),
        "mkdir": (root / "new").mkdir,
        "mkdir below": (directory / "new").mkdir,
        "mknod": lambda: os.mkfifo(root / "new"),
        "symlink": lambda: (root / "new").symlink_to("x"),
        "link": lambda: os.link(file, root / "new"),
        "unlink": file.unlink,
        "unlink lower": lower.unlink,
        "rmdir": directory.rmdir,
        "rename": lambda: file.rename(root / "new"),
        "rename over": lambda: file.rename(lower),
        "exchange": lambda: renameat2(os.fsencode(file), os.fsencode(lower), EXCHANGE),
        "chmod": lambda: file.chmod(0o600),
        "chmod directory": lambda: directory.chmod(0o700),
        "chmod root": lambda: root.chmod(0o700),
        "chown": lambda: os.chown(lower, 1, 1),
        "utime": lambda: os.utime(file),
        "setxattr": lambda: os.setxattr(file, "user.k", b"v"),
        "removexattr": lambda: os.removexattr(file, "user.k"),
    }


@modes
def test_ro(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    before = {branch: snapshot(tmp_path / branch) for branch in ("top", "base")}
    mount = union(None, udba, "ro")
    assert "ro" in mount_line(mount)[0]
    failed = {what: errno_of(call) for what, call in changes(mount.path).items()}
    assert failed == dict.fromkeys(failed, "EROFS")
    assert (mount.path / "file").read_text() == "top"
    assert (mount.path / "lower").read_text() == "lower"
    assert os.access(mount.path / "file", os.R_OK)
    assert not os.access(mount.path / "file", os.W_OK)
    for branch, tree in before.items():
        assert diff(tree, snapshot(tmp_path / branch)) == [], "not even the administrative names are made"


@modes
def test_no_writable_branch(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """A rw mount of read-only branches: the same EROFS, from us. Times of a special file aside, aufs(5)."""
    fill(tmp_path)
    before = {branch: snapshot(tmp_path / branch) for branch in ("top", "base")}
    mount = union({"top": "ro", "base": "ro"}, udba)
    calls = changes(mount.path)
    del calls["removexattr"]  # there is none: ENODATA or EROFS, who asks first
    failed = {what: errno_of(call) for what, call in calls.items()}
    assert failed == {**dict.fromkeys(failed, "EROFS"), "rmdir": failed["rmdir"]}
    for branch, tree in before.items():
        assert diff(tree, snapshot(tmp_path / branch)) == []


# -- attributes -------------------------------------------------------------------------------


@pytest.mark.skipif(selinux_enabled(), reason="with SELinux each file has a label, which the kernel knows")
@modes
def test_ls_asks_one_file_for_its_label(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """And none for its ACL, which the kernel has since the first time, where it may keep what it is told."""
    (tmp_path / "base/d").mkdir(parents=True)
    for number in range(20):
        (tmp_path / f"base/d/{number}").touch()
    mount = union(None, udba)

    def asked() -> int:
        subprocess.run(["ls", "-l", mount.path / "d"], check=True, stdout=subprocess.DEVNULL)
        before = mount.requests().get("getxattr", 0)
        subprocess.run(["ls", "-l", mount.path / "d"], check=True, stdout=subprocess.DEVNULL)
        return mount.requests()["getxattr"] - before

    acls = 22 if udba == "reval" else 0  # the directory, which ls(1) looks at first, has two
    assert asked() == acls + 1
    mount.remount("labels")
    assert asked() == acls + 21
    mount.remount("nolabels")
    os.setxattr(mount.path / "d/0", "security.selinux", b"a_u:a_r:a_t")
    assert os.getxattr(mount.path / "d/0", "security.selinux") == b"a_u:a_r:a_t"
    assert errno_of(lambda: os.getxattr(mount.path / "d/1", "security.selinux")) == "EOPNOTSUPP"
    assert errno_of(lambda: os.removexattr(mount.path / "d/1", "security.selinux")) == "ENODATA"


# -- whiteouts and directories ------------------------------------------------------------------


@modes
def test_shwh_shows_whiteouts(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    (tmp_path / "top/.wh.lower").touch()
    (tmp_path / "top/dir/.wh..wh..opq").touch()
    layers = {"top": "ro+wh", "base": "ro+wh"}
    mount = union(layers, udba, "shwh")
    assert sorted(os.listdir(mount.path)) == [".wh.lower", "dir", "file", "lowerdir"]
    assert stat.S_ISREG((mount.path / ".wh.lower").stat().st_mode)
    numbers = {entry.name: entry.inode() for entry in os.scandir(mount.path)}
    assert numbers[".wh.lower"] == (mount.path / ".wh.lower").stat().st_ino
    assert not (mount.path / "lower").exists()
    assert errno_of(lambda: os.stat(mount.path / ".wh.absent")) == "ENOENT"
    assert errno_of((mount.path / ".wh.lower").unlink) in ("EPERM", "EROFS")
    assert errno_of((mount.path / ".wh.new").touch) in ("EPERM", "EROFS")
    mount.remount("noshwh")
    assert sorted(os.listdir(mount.path)) == ["dir", "file", "lowerdir"]
    assert errno_of(lambda: os.stat(mount.path / ".wh.lower")) == "EPERM"


@modes
@pytest.mark.parametrize("dirwh", [0, 1, 3, 20])
def test_dirwh(union: UnionFactory, tmp_path: Path, udba: str, dirwh: int) -> None:
    """However many whiteouts the removed directory had: gone at once, without debris at the latest at the unmount."""
    for directory in ("d", "e"):
        (tmp_path / "base" / directory).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "base" / directory / f"f{i}").touch()
    mount = union(None, udba, f"dirwh={dirwh}")
    for i in range(10):
        (mount.path / "d" / f"f{i}").unlink()
        (mount.path / "e" / f"f{i}").unlink()
    (mount.path / "new").mkdir()
    (mount.path / "d").rmdir()
    assert os.listdir(mount.path / "e") == []
    (mount.path / "new").rename(mount.path / "e")
    assert sorted(os.listdir(mount.path)) == ["e"]
    assert os.listdir(mount.path / "e") == []
    (mount.path / "d").mkdir()
    assert os.listdir(mount.path / "d") == []
    mount.unmount()
    assert names(mount["top"]) == ["d", "e"]
    assert os.listdir(mount["top"] / "d") == os.listdir(mount["top"] / "e") == [".wh..wh..opq"]
    assert debris(mount["top"]) == []


@modes
@pytest.mark.parametrize(
    ("options", "marked"), [("", False), ("diropq=w", False), ("diropq=a", True), ("diropq=always", True)]
)
def test_diropq(union: UnionFactory, tmp_path: Path, udba: str, options: str, marked: bool) -> None:
    (tmp_path / "base/later").mkdir(parents=True)
    mount = union(None, udba, options)
    (mount.path / "new").mkdir()
    assert (mount["top"] / "new/.wh..wh..opq").exists() == marked
    (mount.path / "new").rename(mount.path / "moved")
    assert (mount["top"] / "moved/.wh..wh..opq").exists() == marked
    assert os.listdir(mount.path / "moved") == []


# -- copy-up on open ----------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("attribute", ["coo_reg", "coo_all"])
def test_copy_up_on_open(union: UnionFactory, tmp_path: Path, udba: str, attribute: str) -> None:
    fill(tmp_path)
    (tmp_path / "base/link").symlink_to("lower")
    os.mkfifo(tmp_path / "base/fifo")
    mount = union({"top": "rw", "base": f"ro+{attribute}"}, udba)
    assert (mount.path / "lower").stat().st_size == 5
    assert names(mount["top"]) == ["dir", "file"], "stat is no open"
    inode = (mount.path / "lower").stat().st_ino
    assert (mount.path / "lower").read_text() == "lower"
    assert (mount.path / "lower").stat().st_ino == inode
    assert (mount["top"] / "lower").read_text() == "lower"
    assert os.listdir(mount.path / "lowerdir") == ["in"]
    assert (mount["top"] / "lowerdir").exists() == (attribute == "coo_all")
    os.readlink(mount.path / "link")
    os.close(os.open(mount.path / "fifo", os.O_RDWR))
    assert not {"link", "fifo"} & set(names(mount["top"]))
    assert (tmp_path / "base/lower").read_text() == "lower"
    assert debris(mount["top"]) == []


@modes
def test_copy_up_on_open_goes_to_the_nearest(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Whatever cpup= says; from a writable branch too; once, not on to the branch above."""
    for branch, permission in (("mid", "rw+coo_reg"), ("base", "ro+coo_reg")):
        (tmp_path / branch).mkdir()
        (tmp_path / branch / branch).write_text(permission)
    mount = union({"top": "rw", "other": "rw", "mid": "rw+coo_reg", "base": "ro+coo_reg"}, udba, "cpup=tdp")
    assert (mount.path / "mid").read_text() == "rw+coo_reg"
    assert names(mount["other"]) == ["mid"]
    assert (mount.path / "base").read_text() == "ro+coo_reg"
    assert names(mount["top"]) == []
    assert (mount["mid"] / "base").exists() or (mount["other"] / "base").exists()


@modes
def test_move_up_on_open(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    mount = union({"top": "rw", "base": "rw+moo"}, udba)
    inode = (mount.path / "lower").stat().st_ino
    with (mount.path / "lower").open("rb") as stream:
        assert stream.read() == b"lower"
        assert not (mount["base"] / "lower").exists()
        assert (mount["top"] / "lower").read_text() == "lower"
    assert (mount.path / "lower").stat().st_ino == inode
    assert (mount.path / "lower").read_text() == "lower"
    assert os.listdir(mount.path / "lowerdir") == ["in"]
    assert not (mount["top"] / "lowerdir").exists()
    (mount.path / "lower").unlink()
    assert names(mount["top"]) == ["dir", "file"]


# -- permissions of branches ----------------------------------------------------------------------


@pytest.fixture
def squashfs(tmp_path: Path) -> Iterator[Path]:
    """A read-only medium with `file` and `d/in`."""
    (tmp_path / "tree/d").mkdir(parents=True)
    (tmp_path / "tree/file").write_text("medium")
    (tmp_path / "tree/d/in").write_text("in")
    os.chown(tmp_path / "tree/d/in", 12, 34)
    words = ["mksquashfs", str(tmp_path / "tree"), str(tmp_path / "image"), "-quiet", "-no-progress"]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    (tmp_path / "medium").mkdir()
    words = ["mount", "-t", "squashfs", "-o", "loop,ro", str(tmp_path / "image"), str(tmp_path / "medium")]
    subprocess.run(words, check=True, timeout=60)
    try:
        yield tmp_path / "medium"
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "medium")], check=True, timeout=60)


@modes
def test_files_of_others_on_a_medium_without_acls(tmp_path: Path, squashfs: Path, udba: str) -> None:
    """Who does not own a file may open it all the same: the kernel asks for its ACL first."""
    (tmp_path / "top").mkdir()
    with mounted([f"{tmp_path}/top", str(squashfs)], tmp_path / "mnt", udba) as mount:
        assert (mount.path / "d/in").stat().st_uid == 12
        assert (mount.path / "d/in").read_text() == "in"
        with pytest.raises(OSError, match="No data available"):
            os.getxattr(mount.path / "d/in", "system.posix_acl_access")


@modes
def test_default_permissions(tmp_path: Path, squashfs: Path, udba: str) -> None:
    """The first branch is rw, the others ro, a medium that cannot change rr, which nobody watches or asks again."""
    for name in ("top", "base", "mnt"):
        (tmp_path / name).mkdir()
    text = f"{tmp_path}/top:{tmp_path}/base:{squashfs}"
    branches = open_branches(parse_branches(text), False, os.fsencode(tmp_path / "mnt"))
    assert [branch.perm for branch in branches.branches] == [Perm.RW, Perm.RO, Perm.RR]
    branches.close()
    with mounted([f"{tmp_path}/top", f"{tmp_path}/base", str(squashfs)], tmp_path / "mnt", udba) as mount:
        assert (mount.path / "file").read_text() == "medium"
        watches = mount.control({"op": "stats"})["coherence"]["watches"]
        assert (mount.path / "d/in").read_text() == "in"
        assert mount.control({"op": "stats"})["coherence"]["watches"] == watches
        (mount.path / "file").write_text("changed")
        (mount.path / "d/in").unlink()
        assert (tmp_path / "top/file").read_text() == "changed"
        assert names(tmp_path / "top/d") == [".wh.in"]
        if udba != "none":
            (tmp_path / "base/d").mkdir()
            (tmp_path / "base/d/direct").touch()
            mount.flush()
            assert os.listdir(mount.path / "d") == ["direct"]


@modes
def test_whiteouts_of_a_ro_branch_count_only_with_wh(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    (tmp_path / "mid").mkdir()
    (tmp_path / "mid/.wh.lower").touch()
    mount = union({"top": "rw", "mid": "ro+wh", "base": "ro"}, udba)
    assert not (mount.path / "lower").exists()
    other = union({"top2": "rw", "mid": "ro", "base": "ro"}, udba, mount_point="mnt2")
    assert (other.path / "lower").read_text() == "lower"
    assert sorted(os.listdir(other.path)) == ["dir", "file", "lower", "lowerdir"]


@modes
def test_nolwh_makes_whiteouts_of_their_own(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    mount = union({"top": "rw+nolwh", "base": "ro"}, udba)
    (mount.path / "lower").unlink()
    info = (mount["top"] / ".wh.lower").stat()
    assert (info.st_nlink, stat.S_IMODE(info.st_mode), info.st_size) == (1, 0o444, 0)
    assert not (mount["top"] / ".wh..wh.aufs").exists()


@modes
def test_whiteouts_are_links_otherwise(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    mount = union(None, udba)
    (mount.path / "lower").unlink()
    assert (mount["top"] / ".wh.lower").samefile(mount["top"] / ".wh..wh.aufs")


# -- what the kernel decides ----------------------------------------------------------------------


@modes
def test_generic_options(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    (tmp_path / "base/true").write_bytes(Path("/bin/true").read_bytes())
    (tmp_path / "base/true").chmod(0o4755)
    os.mknod(tmp_path / "base/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    mount = union(None, udba, "noatime,nosuid,nodev,noexec,sync,dirsync,nodiratime,lazytime,fsname=the pool")
    options, source = mount_line(mount)
    assert {"rw", "noatime", "nosuid", "nodev", "noexec", "nodiratime"} <= options
    assert {"sync", "dirsync", "allow_other", "default_permissions"} <= options
    assert source == "the pool"
    flags = os.statvfs(mount.path).f_flag
    assert flags & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC) == os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
    assert errno_of(lambda: subprocess.run([mount.path / "true"], check=True, timeout=20)) == "EACCES"
    assert errno_of(lambda: os.open(mount.path / "null", os.O_RDONLY)) == "EACCES"
    (mount.path / "file").write_text("written")
    mount.remount("atime,suid,dev,exec,async,relatime,rw,nolazytime,defaults,_netdev,nofail,x-systemd.automount")
    options, source = mount_line(mount)
    assert not options & {"noatime", "nosuid", "nodev", "noexec", "sync", "ro"}
    assert source == "none"
    subprocess.run([mount.path / "true"], check=True, timeout=20)
    os.close(os.open(mount.path / "null", os.O_RDONLY))


@modes
def test_source_argument_is_the_fsname(tmp_path: Path, union: UnionFactory, udba: str) -> None:
    mount = union(None, udba, "fsname=first,fsname=pool")
    assert mount_line(mount)[1] == "pool"


# -- notices and switches -------------------------------------------------------------------------


@modes
def test_warn_perm(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    (tmp_path / "base").mkdir(mode=0o700)
    os.chown(tmp_path / "base", 5, 6)
    mount = union(None, udba)
    told = [line for line in mount.log().splitlines() if "differ" in line]
    assert len(told) == 1
    assert str(tmp_path / "base") in told[0]
    assert "5/6/0700" in told[0]
    quiet = union({"top2": "rw", "base": "ro"}, udba, "nowarn_perm", mount_point="mnt2")
    assert "differ" not in quiet.log()


@modes
def test_options_without_meaning_get_one_notice(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    options = "trunc_xino,notrunc_xib,rdblk=512,rdhash=def,fhsm_sec=3,si=1234,xino=/tmp/x,delete=all,wsum"
    mount = union(None, udba, options)
    told = [line for line in mount.log().splitlines() if "without effect" in line]
    assert len(told) == 1
    for word in ("trunc_xino", "notrunc_xib", "rdblk", "rdhash", "fhsm_sec", "si", "xino=", "delete", "wsum"):
        assert word in told[0]
    assert os.listdir(mount.path) == []


@pytest.mark.parametrize(
    "options", ["verbose", "quiet", "noxino", "xino", "dirperm1", "nodirperm1", "rdcache=0", "rdcache=3600", "acl",
                "copyup_fsync", "copyup_fsync=off", "warn_perm", "nowarn", "nosum", "plink", "dio", "nodirren",
                "allow_other"],
)  # fmt: skip
def test_accepted_option_leaves_a_working_union(union: UnionFactory, tmp_path: Path, options: str) -> None:
    fill(tmp_path)
    mount = union(None, "reval", options)
    (mount.path / "lower").write_text("changed")
    (mount.path / "new").mkdir()
    (mount.path / "file").unlink()
    assert (mount.path / "lower").read_text() == "changed"
    assert sorted(os.listdir(mount.path)) == ["dir", "lower", "lowerdir", "new"]
    assert (tmp_path / "base/lower").read_text() == "lower"


@modes
def test_noacl(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    key = "system.posix_acl_access"
    subprocess.run(["setfacl", "-m", "u:1002:rw", str(tmp_path / "base/lower")], check=True, timeout=20)
    mount = union(None, udba, "acl")
    value = os.getxattr(mount.path / "lower", key)
    os.setxattr(mount.path / "file", key, value)
    assert os.getxattr(tmp_path / "top/file", key) == value
    mount.remount("noacl")
    for call in (
        lambda: os.getxattr(mount.path / "lower", key),
        lambda: os.setxattr(mount.path / "lower", key, value),
        lambda: os.removexattr(mount.path / "lower", key),
    ):
        assert errno_of(call) == "EOPNOTSUPP"
    assert os.listxattr(mount.path / "lower") == []


# -- policies -------------------------------------------------------------------------------------

MIB = 1 << 20


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Three file systems of 8, 32 and 16 MiB."""
    with ExitStack() as stack:
        sizes = {"a": 8, "b": 32, "c": 16}
        yield {
            name: stack.enter_context(file_system(tmp_path / name, "tmpfs", f"size={size}m"))
            for name, size in sizes.items()
        }


def where(disks: dict[str, Path], name: str) -> str:
    return "".join(letter for letter, disk in disks.items() if os.path.lexists(disk / name))


CREATE = (
    # policy, where the parent directory is, where five new files go
    ("tdp", "abc", "aaaaa"),
    ("tdp", "bc", "bbbbb"),
    ("top-down-parent", "abc", "aaaaa"),
    ("rr", "abc", "cbacb"),
    ("round-robin", "a", "cbacb"),
    ("mfs", "abc", "bbbbb"),
    ("most-free-space:0", "a", "bbbbb"),
    ("tdmfs:10M", "abc", "bbbbb"),
    ("tdmfs:1M", "abc", "aaaaa"),
    ("tdmfs:100M", "abc", "bbbbb"),
    ("mfsrr:1M", "abc", "bbbbb"),
    ("mfsrr:100M", "abc", "cbacb"),
    ("pmfs", "ac", "ccccc"),
    ("pmfs:0", "abc", "bbbbb"),
    ("pmfsrr:1M", "ac", "ccccc"),
    ("pmfsrr:20M", "ac", "bbbbb"),
    ("pmfsrr:100M", "ac", "cbacb"),
)


@modes
@pytest.mark.parametrize(("policy", "parents", "expected"), CREATE, ids=lambda value: value)
def test_create_policy(
    tmp_path: Path, disks: dict[str, Path], udba: str, policy: str, parents: str, expected: str
) -> None:
    for letter in parents:
        (disks[letter] / "d").mkdir(mode=0o750)
        os.chown(disks[letter] / "d", 5, 6)
    words = [f"{disk}=rw" for disk in disks.values()]
    with mounted(words, tmp_path / "mnt", udba, f"create={policy}") as mount:
        made = ""
        for number in range(len(expected)):
            (mount.path / f"d/f{number}").write_text(f"{number}")
            made += where(disks, f"d/f{number}")
        assert made == expected
        assert [(mount.path / f"d/f{number}").read_text() for number in range(5)] == ["0", "1", "2", "3", "4"]
        assert len(os.listdir(mount.path / "d")) == 5
        for letter in set(expected):
            info = (disks[letter] / "d").stat()
            assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o750, 5, 6), "parents are copied down"
        (mount.path / "d/sub").mkdir()
        assert len(where(disks, "d/sub")) == 1


@modes
def test_mfs_follows_the_free_space(tmp_path: Path, disks: dict[str, Path], udba: str) -> None:
    words = [f"{disk}=rw" for disk in disks.values()]
    with mounted(words, tmp_path / "mnt", udba, "create=mfs:0") as mount:
        for number, expected in enumerate("bbc"):  # 32, then 20, then 8 against 16
            (mount.path / f"f{number}").write_bytes(bytes(12 * MIB))
            assert where(disks, f"f{number}") == expected


@modes
@pytest.mark.parametrize("policy", ["rr", "mfs", "pmfs", "tdmfs:1M"])
def test_create_policy_never_hides_the_new_object(
    tmp_path: Path, disks: dict[str, Path], udba: str, policy: str
) -> None:
    """Above what is whited out or opaque (semantics 7.1)."""
    (disks["c"] / "gone").touch()
    (disks["a"] / ".wh.gone").touch()
    (disks["a"] / "opq").mkdir()
    (disks["a"] / "opq/.wh..wh..opq").touch()
    (disks["b"] / "opq").mkdir()
    words = [f"{disk}=rw" for disk in disks.values()]
    with mounted(words, tmp_path / "mnt", udba, f"create={policy}") as mount:
        (mount.path / "gone").write_text("new")
        assert (mount.path / "gone").read_text() == "new"
        assert where(disks, "gone") == "ac"
        for number in range(4):
            (mount.path / f"opq/f{number}").touch()
            assert where(disks, f"opq/f{number}") == "a"
        assert len(os.listdir(mount.path / "opq")) == 4


@modes
@pytest.mark.parametrize(
    ("policy", "expected"),
    [("tdp", "A"), ("top-down-parent", "A"), ("bup", "B"), ("bottom-up-parent", "B"), ("bu", "C"), ("bottom-up", "C")],
)
def test_copy_up_policy(union: UnionFactory, tmp_path: Path, udba: str, policy: str, expected: str) -> None:
    for branch in ("A", "B", "D"):
        (tmp_path / branch / "d").mkdir(parents=True)
    (tmp_path / "D/d/f").write_text("lower")
    mount = union({"A": "rw", "B": "rw", "C": "rw", "D": "ro"}, udba, f"cpup={policy}")
    (mount.path / "d/f").write_text("changed")
    assert [branch for branch in "ABC" if (tmp_path / branch / "d/f").exists()] == [expected]
    assert (mount.path / "d/f").read_text() == "changed"
    assert (tmp_path / "D/d/f").read_text() == "lower"
