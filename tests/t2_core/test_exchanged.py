"""Who may write to a branch directory puts another object in the place of what we have just made there.

Each attack is done at the worst moment, between two system calls of ours. Whatever it is that was put there, it gets no
owner, mode or name from us that its owner did not give it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.posix import EXCHANGE, renameat2
from tests.t2_core.core import core, refuse_tmpfile
from tests.t3_fuse.live import errno_of as error_of
from udbad.branch import syscalls
from udbad.errors import ExitCode, UserError
from udbad.types import Caller
from udbad.union import copydirs
from udbad.union.fs import SetAttr
from udbad.union.superblock import NeedCopyUp

ALICE, STRANGER = 1001, 65534


def after(monkeypatch: pytest.MonkeyPatch, where: object, call: str, attack: Callable[[], None]) -> None:
    """`attack` once, right after the next time that `call` was made."""
    original = getattr(where, call)

    def attacked(*arguments: object) -> object:
        monkeypatch.setattr(where, call, original)
        result = original(*arguments)
        attack()
        return result

    monkeypatch.setattr(where, call, attacked)


@contextmanager
def untouched(path: Path) -> Iterator[None]:
    """The object keeps its owner and mode, wherever it is moved."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        before = os.fstat(fd)
        yield
        now = os.fstat(fd)
        assert (now.st_uid, now.st_gid, now.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    finally:
        os.close(fd)


def temporary(directory: Path) -> Path:
    (found,) = (path for path in directory.iterdir() if path.name.startswith(".wh..wh."))
    return found


@pytest.mark.parametrize("victim", ["file", "second name", "directory"])
@pytest.mark.parametrize("kind", ["symlink", "fifo"])
def test_the_copy_of_a_symlink_or_fifo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, victim: str) -> None:
    """lchown(2) by name would give alice what somebody else keeps in her directory, or has linked from there."""
    (tmp_path / "base/d").mkdir(parents=True)
    (tmp_path / "top/d").mkdir(parents=True)
    lower = tmp_path / "base/d/x"
    lower.symlink_to("target") if kind == "symlink" else os.mkfifo(lower)
    os.chown(lower, ALICE, ALICE, follow_symlinks=False)
    secret = tmp_path / "top/d/secret"
    if victim == "directory":
        secret.mkdir()
    elif victim == "file":
        secret.write_text("secret")
    else:
        os.mkfifo(secret)
        os.link(secret, tmp_path / "elsewhere")
    if kind == "symlink" or victim != "second name":
        secret.chmod(0o700)

    def attack() -> None:
        made = temporary(tmp_path / "top/d")
        made.unlink()
        secret.rename(made)

    with core(tmp_path) as union, untouched(secret):
        node = union.find("d/x")
        after(monkeypatch, syscalls, "symlink_at" if kind == "symlink" else "mknod_at", attack)
        change = SetAttr(gid=ALICE)
        assert error_of(lambda: union.run(lambda: union.fs.setattr(node.id, change, None, union.caller))) in (
            "ESTALE",
            "EISDIR",
            "EPERM",
        )
    assert not (tmp_path / "top/d/x").is_symlink()


def test_the_source_of_a_copied_symlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied is what was looked at: not the target and attributes of another link with its owner."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/x").symlink_to("old")
    (tmp_path / "base/y").symlink_to("other")
    with core(tmp_path) as union:
        node = union.find("x")
        after(
            monkeypatch, syscalls, "stat_at",
            lambda: renameat2(os.fsencode(tmp_path / "base/x"), os.fsencode(tmp_path / "base/y"), EXCHANGE),
        )  # fmt: skip
        assert error_of(
            lambda: union.run(lambda: union.fs.setattr(node.id, SetAttr(gid=ALICE), None, union.caller))
        ) in ("", "ESTALE")
        if (tmp_path / "top/x").is_symlink():
            assert os.readlink(tmp_path / "top/x") == "old"


def test_the_copy_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alice's directory is copied up; what root keeps to himself beside it does not become hers."""
    (tmp_path / "base/d/e").mkdir(parents=True)
    os.chown(tmp_path / "base/d/e", ALICE, ALICE)
    private = tmp_path / "top/d/private"
    private.mkdir(parents=True)
    private.chmod(0o700)
    (private / "secret").write_text("secret")

    def attack() -> None:
        renameat2(os.fsencode(temporary(tmp_path / "top/d")), os.fsencode(private), EXCHANGE)

    with core(tmp_path) as union, untouched(private):
        directory = union.find("d/e").id
        after(monkeypatch, syscalls, "mkdir_at", attack)
        assert error_of(lambda: union.run(lambda: union.fs.mkdir(directory, b"new", 0o755, union.caller))) == "ESTALE"
        assert (temporary(tmp_path / "top/d") / "secret").read_text() == "secret"
        assert union.run(lambda: union.fs.mkdir(directory, b"new", 0o755, union.caller))
    assert (tmp_path / "top/d/e/new").is_dir()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("named", [False, True])
def test_the_copy_that_becomes_a_pseudo_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None], kept: bool, named: bool
) -> None:
    """Names in directories of others never show a file that was put under the name that was copied up.

    kept: the copy has a name still, elsewhere. named: it had a temporary one, as on a file system without O_TMPFILE.
    """
    if named:
        refuse_tmpfile(monkeypatch)
    (tmp_path / "base/d").mkdir(parents=True)
    (tmp_path / "base/e").mkdir()
    (tmp_path / "top/d").mkdir(parents=True)
    (tmp_path / "base/d/f").write_text("old")
    os.link(tmp_path / "base/d/f", tmp_path / "base/e/g")
    (tmp_path / "evil").write_text("evil")

    def attack() -> None:
        if kept:
            (tmp_path / "top/d/f").rename(tmp_path / "top/d/kept")
        (tmp_path / "evil").replace(tmp_path / "top/d/f")

    if not kept:
        expect_log("no pseudo-link for b'f'")
    with core(tmp_path) as union:
        handle = union.open("d/f", os.O_WRONLY)
        if named:
            after(monkeypatch, copydirs, "publish", attack)
        else:
            after(monkeypatch, syscalls, "link_fd", attack)
        union.write(handle, b"new")
        assert (tmp_path / "top/d/f").read_text() == "evil"
        assert union.content("e/g") == (b"new" if kept else b"old")
        homes = [home.read_text() for home in (tmp_path / "top/.wh..wh.plnk").iterdir()]
        assert homes == (["new"] if kept else [])


# -- pseudo-links that somebody has put there ----------------------------------------------------------


def planted(tmp_path: Path) -> None:
    """A branch `old` with a pseudo-link, as a mount has left it: e/g shows `planted` by it."""
    (tmp_path / "base/d").mkdir(parents=True)
    (tmp_path / "base/e").mkdir()
    (tmp_path / "base/d/f").write_text("good")
    os.link(tmp_path / "base/d/f", tmp_path / "base/e/g")
    with core(tmp_path, {"old": "rw", "base": "ro"}) as union:
        union.write(union.open("d/f", os.O_WRONLY), b"planted")
    (tmp_path / "old/d/f").unlink()


@pytest.mark.parametrize("how", ["owner", "mode"])
def test_a_plink_directory_that_others_may_have_filled(
    tmp_path: Path, expect_log: Callable[[str], None], how: str
) -> None:
    """In a root like /tmp (sticky, anybody may make names in it) or with a careless mode: not believed, not written."""
    planted(tmp_path)
    plnk = tmp_path / "old/.wh..wh.plnk"
    if how == "owner":
        (tmp_path / "old").chmod(0o1777)
        os.chown(plnk, STRANGER, STRANGER)
    else:
        plnk.chmod(0o777)
    expect_log("others may have written what is in .wh..wh.plnk; its pseudo-links are passed over")
    with core(tmp_path, {"old": "ro+wh", "base": "ro"}) as union:
        assert union.content("e/g") == b"good"
    why = r"\.wh\.\.wh\.plnk belongs to uid .* others may have written"
    with pytest.raises(UserError, match=why) as refused, core(tmp_path, {"old": "rw", "base": "ro"}):
        pass
    assert refused.value.code is ExitCode.BRANCH
    with core(tmp_path, {"old": "rw", "base": "ro"}, plink=False) as union:
        assert union.content("e/g") == b"good"


@pytest.mark.parametrize("root", [0o755, 0o777])
def test_a_plink_directory_of_whoever_could_have_replaced_everything(tmp_path: Path, root: int) -> None:
    """The owner of the branch (a restored backup) or, where it is open to all, anybody."""
    planted(tmp_path)
    for path in ("old", "old/.wh..wh.plnk"):
        os.chown(tmp_path / path, STRANGER if root == 0o755 else 0, STRANGER)
    (tmp_path / "old").chmod(root)
    if root == 0o777:
        os.chown(tmp_path / "old/.wh..wh.plnk", ALICE, ALICE)
    for permission in ("ro+wh", "rw"):
        with core(tmp_path, {"old": permission, "base": "ro"}) as union:
            assert union.content("e/g") == b"planted"


# -- attributes and leases -----------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["set", "remove"])
def test_acls_that_the_kernel_does_not_check_are_root_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """system.* is passed to every file system unchecked (NFSv4 ACLs); nothing is even copied up for it."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/f").write_text("f")
    asked: list[object] = []
    monkeypatch.setattr(syscalls, "setxattr", lambda *arguments: asked.append(arguments[1]))
    monkeypatch.setattr(syscalls, "removexattr", lambda *arguments: asked.append(arguments[1]))
    with core(tmp_path) as union:
        node = union.find("f").id

        def attempt(caller: Caller, key: bytes = b"system.nfs4_acl") -> None:
            if change == "set":
                union.fs.setxattr(node, key, b"", caller)
            else:
                union.fs.removexattr(node, key, caller)

        alice = Caller(ALICE, ALICE, 0, 0)
        assert error_of(lambda: attempt(alice)) == "EOPNOTSUPP"
        assert not (tmp_path / "top/f").exists()
        with pytest.raises(NeedCopyUp):
            attempt(union.caller)
        union.run(lambda: attempt(union.caller))
        union.run(lambda: attempt(alice, b"system.posix_acl_access"))  # this one the kernel has checked
    assert asked == [b"system.nfs4_acl", b"system.posix_acl_access"]


def test_a_lease_holds_nobody_up(tmp_path: Path) -> None:
    """Its owner could have every open(2) without O_NONBLOCK wait for lease-break-time, and the whole mount with it."""
    with core(tmp_path) as union:
        union.create("f", b"content")
        union.fs.release(next(iter(union.fs.handles.files)))
        handle = union.open("f")
        (union["top"] / "f").rename(union["top"] / "g")  # nothing but the open file leads there
        lease = os.open(union["top"] / "g", os.O_RDONLY)
        try:
            fcntl.fcntl(lease, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            node = handle.node.id
            assert error_of(lambda: union.fs.open(node, os.O_WRONLY, union.caller)) == "EAGAIN"
            assert error_of(lambda: union.fs.open(node, os.O_RDONLY, union.caller)) in ("", "EAGAIN")
        finally:
            os.close(lease)
        assert union.fs.open(node, os.O_WRONLY, union.caller)


def test_a_device_in_the_place_of_a_file_is_not_opened(tmp_path: Path) -> None:
    """Opening some devices does something; alice, who can rename root's device in her directory, may not."""
    with core(tmp_path) as union:
        union.create("f", b"content")
        union.fs.release(next(iter(union.fs.handles.files)))
        node = union.find("f")
        device = tmp_path / "top/device"
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        renameat2(os.fsencode(device), os.fsencode(tmp_path / "top/f"), EXCHANGE)
        root = union.sb.branches[0].root_fd
        with pytest.raises(PermissionError):
            os.open(b"f", os.O_RDONLY, dir_fd=root)
        with pytest.raises(OSError, match="Stale"):
            syscalls.open_file_at(root, b"f", os.O_RDONLY)
        assert error_of(lambda: union.fs.open(node.id, os.O_RDONLY, union.caller)) == "ESTALE"
        fd, st = syscalls.open_file_at(root, b"device", os.O_RDONLY)
        os.close(fd)
        assert st.st_size == len(b"content")
