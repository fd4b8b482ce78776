"""What is open stays usable, as on a native file system: descriptors and mappings of a lower file, through its copy-up
and the loss of its last name (dpkg replaces running programs that way).

Each history is played on the union and on a plain directory, with the same observations afterwards.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory

pytestmark = pytest.mark.fuse

SIZE = 3 * mmap.PAGESIZE
TRIGGERS: dict[str, Callable[[Path], object]] = {
    "chmod": lambda path: path.chmod(0o700),
    "chown": lambda path: os.chown(path, 1, 1),
    "utimens": lambda path: os.utime(path, ns=(1, 1)),
    "setxattr": lambda path: os.setxattr(path, "user.mark", b"1"),
    "truncate": lambda path: os.truncate(path, SIZE - 1),
    "write": lambda path: _write(path),
    "rename": lambda path: path.rename(path.with_name(path.name + ".moved")),
    "link": lambda path: path.with_name(path.name + ".link").hardlink_to(path),
}
LOSSES: dict[str, Callable[[Path], object]] = {
    "unlink": lambda path: path.unlink(),
    "rename over": lambda path: _replace(path),
    "rename away, unlink": lambda path: path.rename(path.with_name(path.name + ".away")).unlink(),
}


def _write(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"#!")


def _replace(path: Path) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text("new")
    new.rename(path)


def _names(path: Path) -> list[Path]:
    """All names that a trigger has left of the file."""
    return [name for name in (path, path.with_name(path.name + ".moved"), path.with_name(path.name + ".link"))
            if name.exists()]  # fmt: skip


def _link(fd: int, path: Path) -> None:
    """linkat(2) of what is behind a descriptor; os.link() only follows the link in /proc when a directory is given."""
    directory = os.open(path.parent, os.O_PATH)
    try:
        os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(directory)


def _errno_or(call: Callable[[], object]) -> object:
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _mapped(fd: int) -> bytes:
    with mmap.mmap(fd, SIZE - 1, prot=mmap.PROT_READ) as mapping:
        return mapping[:]


def _executed(fd: int) -> int:
    """Exit code of the program behind a descriptor (fexecve(3)); in a child that has it inherited."""
    pid = os.fork()
    if pid == 0:
        os.set_inheritable(fd, True)
        try:
            os.execve(fd, ["true"], {})
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _play(path: Path, trigger: str, loss: str) -> dict[str, object]:
    """Open and map a file, have it copied up and lose all its names; what then can be seen through what was open."""
    reader = os.open(path, os.O_RDONLY)
    writer = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(reader, SIZE, prot=mmap.PROT_READ)
    try:
        TRIGGERS[trigger](path)
        for name in _names(path):
            LOSSES[loss](name)
        seen = {
            "read": os.pread(reader, SIZE, 0),
            "mapped before": mapping[: SIZE - 1],
            "mapped after": _mapped(reader),
            "fsync": _errno_or(lambda: os.fsync(reader)),
            "chmod": _errno_or(lambda: os.fchmod(reader, 0o755)),
            "xattr": _errno_or(lambda: os.setxattr(reader, "user.late", b"2")),
            "xattrs": sorted(os.listxattr(reader)),
            "link": _errno_or(lambda: _link(reader, path.with_name(path.name + ".late"))),
            "write": os.pwrite(writer, b"!", SIZE - 2),
            "read again": os.pread(reader, 2, SIZE - 3),
            "truncate": _errno_or(lambda: os.truncate(writer, SIZE)),
        }
        for who, fd in (("reader", reader), ("writer", writer)):
            st = os.fstat(fd)
            seen[who] = stat.filemode(st.st_mode), st.st_nlink, st.st_size, st.st_uid
        return seen
    finally:
        mapping.close()
        os.close(reader)
        os.close(writer)


def _content(where: Path) -> None:
    where.write_bytes(b"#" + bytes(range(1, 256)) * (SIZE // 255) + b"\n" * (SIZE - 1 - SIZE // 255 * 255))
    where.chmod(0o644)


@pytest.mark.parametrize("udba", ["none", "reval", "notify"])
def test_everything_open_survives(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    low, native = tmp_path / "low", tmp_path / "native"
    names = {f"{trigger}, {loss}": (trigger, loss) for trigger in TRIGGERS for loss in LOSSES}
    for directory in (low, native):
        directory.mkdir()
        for name in names:
            _content(directory / name)
    mount = union({"top": "rw", "low": "ro"}, udba)
    for name, (trigger, loss) in names.items():
        assert _play(mount.path / name, trigger, loss) == _play(native / name, trigger, loss), name


def test_a_running_program_survives(union: UnionFactory, tmp_path: Path) -> None:
    """Its pages are read while it runs, and it may be executed again through what is open of it."""
    low = tmp_path / "low"
    low.mkdir()
    program = shutil.which("true")
    assert program is not None
    for number, loss in enumerate(LOSSES):
        shutil.copy(program, low / f"true{number}")
        mount = union({f"top{number}": "rw", "low": "ro"}, "notify", mount_point=f"mnt{number}")
        path = mount.path / f"true{number}"
        fd = os.open(path, os.O_RDONLY)
        try:
            path.chmod(0o711)
            LOSSES[loss](path)
            assert _executed(fd) == 0
        finally:
            os.close(fd)


@pytest.mark.parametrize("udba", ["none", "reval", "notify"])
def test_descriptor_means_the_object_not_the_name(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Attributes, ACLs and links by descriptor are the opened file's, whatever has its name on the branch by now."""
    mount = union({"top": "rw", "low": "ro"}, udba)
    for name in ("f", "g"):
        (mount["top"] / name).write_text(name)
        (mount["top"] / f"other-{name}").write_text("other")
        os.setxattr(mount["top"] / name, "user.who", name.encode())
    fd = os.open(mount.path / "f", os.O_RDONLY)
    kept = os.open(mount.path / "g", os.O_RDONLY)
    try:
        (mount["top"] / "other-f").replace(mount["top"] / "f")  # its last name
        (mount["top"] / "g").rename(mount["top"] / "moved")
        (mount["top"] / "other-g").replace(mount["top"] / "g")  # not its last one
        for one, name in ((fd, "f"), (kept, "g")):
            assert os.getxattr(one, "user.who") == name.encode()
            os.setxattr(one, "user.cap", b"for me only")
            assert sorted(os.listxattr(one)) == ["user.cap", "user.who"]
            assert os.listxattr(mount["top"] / name) == []
            os.removexattr(one, "user.who")
            os.fchmod(one, 0o600)
            assert stat.S_IMODE((mount["top"] / name).stat().st_mode) == 0o644
        with pytest.raises(FileNotFoundError):
            _link(fd, mount.path / "again")
        _link(kept, mount.path / "again")
        assert (mount["top"] / "again").read_text() == "g"
    finally:
        os.close(fd)
        os.close(kept)
