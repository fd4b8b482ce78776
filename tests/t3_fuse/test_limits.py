"""Names of any bytes, names that are too long or reserved, trees deeper than PATH_MAX, hundreds of branches."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.mount import Mount, UnionFactory, mounted
from tests.helpers.posix import EXCHANGE, renameat2
from tests.helpers.profile import scaled
from tests.t3_fuse.live import debris, errno_of, file_system, modes, names

pytestmark = pytest.mark.fuse

MAX_NAME = 242
"""Bytes (semantics 1)."""

# -- names ------------------------------------------------------------------------------------

any_name = st.binary(min_size=1, max_size=MAX_NAME).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..") and not name.startswith(b".wh.")
)


@modes
def test_names_of_any_bytes(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Each name is made, found, listed, renamed, copied up and removed, on the branch it is the same bytes."""
    mount = union(None, udba)
    root, top, base = (os.fsencode(path) for path in (mount.path, mount["top"], mount["base"]))

    @settings(max_examples=scaled(40, 150), suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(name=any_name, other=any_name)
    def check(name: bytes, other: bytes) -> None:
        path = os.path.join(root, name)
        with open(path, "wb") as stream:
            stream.write(name)
        assert name in os.listdir(top)
        assert os.listdir(root) == [name]
        with open(path, "rb") as stream:
            assert stream.read() == name
        os.rename(path, os.path.join(root, other))
        assert os.listdir(root) == [other]
        os.unlink(os.path.join(root, other))
        os.mkdir(path)
        os.symlink(name, os.path.join(path, other))
        assert os.readlink(os.path.join(path, other)) == name
        os.unlink(os.path.join(path, other))
        os.rmdir(path)
        assert os.listdir(root) == []

    @settings(max_examples=scaled(25, 100), suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(name=any_name)
    def check_lower(name: bytes) -> None:
        path = os.path.join(root, name)
        os.mkdir(os.path.join(base, name))
        with open(os.path.join(base, name, name), "wb") as stream:
            stream.write(b"lower")
        mount.control({"op": "udba", "mode": udba})  # none does not promise to see what was done on a branch
        assert os.listdir(root) == [name]
        assert os.listdir(path) == [name]
        with open(os.path.join(path, name), "ab") as stream:
            stream.write(b"+")
        with open(os.path.join(top, name, name), "rb") as stream:
            assert stream.read() == b"lower+"
        os.unlink(os.path.join(path, name))
        assert os.listdir(os.path.join(top, name)) == [b".wh." + name]
        os.rmdir(path)
        assert os.listdir(root) == []
        os.unlink(os.path.join(top, b".wh." + name))
        os.unlink(os.path.join(base, name, name))
        os.rmdir(os.path.join(base, name))
        mount.control({"op": "udba", "mode": udba})

    check()
    check_lower()


BYTES_OF_ALL_VALUES = [bytes([value]) for value in range(1, 256) if value not in b"./"]


@modes
def test_every_byte_is_a_name(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    mount = union(None, udba)
    for name in BYTES_OF_ALL_VALUES:
        os.mkfifo(os.path.join(os.fsencode(mount.path), name))
    assert sorted(os.listdir(os.fsencode(mount.path))) == BYTES_OF_ALL_VALUES


def every_operation(root: Path, bad: str) -> dict[str, Callable[[], object]]:
    """Each operation that takes a name, with `bad` as that name; root has `file` and `dir`."""
    file, directory, name = root / "file", root / "dir", root / bad
    return {
        "stat": name.lstat,
        "open": lambda: os.open(name, os.O_RDONLY),
        "create": lambda: os.open(name, os.O_CREAT | os.O_WRONLY),
        "mkdir": name.mkdir,
        "mkfifo": lambda: os.mkfifo(name),
        "mknod": lambda: os.mknod(name, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        "symlink": lambda: name.symlink_to("x"),
        "link to": lambda: os.link(file, name),
        "link from": lambda: os.link(name, root / "new"),
        "rename to": lambda: file.rename(name),
        "rename from": lambda: name.rename(root / "new"),
        "rename dir to": lambda: directory.rename(name),
        "exchange": lambda: renameat2(os.fsencode(file), os.fsencode(name), EXCHANGE),
        "unlink": name.unlink,
        "rmdir": name.rmdir,
        "chmod": lambda: name.chmod(0o600),
        "chown": lambda: os.lchown(name, 1, 1),
        "utime": lambda: os.utime(name),
        "truncate": lambda: os.truncate(name, 0),
        "readlink": lambda: os.readlink(name),
        "listdir": lambda: os.listdir(name),
        "getxattr": lambda: os.getxattr(name, "user.a"),
        "setxattr": lambda: os.setxattr(name, "user.a", b"x"),
        "removexattr": lambda: os.removexattr(name, "user.a"),
        "listxattr": lambda: os.listxattr(name),
        "access": lambda: os.stat(name / "below"),
        "below": lambda: os.open(name / "below", os.O_CREAT | os.O_WRONLY),
    }


@pytest.fixture
def small(union: UnionFactory, tmp_path: Path, udba: str) -> Mount:
    """file and dir on either branch, and on both the whiteout `.wh.gone`."""
    for branch in ("top", "base"):
        (tmp_path / branch / "dir").mkdir(parents=True)
        (tmp_path / branch / "file").write_text(branch)
        (tmp_path / branch / ".wh.gone").touch()
        (tmp_path / branch / ".wh.").touch()
    (tmp_path / "base/gone").touch()
    return union(None, udba)


GIVES_A_NAME = {"create", "mkdir", "mkfifo", "mknod", "symlink", "link to", "rename to", "rename dir to"}


@modes
@pytest.mark.parametrize("length", [MAX_NAME, MAX_NAME + 1, 255, 256, 1000])
def test_long_names(small: Mount, length: int) -> None:
    """242 bytes are fine; more cannot be given to anything, and 256 are more than any branch has."""
    name = "n" * length
    if length <= MAX_NAME:
        with (small.path / name).open("w") as stream:
            stream.write("x")
        (small.path / "file").rename(small.path / ("m" * length))
        (small.path / name).unlink()
        (small.path / name).mkdir()
        return
    failed = {what: errno_of(call) for what, call in every_operation(small.path, name).items()}
    for what, error in failed.items():
        assert error == ("ENAMETOOLONG" if what in GIVES_A_NAME or length > 255 else "ENOENT"), what
    assert names(small["top"]) == [".wh.", ".wh.gone", "dir", "file"]


@modes
def test_long_names_on_a_branch(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """They are shown, read, changed and removed; not where a whiteout would need more than 255 bytes."""
    lengths = (MAX_NAME + 1, 251, 252, 255)
    for branch in ("top", "base"):
        for length in lengths:
            (tmp_path / branch / "d").mkdir(parents=True, exist_ok=True)
            (tmp_path / branch / "d" / (branch[0] * length)).write_text(branch)
    (tmp_path / "base" / ("e" * 252)).mkdir()
    (tmp_path / "base" / ("e" * 252) / "x").touch()
    (tmp_path / "top" / ("e" * 251)).mkdir()
    mount = union(None, udba)
    d = mount.path / "d"
    lower = {length: d / ("b" * length) for length in lengths}
    upper = {length: d / ("t" * length) for length in lengths}
    assert {path.name for path in d.iterdir()} == {path.name for path in (*lower.values(), *upper.values())}
    for length in lengths:
        assert lower[length].read_text() == "base"
        with lower[length].open("a") as stream:
            stream.write(", changed")
        assert (mount["top"] / "d" / lower[length].name).read_text() == "base, changed"
        lower[length].chmod(0o600)
        assert stat.S_IMODE(lower[length].stat().st_mode) == 0o600
        assert errno_of(lambda: upper[length].rename(d / ("n" * length))) == "ENAMETOOLONG"  # noqa: B023  # called at once
        (d / "f").symlink_to("x")
        assert errno_of(lambda: (d / "f").rename(lower[length])) == "ENAMETOOLONG"  # noqa: B023  # called at once
        (d / "f").unlink()
        upper[length].rename(d / "short")
        (d / "short").unlink()
        hidden = errno_of(lower[length].unlink)
        assert hidden == ("" if length <= 251 else "ENAMETOOLONG")
        assert lower[length].exists() == (length > 251)
    assert sorted(len(path.name) for path in d.iterdir()) == [252, 255]
    assert errno_of(d.rmdir) == "ENOTEMPTY"
    (mount.path / ("e" * 251)).rmdir()
    (mount.path / ("e" * 252) / "x").unlink()
    assert errno_of((mount.path / ("e" * 252)).rmdir) == "ENAMETOOLONG"
    assert (mount.path / ("e" * 252)).is_dir()
    assert debris(mount["top"]) == []


@modes
@pytest.mark.parametrize(
    "name", [".wh.x", ".wh.gone", ".wh.file", ".wh.", ".wh..wh..opq", ".wh..wh.aufs", ".wh..wh.plnk"]
)
def test_reserved_names(small: Mount, name: str) -> None:
    failed = {what: errno_of(call) for what, call in every_operation(small.path, name).items()}
    assert failed == dict.fromkeys(failed, "EPERM")
    assert sorted(os.listdir(small.path)) == ["dir", "file"]
    assert names(small["top"]) == [".wh.", ".wh.gone", "dir", "file"]


@modes
def test_names_that_only_look_reserved(union: UnionFactory, udba: str) -> None:
    mount = union(None, udba)
    for name in (".wh", ".whx", "wh.x", ".w", ".WH.x", "x.wh.y", "..wh.x"):
        (mount.path / name).touch()
    assert len(os.listdir(mount.path)) == 7


# -- deep trees -------------------------------------------------------------------------------

DEPTH = 60
COMPONENT = "c" * 100  # 60 of them are longer than PATH_MAX, 4096 bytes


@contextmanager
def descend(root: Path, depth: int, make: bool = False) -> Iterator[int]:
    """A descriptor of the directory `depth` levels down, reached name by name."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(depth):
            if make:
                os.mkdir(COMPONENT, dir_fd=fd)
            below = os.open(COMPONENT, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def write_at(fd: int, name: str, text: bytes, flags: int = os.O_CREAT | os.O_WRONLY | os.O_TRUNC) -> None:
    file = os.open(name, flags, 0o644, dir_fd=fd)
    try:
        os.write(file, text)
    finally:
        os.close(file)


def read_at(fd: int, name: str) -> bytes:
    file = os.open(name, os.O_RDONLY, dir_fd=fd)
    try:
        return os.read(file, 1000)
    finally:
        os.close(file)


@modes
def test_deeper_than_path_max(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """All of it on the read-only branch: visit, copy up at the bottom, make, rename, link, remove there."""
    (tmp_path / "base").mkdir()
    with descend(tmp_path / "base", DEPTH, make=True) as fd:
        for name in ("f", "gone", "moved"):
            write_at(fd, name, b"lower")
        os.mkdir("empty", dir_fd=fd)
    mount = union(None, udba)
    with descend(mount.path, DEPTH) as fd:
        assert sorted(os.listdir(fd)) == ["empty", "f", "gone", "moved"]
        assert os.stat("f", dir_fd=fd).st_ino == {e.name: e.inode() for e in os.scandir(fd)}["f"]
        write_at(fd, "f", b"L", os.O_WRONLY)
        os.unlink("gone", dir_fd=fd)
        os.rmdir("empty", dir_fd=fd)
        os.rename("moved", "arrived", src_dir_fd=fd, dst_dir_fd=fd)
        os.link("f", "hard", src_dir_fd=fd, dst_dir_fd=fd)
        os.symlink("f", "soft", dir_fd=fd)
        os.mkdir(COMPONENT, dir_fd=fd)
        write_at(fd, "new", b"new")
        os.chmod("new", 0o600, dir_fd=fd)
        os.chown("new", 3, 4, dir_fd=fd)
        os.setxattr(f"/proc/self/fd/{fd}/new", "user.a", b"v")
        expected = ["arrived", COMPONENT, "f", "hard", "new", "soft"]
        assert sorted(os.listdir(fd)) == sorted(expected)
        assert [read_at(fd, name) for name in ("f", "hard", "soft", "arrived")] == [b"Lower"] * 3 + [b"lower"]
    with descend(mount["top"], DEPTH) as fd:
        assert sorted(os.listdir(fd)) == sorted([".wh.empty", ".wh.gone", ".wh.moved", *expected])
        assert os.getxattr(f"/proc/self/fd/{fd}/new", "user.a") == b"v"
    with descend(tmp_path / "base", DEPTH) as fd:
        assert sorted(os.listdir(fd)) == ["empty", "f", "gone", "moved"]
        assert read_at(fd, "f") == b"lower"
    mount.remount()
    with descend(mount.path, DEPTH) as fd:
        assert sorted(os.listdir(fd)) == sorted(expected)
        for name in ("arrived", "f", "hard", "new", "soft"):
            os.unlink(name, dir_fd=fd)
        os.rmdir(COMPONENT, dir_fd=fd)
    with descend(mount.path, DEPTH - 1) as fd:
        os.rmdir(COMPONENT, dir_fd=fd)
        assert os.listdir(fd) == []


@modes
def test_thousands_of_levels(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Nothing recurses: neither the walk, nor a copy-up of all parents, nor letting go of them."""
    depth = scaled(1100, 1500)  # more than Python recurses
    (tmp_path / "base").mkdir()
    fd = os.open(tmp_path / "base", os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    try:
        mount = union(None, udba)
        fd = os.open(mount.path, os.O_RDONLY)
        for _ in range(depth):
            below = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        write_at(fd, "f", b"deep")
        assert read_at(fd, "f") == b"deep"
        os.close(fd)
        mount.unmount()
    finally:
        for branch in ("base", "top"):
            remove_deep(tmp_path / branch)


def remove_deep(root: Path) -> None:
    """rm -r of root/d, which pytest cannot remove: its own removal recurses. Each directory moves to the top first."""
    while (root / "d").exists():
        for entry in os.scandir(root / "d"):
            if entry.is_dir(follow_symlinks=False):
                os.rename(entry.path, root / "next")
            else:
                os.unlink(entry.path)
        os.rmdir(root / "d")
        if (root / "next").exists():
            os.rename(root / "next", root / "d")


# -- many branches ----------------------------------------------------------------------------

BRANCHES = 500


@modes
def test_five_hundred_branches(tmp_path: Path, udba: str) -> None:
    with file_system(tmp_path / "disk", "tmpfs") as disk:
        words = []
        for i in range(BRANCHES):
            branch = disk / f"b{i:03}"
            (branch / "common").mkdir(parents=True)
            (branch / "same").write_text(f"{i}")
            (branch / f"only{i}").write_text(f"{i}")
            (branch / "common" / f"in{i}").write_text(f"{i}")
            if i % 10 == 5:
                (branch / f".wh.only{i + 1}").touch()
            words.append(f"{branch}={'rw' if i == 0 else 'ro+wh' if i % 2 else 'ro'}")
        hidden = {i + 1 for i in range(5, BRANCHES - 1, 10)}
        with mounted(words, tmp_path / "mnt", udba) as mount:
            assert (mount.path / "same").read_text() == "0"
            for i in range(BRANCHES):
                if i in hidden:
                    assert not (mount.path / f"only{i}").exists(), i
                else:
                    assert (mount.path / f"only{i}").read_text() == f"{i}"
            listed = os.listdir(mount.path)
            assert len(listed) == len(set(listed)) == 2 + BRANCHES - len(hidden)
            assert len(os.listdir(mount.path / "common")) == BRANCHES
            assert errno_of(lambda: os.stat(mount.path / "absent")) == "ENOENT"
            with (mount.path / f"only{BRANCHES - 1}").open("a") as stream:
                stream.write("+")
            assert (disk / f"b000/only{BRANCHES - 1}").read_text() == f"{BRANCHES - 1}+"
            (mount.path / "same").unlink()
            assert not (mount.path / "same").exists()
            (mount.path / "common/new").touch()
            assert len(os.listdir(mount.path / "common")) == BRANCHES + 1


# -- statfs -----------------------------------------------------------------------------------


@modes
def test_statfs_is_that_of_the_first_branch_or_the_sum(tmp_path: Path, udba: str) -> None:
    with (
        file_system(tmp_path / "a", "tmpfs", "size=16m,nr_inodes=1000") as a,
        file_system(tmp_path / "b", "tmpfs", "size=32m,nr_inodes=2000") as b,
    ):
        for directory in (a / "one", a / "two", b / "three"):
            directory.mkdir()
        words = [f"{a}/one=rw", f"{a}/two=ro", f"{b}/three=ro"]
        with mounted(words, tmp_path / "mnt", udba) as mount:
            status, first = os.statvfs(mount.path), os.statvfs(a)
            assert status.f_namemax == MAX_NAME
            assert (status.f_blocks * status.f_frsize, status.f_files) == (16 << 20, 1000)
            assert (status.f_bavail, status.f_bfree, status.f_ffree) == (first.f_bavail, first.f_bfree, first.f_ffree)
        with mounted(words, tmp_path / "mnt", udba, "sum") as mount:
            status = os.statvfs(mount.path)
            assert status.f_namemax == MAX_NAME
            assert (status.f_blocks * status.f_frsize, status.f_files) == (48 << 20, 3000)
