"""What may become a branch, and how a branch is made writable (semantics 3).

Where a mount is needed the test runs a script in a mount name space of its own, so that nothing is left.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import udbad
from udbad.branch import accept, syscalls
from udbad.branch.accept import open_branches, permission_warnings, prepare_writable
from udbad.branch.branches import Branch, BranchSet, BranchSpec
from udbad.branch.spec import parse_branches
from udbad.errors import ExitCode, UserError
from udbad.types import Perm

BASE = ".wh..wh.aufs"
PLINK = ".wh..wh.plnk"
ORPHAN = ".wh..wh.orph"

PRELUDE = """
import os, subprocess, sys
from udbad.branch import accept
from udbad.branch.accept import open_branches
from udbad.branch.spec import parse_branches
from udbad.errors import ExitCode, UserError

def sh(command, **more):
    subprocess.run(command, shell=True, check=True, timeout=20, **more)

def attempt(text, ro=False, mount_point=b"mnt"):
    return open_branches(parse_branches(text), ro, mount_point)

def refusal(text, mount_point=b"mnt"):
    try:
        attempt(text, mount_point=mount_point)
    except UserError as error:
        assert error.code is ExitCode.BRANCH, error
        return error.message
    raise AssertionError(f"{text} was accepted")

sh("mount -t tmpfs tmpfs .")
os.chdir(os.getcwd())  # into what is mounted there now
sh("mkdir mnt a b c")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with a mount point `mnt` and directories a, b, c."""
    monkeypatch.chdir(tmp_path)
    for name in ("mnt", "a", "b", "c"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def attempt(text: str, ro: bool = False, mount_point: bytes = b"mnt") -> BranchSet:
    return open_branches(parse_branches(text), ro, mount_point)


def refusal(text: str, code: ExitCode = ExitCode.BRANCH, mount_point: bytes = b"mnt") -> str:
    with pytest.raises(UserError) as caught:
        attempt(text, mount_point=mount_point)
    assert caught.value.code is code
    assert "\n" not in caught.value.message
    return caught.value.message


def in_name_space(tmp_path: Path, script: str) -> None:
    """Run `script` after PRELUDE in tmp_path on a fresh tmpfs, in a mount name space that dies with it."""
    body = PRELUDE + textwrap.dedent(script)
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-W", "error", "-c", body],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(udbad.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


# -- accepted -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ro", "perms"),
    [
        ("a:b:c", False, ["rw", "ro", "ro"]),
        ("a:b:c", True, ["ro", "ro", "ro"]),
        ("a=ro:b:c=rw", False, ["ro", "ro", "rw"]),
        ("a=rr:b=rr:c=", False, ["rr", "rr", "ro"]),
        ("a=rw:b", True, ["rw", "ro"]),
    ],
)
def test_permissions(here: Path, text: str, ro: bool, perms: list[str]) -> None:
    found = attempt(text, ro)
    assert [branch.perm.value for branch in found.branches] == perms
    found.close()


def test_branch_fields(here: Path) -> None:
    (here / "link").symlink_to("b")
    (here / "a" / "x").touch()
    found = attempt("./a=rw+nolwh:link=ro+wh+udba=none+watch=fanotify")
    first, second = found.branches
    assert (first.index, first.id, second.index, second.id) == (0, 0, 1, 1)
    assert (first.path, second.path) == (os.fsencode(here / "a"), os.fsencode(here / "b"))
    assert (first.attrs, second.attrs) == (frozenset({"nolwh"}), frozenset({"wh"}))
    assert (first.udba, second.udba) == (None, "none")
    assert (first.watch, second.watch) == (None, "fanotify")
    assert first.dev == os.stat("a").st_dev
    fs_type = subprocess.run(["findmnt", "-nro", "FSTYPE", "-T", here], capture_output=True, text=True, check=True)
    assert first.fs_type == fs_type.stdout.strip()
    for fd in (first.root_fd, first.anchor_fd):
        assert os.path.samestat(os.fstat(fd), os.stat("a"))
        assert not os.get_inheritable(fd)
        assert syscalls.exists_at(fd, b"x")
    found.close()


def test_any_name(here: Path) -> None:
    path = os.fsencode(here) + b"/new\nline \\040\xff"
    os.mkdir(path)
    found = open_branches([BranchSpec(path)], False, b"mnt")
    assert found[0].path == path
    found.close()


def test_names_with_a_common_beginning_do_not_overlap(here: Path) -> None:
    (here / "aa").mkdir()
    (here / "mnt2").mkdir()
    found = attempt("a:aa:mnt2")
    assert len(found) == 3
    found.close()


@pytest.mark.usefixtures("many_descriptors")
def test_five_hundred_branches(here: Path) -> None:
    for number in range(500):
        (here / "a" / f"{number}").mkdir()
    found = attempt(":".join(f"a/{number}" for number in range(500)))
    assert [branch.path for branch in found.branches] == [os.fsencode(here / f"a/{number}") for number in range(500)]
    found.close()


def test_out_of_descriptors_is_said_and_leaves_none_open(here: Path) -> None:
    for number in range(40):
        (here / "a" / f"{number}").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    limit = [number for number in range(soft) if number not in used][20]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with pytest.raises(UserError) as caught:
            attempt(":".join(f"a/{number}" for number in range(40)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Too many open files" in caught.value.message


# -- refused --------------------------------------------------------------------------------------


def test_missing_or_not_a_directory(here: Path) -> None:
    (here / "file").touch()
    (here / "dangling").symlink_to("nowhere")
    (here / "loop").symlink_to("loop")
    assert refusal("a:nope") == "branch nope does not exist"
    assert refusal("a:dangling") == "branch dangling does not exist"
    assert refusal("a:file") == "branch file is not a directory"
    assert refusal("a:loop") == "branch loop: Too many levels of symbolic links"
    assert refusal("a:new\nline") == r"branch 'new\nline' does not exist"


def test_removed_directory(here: Path) -> None:
    fd = os.open("b", os.O_PATH)
    os.rmdir("b")
    assert refusal(f"a:/proc/self/fd/{fd}") == f"branch /proc/self/fd/{fd} has been removed"
    os.close(fd)


def test_same_directory_twice(here: Path) -> None:
    (here / "link").symlink_to("a")
    assert refusal("a:b:a") == "branch a is given twice"
    assert refusal("a:./a") == "branch ./a is given twice, it is the same directory as a"
    assert refusal("a:link") == "branch link is given twice, it is the same directory as a"


def test_overlapping(here: Path) -> None:
    (here / "a" / "x" / "y").mkdir(parents=True)
    (here / "link").symlink_to("a/x/y")
    assert refusal("a:b:a/x") == "branches overlap: a/x is inside a"
    assert refusal("a/x/y:b:a") == "branches overlap: a/x/y is inside a"
    assert refusal("a:link") == "branches overlap: link is inside a"


def test_mount_point(here: Path) -> None:
    (here / "mnt" / "x").mkdir()
    (here / "a" / "x").mkdir()
    (here / "link").symlink_to("mnt/x")
    assert refusal("a:mnt") == "branch mnt is the mount point"
    assert refusal("a:mnt/x") == "branch mnt/x is inside the mount point mnt"
    assert refusal("link") == "branch link is inside the mount point mnt"
    assert refusal("b:a", mount_point=b"a/x") == "the mount point a/x is inside branch a"
    assert refusal(".") == "the mount point mnt is inside branch ."
    message = refusal("a", ExitCode.MOUNT_POINT, mount_point=b"gone")
    assert message == "mount point gone: No such file or directory"


@pytest.mark.parametrize(("path", "fs_type"), [("/proc", "proc"), ("/sys", "sysfs"), ("/dev/pts", "devpts")])
def test_unsupported_file_systems(here: Path, path: str, fs_type: str) -> None:
    assert refusal(f"a:{path}") == f"branch {path}: file system type {fs_type} cannot be a branch"


def test_number_of_branches(here: Path) -> None:
    with pytest.raises(UserError, match="no branch given") as caught:
        open_branches([], False, b"mnt")
    assert caught.value.code is ExitCode.BRANCH
    with pytest.raises(UserError, match="32768 branches given, at most 32767"):
        open_branches([BranchSpec(b"a")] * 32768, False, b"mnt")


def test_short_names_only_matter_for_rw(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file system with short names is in every kernel, so statvfs(3) is made to say so."""
    real = os.fstatvfs

    def short(fd: int) -> os.statvfs_result:
        return os.statvfs_result((*real(fd)[:9], 143))

    monkeypatch.setattr(os, "fstatvfs", short)
    assert refusal("a") == "branch a cannot be rw: its file system takes names of at most 143 bytes, 255 are needed"
    found = attempt("a=ro:b")
    assert found[0].perm is Perm.RO
    found.close()


# -- with mounts ----------------------------------------------------------------------------------


def test_read_only_file_systems(tmp_path: Path) -> None:
    in_name_space(
        tmp_path,
        """
        sh("mount -t tmpfs -o ro tmpfs a; mount --bind c b; mount -o remount,bind,ro b")
        for name in "ab":  # the file system, the mount alone
            assert refusal(f"{name}=rw") == f"branch {name} cannot be rw: its file system is read-only"
            assert refusal(name) == f"branch {name} cannot be rw: its file system is read-only", "default of the first"
        assert [branch.perm.value for branch in attempt("c:a").branches] == ["rw", "ro"]
        assert [branch.perm.value for branch in attempt("a", ro=True).branches] == ["ro"]
        """,
    )


def test_same_directory_through_bind_mounts(tmp_path: Path) -> None:
    in_name_space(
        tmp_path,
        """
        sh("mkdir -p a/x/y; mount --bind a b; mount --bind a/x/y c")
        assert refusal("a:b") == "branch b is given twice, it is the same directory as a"
        assert refusal("a:b/x") == "branches overlap: b/x is inside a"
        assert refusal("b/x:c") == "branches overlap: c is inside b/x"
        assert refusal("c:a") == "branches overlap: c is inside a"
        """,
    )


def test_other_file_systems_below_a_branch_are_no_overlap(tmp_path: Path) -> None:
    in_name_space(
        tmp_path,
        """
        sh("mkdir -p a/m a/n; mount -t tmpfs tmpfs a/m; mkdir a/m/sub; mount --bind c a/n; mkdir c/sub")
        for text in ("a:a/m", "a:a/m/sub", "a/m/sub:a", "a:a/n", "a:c/sub", "a/n:a/m:b"):
            attempt(text).close()
        assert refusal("a/m:a/m/sub") == "branches overlap: a/m/sub is inside a/m"
        """,
    )


def test_equal_paths_in_one_file_system_need_not_be_nested(tmp_path: Path) -> None:
    """Two NFS exports of one server: one device, both roots shown as `/`."""
    in_name_space(
        tmp_path,
        """
        sh("mount -t tmpfs one a; mount -t tmpfs two b; mkdir b/x a/y")
        real = accept._read_mounts
        accept._read_mounts = lambda: {
            key: mount._replace(device=(0, 9999), root=b"/") for key, mount in real().items()
        }
        attempt("a:b/x").close()
        attempt("b:a/y").close()
        assert refusal("b:b/x") == "branches overlap: b/x is inside b"
        """,
    )


def test_mount_point_through_bind_mounts(tmp_path: Path) -> None:
    in_name_space(
        tmp_path,
        """
        sh("mkdir -p a/x c/x; mount --bind a b; mount -t tmpfs tmpfs c/x; mkdir c/x/y")
        assert refusal("b", b"a/x") == "the mount point a/x is inside branch b"
        assert refusal("c", b"c/x/y") == "the mount point c/x/y is inside branch c"
        attempt("b", mount_point=b"a").close()  # a union over the directory itself
        attempt("b/x", mount_point=b"a").close()
        """,
    )


@pytest.mark.fuse
def test_mount_of_udbad_is_refused_without_being_asked(tmp_path: Path) -> None:
    """Nobody answers on this /dev/fuse: whatever asks the file system would wait for ever."""
    in_name_space(
        tmp_path,
        """
        fd = os.open("/dev/fuse", os.O_RDWR)
        mount = f"mount -i -t fuse.udba -o fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other udba "
        sh(mount + "a", pass_fds=[fd])
        assert refusal("b:a") == "branch a is in a udbad mount itself"
        attempt("b", mount_point=b"a").close()  # where the last mount died, a new one can start
        os.close(fd)
        assert refusal("b:a") == "branch a is in a udbad mount itself"
        attempt("b", mount_point=b"a").close()
        """,
    )


# mksquashfs EMPTY_DIRECTORY IMAGE -all-root -no-xattrs -mkfs-time 0 -all-time 0; zlib, base 85.
SQUASHFS = (
    "c-qS-E-YqbfB_~j$;cqcaDa)CfrSA9rbFp|DE%J_5}^EYG`bN=i!xN)N=~UbeS(42fK6Dy*g2CyCZFL4M*{<z1{SbLC&MTh1*2dTjDk@x3P!;"
    "w7zLwX6pVsVFbb#+08ug)js"
)


def test_medium_that_never_changes_is_rr(tmp_path: Path) -> None:
    in_name_space(
        tmp_path,
        f"""
        import base64, zlib
        with open("image", "wb") as file:
            file.write(zlib.decompress(base64.b85decode({SQUASHFS!r})))
        sh("mount -t squashfs -o loop,ro image a")
        found = attempt("a:b")
        assert [(one.fs_type, one.perm.value) for one in found.branches] == [("squashfs", "rr"), ("tmpfs", "ro")]
        found.close()
        found = attempt("b:a=ro+wh")
        assert [branch.perm.value for branch in found.branches] == ["rw", "ro"], "what was asked for holds"
        found.close()
        sh("umount a")
        """,
    )


def test_what_is_mounted_below_a_branch_is_not_seen_and_the_branch_is_pinned(tmp_path: Path) -> None:
    in_name_space(
        tmp_path,
        """
        sh("mount -t tmpfs tmpfs a; mount --make-rshared a; mkdir a/x; touch a/x/under")
        sh("mount -t tmpfs tmpfs a/x; touch a/x/over; mkdir a/y")
        found = attempt("a")
        sh("mount -t tmpfs tmpfs a/y; touch a/y/later")
        def names(path):
            fd = os.open(path, os.O_RDONLY, dir_fd=found[0].root_fd)
            listed = os.listdir(fd)
            os.close(fd)
            return listed
        assert names("x") == ["under"]
        assert names("y") == []
        sh("umount a/x a/y")
        assert subprocess.run(["umount", "a"], stderr=subprocess.DEVNULL).returncode != 0, "busy"
        found.close()
        sh("umount a")
        """,
    )


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EINVAL])
def test_without_open_tree_a_plain_descriptor_serves(here: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(path: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(syscalls, "clone_mount", refuse)
    (here / "a" / "x").mkdir()
    found = attempt("a")
    assert os.path.samestat(os.fstat(found[0].root_fd), os.stat("a"))
    assert found[0].root_fd != found[0].anchor_fd
    found.close()
    assert refusal("a:a/x") == "branches overlap: a/x is inside a"


def test_open_tree_failing_otherwise_is_an_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: bytes) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(syscalls, "clone_mount", refuse)
    assert refusal("a") == "branch a: Cannot allocate memory"


def test_a_mount_that_mountinfo_does_not_show(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As below a chroot(2) to a directory that is no mount point."""
    monkeypatch.setattr(accept, "_read_mounts", dict)
    (here / "a" / "x").mkdir()
    found = attempt("a:b")
    assert [branch.fs_type for branch in found.branches] == ["unknown", "unknown"]
    found.close()
    assert refusal("a:a/x") == "branches overlap: a/x is inside a"
    assert refusal("a", mount_point=b"a/x") == "the mount point a/x is inside branch a"


# -- permissions of the roots ---------------------------------------------------------------------


def test_permission_warnings(here: Path) -> None:
    os.chmod("a", 0o750)
    os.chmod("b", 0o750)
    os.chmod("c", 0o1777)
    os.chown("c", 1, 2)
    found = attempt("a:b:c")
    assert permission_warnings(found) == [
        f"branch {here}/c: uid/gid/mode 1/2/1777 differ from 0/0/0750 of the first branch {here}/a"
    ]
    found.close()


# -- prepare_writable -----------------------------------------------------------------------------


@pytest.fixture
def branch(here: Path) -> Iterator[Branch]:
    found = attempt("a")
    yield found[0]
    found.close()


@pytest.fixture
def nolwh(here: Path) -> Iterator[Branch]:
    found = attempt("a=rw+nolwh")
    yield found[0]
    found.close()


def content() -> dict[str, str]:
    return {entry.name: stat.filemode(entry.stat(follow_symlinks=False).st_mode) for entry in os.scandir("a")}


FILES = {BASE: "-r--r--r--", PLINK: "drwx------", ORPHAN: "drwx------"}


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_prepare(branch: Branch, umask: int) -> None:
    old = os.umask(umask)
    try:
        prepare_writable(branch, plink=True)
    finally:
        os.umask(old)
    assert content() == FILES
    assert os.stat(f"a/{BASE}").st_nlink == 1


def test_prepare_again_changes_nothing(branch: Branch) -> None:
    prepare_writable(branch, plink=True)
    Path("a", PLINK, "11.12").touch()
    os.chmod(f"a/{ORPHAN}", 0o711)
    before = os.stat(f"a/{BASE}").st_ino
    prepare_writable(branch, plink=True)
    assert content() == FILES | {ORPHAN: "drwx--x--x"}
    assert os.listdir(f"a/{PLINK}") == ["11.12"]
    assert os.stat(f"a/{BASE}").st_ino == before


def test_prepare_without_plink(branch: Branch) -> None:
    prepare_writable(branch, plink=False)
    assert content() == {name: mode for name, mode in FILES.items() if name != PLINK}


@pytest.mark.parametrize("plink", [False, True])
def test_prepare_nolwh_removes_the_base_file(branch: Branch, nolwh: Branch, plink: bool) -> None:
    prepare_writable(branch, plink=True)
    os.link(f"a/{BASE}", "a/.wh.gone")
    prepare_writable(nolwh, plink)
    assert content() == {PLINK: "drwx------", ORPHAN: "drwx------", ".wh.gone": "-r--r--r--"}


def test_prepare_nolwh_leaves_no_base_file(nolwh: Branch) -> None:
    prepare_writable(nolwh, plink=True)
    assert content() == {PLINK: "drwx------", ORPHAN: "drwx------"}


@pytest.mark.parametrize(
    ("name", "word"),
    [(BASE, "regular file"), (PLINK, "directory"), (ORPHAN, "directory")],
    ids=["base", "plink", "orphan"],
)
def test_prepare_with_a_name_of_the_wrong_type(branch: Branch, nolwh: Branch, name: str, word: str) -> None:
    Path("a", name).symlink_to("../b")
    for one in (branch, nolwh):
        with pytest.raises(UserError) as caught:
            prepare_writable(one, plink=True)
        assert caught.value.code is ExitCode.BRANCH
        assert caught.value.message.endswith(f"/a: {name} exists and is not a {word}")
    assert os.listdir("b") == [], "the link was not followed"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_prepare_without_hard_links(
    branch: Branch, nolwh: Branch, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """vfat and others; no file system without link(2) is in every kernel, so the call is made to fail."""

    def refuse(src_dirfd: int, src: bytes, dst_dirfd: int, dst: bytes) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(syscalls, "link_at", refuse)
    for one, plink in ((branch, True), (branch, False), (nolwh, True)):
        with pytest.raises(UserError) as caught:
            prepare_writable(one, plink)
        assert caught.value.code is ExitCode.BRANCH
        assert caught.value.message.endswith("has no hard links, use rw+nolwh and noplink")
        assert content() == {}, "nothing left behind"
    prepare_writable(nolwh, plink=False)
    assert content() == {ORPHAN: "drwx------"}


def test_prepare_with_a_base_file_linked_to_the_limit(branch: Branch, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(src_dirfd: int, src: bytes, dst_dirfd: int, dst: bytes) -> None:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

    monkeypatch.setattr(syscalls, "link_at", refuse)
    prepare_writable(branch, plink=True)
    assert content() == FILES


def test_prepare_passes_a_name_that_a_crash_left(branch: Branch) -> None:
    Path("a", BASE + ".0000").mkdir()
    prepare_writable(branch, plink=True)
    assert content() == FILES | {BASE + ".0000": "drwxr-xr-x"}


def test_prepare_on_a_full_or_read_only_branch(tmp_path: Path) -> None:
    in_name_space(
        tmp_path,
        """
        sh("mount -t tmpfs -o nr_inodes=3 tmpfs a; touch a/1 a/2; mount -t tmpfs tmpfs b")
        for name, text in (("a", "No space left on device"), ("b", "Read-only file system")):
            found = attempt(name)
            if name == "b":
                sh("mount -o remount,ro b")
            try:
                accept.prepare_writable(found[0], plink=True)
            except UserError as error:
                assert error.code is ExitCode.BRANCH
                wanted = f"branch {os.path.realpath(name)} cannot be made writable: {text}"
                assert error.message == wanted, error.message
            else:
                raise AssertionError(name)
            found.close()
        """,
    )
