"""Every mutation, by a mount process that is killed before and after each system call that changes something."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import stat as st_mod
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from tests.t2_core.core import refuse_tmpfile
from tests.t2_core.killed import UNIQUE, Faults, Killed, Mount, Request, descriptors, mounted, outcome, swept
from udbad.branch.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from udbad.edge.once import REPEATED, RULES
from udbad.edge.table import TABLE
from udbad.inodes.slot import RESENT
from udbad.kernel import wire
from udbad.types import ROOT_ID

TWO = {"top": "rw", "base": "ro"}
THREE = {"top": "rw", "mid": "rw", "base": "ro"}

Make = bytes | None | tuple[str, str]
"""Content of a file; None: a directory; ("link", other) or ("symlink", target)."""


def build(directory: Path, content: Mapping[str, Make]) -> None:
    for path, what in content.items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if what is None:
            target.mkdir(exist_ok=True)
        elif isinstance(what, bytes):
            target.write_bytes(what)
        elif what[0] == "link":
            os.link(directory / what[1], target)
        else:
            target.symlink_to(what[1])


# -- requests -------------------------------------------------------------------------------------------

Ask = Callable[[Mount], Request]


def split(mount: Mount, path: str) -> tuple[int, bytes]:
    above, _, name = path.rpartition("/")
    return (mount.id(above) if above else ROOT_ID), os.fsencode(name)


def known(mount: Mount, path: str) -> None:
    if mount.union.exists(path):
        mount.id(path)


def mkdir(path: str) -> Ask:
    def ask(mount: Mount) -> Request:
        parent, name = split(mount, path)
        return wire.MKDIR, parent, struct.pack("<II", 0o755, 0o022) + name + b"\0"

    return ask


def mknod(path: str, mode: int = st_mod.S_IFIFO | 0o644) -> Ask:
    def ask(mount: Mount) -> Request:
        parent, name = split(mount, path)
        return wire.MKNOD, parent, struct.pack("<IIII", mode, 0, 0o022, 0) + name + b"\0"

    return ask


def symlink(path: str, target: bytes = b"somewhere") -> Ask:
    def ask(mount: Mount) -> Request:
        parent, name = split(mount, path)
        return wire.SYMLINK, parent, name + b"\0" + target + b"\0"

    return ask


def create(path: str, flags: int = os.O_RDWR | os.O_CREAT | os.O_EXCL, mode: int = 0o644) -> Ask:
    def ask(mount: Mount) -> Request:
        parent, name = split(mount, path)
        return wire.CREATE, parent, struct.pack("<IIII", flags, st_mod.S_IFREG | mode, 0o022, 0) + name + b"\0"

    return ask


def tmpfile(path: str) -> Ask:
    def ask(mount: Mount) -> Request:
        return wire.TMPFILE, mount.id(path), struct.pack("<IIII", os.O_RDWR, 0o100644, 0o022, 0) + b"#1\0"

    return ask


def link(source: str, path: str) -> Ask:
    def ask(mount: Mount) -> Request:
        node = mount.id(source)
        parent, name = split(mount, path)
        return wire.LINK, parent, wire.QWORD.pack(node) + name + b"\0"

    return ask


def unlink(path: str) -> Ask:
    def ask(mount: Mount) -> Request:
        known(mount, path)
        parent, name = split(mount, path)
        return wire.UNLINK, parent, name + b"\0"

    return ask


def rmdir(path: str) -> Ask:
    def ask(mount: Mount) -> Request:
        known(mount, path)
        parent, name = split(mount, path)
        return wire.RMDIR, parent, name + b"\0"

    return ask


def rename(src: str, dst: str, flags: int = 0) -> Ask:
    def ask(mount: Mount) -> Request:
        known(mount, src)
        known(mount, dst)
        parent, name = split(mount, src)
        to, called = split(mount, dst)
        return wire.RENAME2, parent, struct.pack("<QII", to, flags, 0) + name + b"\0" + called + b"\0"

    return ask


def setattr_(path: str, valid: int, size: int = 0, mode: int = 0, uid: int = 0, gid: int = 0) -> Ask:
    def ask(mount: Mount) -> Request:
        body = wire.SETATTR_IN.pack(valid, 0, size, 10**9, 10**9, 0, 5, 7, 0, mode, uid, gid)
        return wire.SETATTR, mount.id(path), body

    return ask


def write(path: str, flags: int, offset: int, data: bytes) -> Ask:
    def ask(mount: Mount) -> Request:
        handle = mount.union.open(path, flags)
        head = struct.pack("<QQIIQII", handle.fh, offset, len(data), 0, 0, flags, 0)
        return wire.WRITE, handle.node.id, head + data

    return ask


def open_(path: str, flags: int) -> Ask:
    def ask(mount: Mount) -> Request:
        return wire.OPEN, mount.id(path), struct.pack("<II", flags, 0)

    return ask


def opendir(path: str) -> Ask:
    def ask(mount: Mount) -> Request:
        return wire.OPENDIR, mount.id(path), struct.pack("<II", 0, 0)

    return ask


def fallocate(path: str, mode: int, offset: int, length: int) -> Ask:
    def ask(mount: Mount) -> Request:
        handle = mount.union.open(path, os.O_RDWR)
        return wire.FALLOCATE, handle.node.id, wire.FALLOCATE_IN.pack(handle.fh, offset, length, mode)

    return ask


def copy(source: str, target: str, length: int) -> Ask:
    def ask(mount: Mount) -> Request:
        one, other = mount.union.open(source), mount.union.open(target, os.O_RDWR)
        body = wire.COPY_IN.pack(one.fh, 0, other.node.id, other.fh, 2, length)
        return wire.COPY_FILE_RANGE, one.node.id, body

    return ask


def setxattr(path: str, flags: int, value: bytes = b"value") -> Ask:
    def ask(mount: Mount) -> Request:
        body = struct.pack("<IIII", len(value), flags, 0, 0) + b"user.key\0" + value
        return wire.SETXATTR, mount.id(path), body

    return ask


def removexattr(path: str) -> Ask:
    def ask(mount: Mount) -> Request:
        return wire.REMOVEXATTR, mount.id(path), b"user.key\0"

    return ask


def copied_first(path: str, ask: Ask) -> Ask:
    def first(mount: Mount) -> Request:
        mount.union.write(mount.union.open(path, os.O_RDWR), b"L")
        return ask(mount)

    return first


def opened(path: str, flags: int, ask: Ask, unlinked: bool = False) -> Ask:
    """`ask` while somebody has a file open, which has no name any more (unlinked)."""

    def asking(mount: Mount) -> Request:
        mount.union.open(path, flags)
        if unlinked:
            mount.union.unlink(path)
        return ask(mount)

    return asking


def listed(ask: Ask) -> Ask:
    """`ask` where what is in the root is known."""

    def asking(mount: Mount) -> Request:
        mount.union.names()
        return ask(mount)

    return asking


def write_unlinked(path: str, flags: int, offset: int, data: bytes) -> Ask:
    def ask(mount: Mount) -> Request:
        request = write(path, flags, offset, data)(mount)
        mount.union.unlink(path)
        return request

    return ask


# -- arrangements -----------------------------------------------------------------------------------------

WH = b""
MAKERS: Mapping[str, Callable[[str], Ask]] = {
    "mkdir": mkdir,
    "mknod": mknod,
    "symlink": symlink,
    "create": create,
    "mknod-file": lambda path: mknod(path, st_mod.S_IFREG | 0o600),
}


@dataclass(frozen=True)
class Case:
    ask: Ask
    content: Mapping[str, Make]
    layers: Mapping[str, str] = field(default_factory=lambda: TWO)
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Path], None] = lambda _: None


def with_key(path: str) -> Callable[[Path], None]:
    return lambda directory: os.setxattr(directory / path, b"user.key", b"before")


LOWER_DIR: Mapping[str, Make] = {"base/d/x": b"low", "base/d/y": b"low"}
MERGED: Mapping[str, Make] = {"top/d": None, **LOWER_DIR}
WHITED: Mapping[str, Make] = {"top/.wh.n": WH, "base/n": b"hidden"}
WHITED_DIR: Mapping[str, Make] = {"top/.wh.n": WH, "base/n/x": b"hidden"}

REDIRECTS = {"dirren": "on"}
CASES: dict[str, Case] = {
    # making
    **{
        f"{kind}-{where}": Case(make(path), content)
        for kind, make in MAKERS.items()
        for where, path, content in (
            ("free", "n", {"base/o": b""}),
            ("whited", "n", WHITED),
            ("whited-dir", "n", WHITED_DIR),
            ("in-lower-dir", "d/n", LOWER_DIR),
            ("in-merged-dir", "d/n", MERGED),
            ("whited-in-merged", "d/x", {"top/d/.wh.x": WH, **LOWER_DIR}),
            ("there", "n", {"base/n": b"there"}),
        )
    },
    "mkdir-opaque-always": Case(mkdir("n"), {"base/o": b""}, options={"opaque_always": True}),
    "mkdir-known": Case(listed(mkdir("n")), {"base/o": b""}, options={"udba": "none"}),
    "create-trunc": Case(create("n", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), WHITED),
    "tmpfile": Case(tmpfile(""), {"base/o": b""}),
    "tmpfile-lower-dir": Case(tmpfile("d"), LOWER_DIR),
    # link
    "link-upper": Case(link("a", "n"), {"top/a": b"up"}),
    "link-upper-whited": Case(link("a", "n"), {"top/a": b"up", **WHITED}),
    "link-upper-to-lower-dir": Case(link("a", "d/n"), {"top/a": b"up", **LOWER_DIR}),
    "link-lower": Case(link("a", "n"), {"base/a": b"low"}),
    "link-lower-whited": Case(link("a", "n"), {"base/a": b"low", **WHITED}),
    "link-lower-symlink": Case(link("a", "n"), {"base/a": ("symlink", "t")}),
    "link-lower-no-plink": Case(link("a", "n"), {"base/a": b"low"}, options={"plink": False}),
    # unlink
    "unlink-upper": Case(unlink("a"), {"top/a": b"up"}),
    "unlink-lower": Case(unlink("a"), {"base/a": b"low"}),
    "unlink-both": Case(unlink("a"), {"top/a": b"up", "base/a": b"low"}),
    "unlink-beside-its-whiteout": Case(unlink("a"), {"top/a": b"up", "top/.wh.a": WH, "base/a": b"low"}),
    "unlink-in-lower-dir": Case(unlink("d/x"), LOWER_DIR),
    "unlink-hard-link": Case(unlink("a"), {"top/a": b"up", "top/b": ("link", "top/a")}),
    "unlink-lower-hard-link": Case(unlink("a"), {"base/a": b"low", "base/b": ("link", "base/a")}),
    "unlink-mid": Case(unlink("a"), {"mid/a": b"mid", "base/a": b"low"}, THREE),
    # rmdir
    "rmdir-upper": Case(rmdir("d"), {"top/d": None}),
    "rmdir-known": Case(listed(rmdir("d")), {"top/d": None, "base/o": b""}, options={"udba": "none"}),
    "rmdir-known-with-marks": Case(listed(rmdir("d")), {"top/d/.wh.x": WH, "base/o": b""}, options={"udba": "none"}),
    "rmdir-lower": Case(rmdir("d"), {"base/d": None}),
    "rmdir-merged": Case(rmdir("d"), {"top/d": None, "base/d": None}),
    "rmdir-with-marks": Case(rmdir("d"), {"top/d/.wh.x": WH, "top/d/.wh.y": WH, **LOWER_DIR}),
    "rmdir-opaque": Case(rmdir("d"), {"top/d/.wh..wh..opq": WH, **LOWER_DIR}),
    # rename
    "rename-upper": Case(rename("a", "n"), {"top/a": b"up"}),
    "rename-upper-noreplace": Case(rename("a", "n", RENAME_NOREPLACE), {"top/a": b"up"}),
    "rename-lower": Case(rename("a", "n"), {"base/a": b"low"}),
    "rename-both": Case(rename("a", "n"), {"top/a": b"up", "base/a": b"low"}),
    "rename-over-upper": Case(rename("a", "b"), {"top/a": b"up", "top/b": b"old"}),
    "rename-over-lower": Case(rename("a", "b"), {"top/a": b"up", "base/b": b"old"}),
    "rename-both-over-both": Case(
        rename("a", "b"), {"top/a": b"up", "top/b": b"old", "base/a": b"low", "base/b": b"lower"}
    ),
    "rename-lower-over-lower": Case(rename("a", "b"), {"base/a": b"low", "base/b": b"old"}),
    "rename-to-whited": Case(rename("a", "n"), {"top/a": b"up", **WHITED}),
    "rename-to-lower-dir": Case(rename("a", "d/n"), {"top/a": b"up", **LOWER_DIR}),
    "rename-from-lower-dir": Case(rename("d/x", "d/n"), LOWER_DIR),
    "rename-lower-symlink": Case(rename("a", "n"), {"base/a": ("symlink", "t")}),
    "rename-lower-hard-link": Case(rename("a", "n"), {"base/a": b"low", "base/b": ("link", "base/a")}),
    "rename-second-name-of-a-copied-file": Case(
        copied_first("a", rename("b", "n")), {"base/a": b"low", "base/b": ("link", "base/a")}
    ),
    "rename-over-hard-link": Case(rename("a", "b"), {"top/a": b"up", "top/b": b"old", "top/c": ("link", "top/b")}),
    "rename-same-file": Case(rename("a", "b"), {"top/a": b"up", "top/b": ("link", "top/a")}),
    "rename-dir": Case(rename("d", "n"), {"top/d/x": b"up"}),
    "rename-dir-to-whited": Case(rename("d", "n"), {"top/d/x": b"up", **WHITED_DIR}),
    "rename-dir-over-empty": Case(rename("d", "e"), {"top/d/x": b"up", "top/e": None}),
    "rename-dir-over-lower-empty": Case(rename("d", "e"), {"top/d/x": b"up", "base/e": None}),
    "rename-dir-over-marks": Case(rename("d", "e"), {"top/d/x": b"up", "top/e/.wh.y": WH, "base/e/y": b"low"}),
    "rename-dir-beside-lower-hidden": Case(
        rename("d", "n"), {"top/d/x": b"up", "top/d/.wh..wh..opq": WH, "base/d/y": b"low"}
    ),
    "rename-lower-empty-dir": Case(rename("d", "n"), {"base/d": None}),
    "rename-merged-dir": Case(rename("d", "n"), MERGED),
    "exchange-upper": Case(rename("a", "b", RENAME_EXCHANGE), {"top/a": b"one", "top/b": b"two"}),
    "exchange-lower": Case(rename("a", "b", RENAME_EXCHANGE), {"base/a": b"one", "base/b": b"two"}),
    "exchange-dir": Case(
        rename("d", "e", RENAME_EXCHANGE),
        {"top/d/x": b"1", "top/d/.wh..wh..opq": WH, "base/d/z": b"low", "top/e/y": b"2"},
    ),
    "redirect-merged": Case(rename("d", "n"), {"top/d/u": b"up", **LOWER_DIR}, options=REDIRECTS),
    "redirect-lower": Case(rename("d", "n"), LOWER_DIR, options=REDIRECTS),
    "redirect-to-whited": Case(rename("d", "n"), {**LOWER_DIR, "top/.wh.n": WH, "base/n/y": b"low"}, options=REDIRECTS),
    "redirect-over-lower-empty": Case(rename("d", "e"), {**LOWER_DIR, "base/e": None}, options=REDIRECTS),
    "redirect-over-marks": Case(
        rename("d", "e"), {**LOWER_DIR, "top/e/.wh.y": WH, "base/e/y": b"low"}, options=REDIRECTS
    ),
    "redirect-into-lower-dir": Case(rename("d", "e/n"), {**LOWER_DIR, "base/e/y": b"low"}, options=REDIRECTS),
    "redirect-exchange": Case(rename("d", "e", RENAME_EXCHANGE), {**LOWER_DIR, "base/e/y": b"low"}, options=REDIRECTS),
    "redirect-exchange-with-file": Case(
        rename("d", "a", RENAME_EXCHANGE), {**LOWER_DIR, "base/a": b"low"}, options=REDIRECTS
    ),
    # attributes
    "chmod-upper": Case(setattr_("a", wire.SET_MODE, mode=0o600), {"top/a": b"up"}),
    "chmod-lower": Case(setattr_("a", wire.SET_MODE, mode=0o600), {"base/a": b"low"}),
    "chmod-lower-dir": Case(setattr_("d", wire.SET_MODE, mode=0o700), LOWER_DIR),
    "chown-chmod-times": Case(
        setattr_("a", wire.SET_MODE | wire.SET_UID | wire.SET_GID | wire.SET_ATIME | wire.SET_MTIME, 0, 0o4755, 5, 6),
        {"top/a": b"up"},
    ),
    "chown-lower-hard-link": Case(setattr_("a", wire.SET_UID, uid=5), {"base/a": b"low", "base/b": ("link", "base/a")}),
    "truncate-upper": Case(setattr_("a", wire.SET_SIZE, 2), {"top/a": b"long"}),
    "truncate-lower": Case(setattr_("a", wire.SET_SIZE, 2), {"base/a": b"long"}),
    "truncate-longer": Case(setattr_("a", wire.SET_SIZE | wire.SET_MODE, 9, 0o640), {"top/a": b"long"}),
    "setxattr": Case(setxattr("a", 0), {"top/a": b"up"}),
    "setxattr-create": Case(setxattr("a", os.XATTR_CREATE), {"top/a": b"up"}),
    "setxattr-create-there": Case(
        setxattr("a", os.XATTR_CREATE, b"before"), {"top/a": b"up"}, prepare=with_key("top/a")
    ),
    "setxattr-create-lower": Case(setxattr("a", os.XATTR_CREATE), {"base/a": b"low"}),
    "setxattr-replace": Case(setxattr("a", os.XATTR_REPLACE), {"top/a": b"up"}, prepare=with_key("top/a")),
    "setxattr-replace-none": Case(setxattr("a", os.XATTR_REPLACE), {"top/a": b"up"}),
    "removexattr": Case(removexattr("a"), {"top/a": b"up"}, prepare=with_key("top/a")),
    "removexattr-none": Case(removexattr("a"), {"top/a": b"up"}),
    "removexattr-lower": Case(removexattr("a"), {"base/a": b"low"}, prepare=with_key("base/a")),
    # content
    "write": Case(write("a", os.O_RDWR, 1, b"XY"), {"top/a": b"long"}),
    "write-lower": Case(write("a", os.O_RDWR, 1, b"XY"), {"base/a": b"long"}),
    "write-lower-hard-link": Case(write("a", os.O_RDWR, 1, b"XY"), {"base/a": b"long", "base/b": ("link", "base/a")}),
    "append": Case(write("a", os.O_WRONLY | os.O_APPEND, 4, b"more"), {"top/a": b"long"}),
    "append-lower": Case(write("a", os.O_RDWR | os.O_APPEND, 4, b"more"), {"base/a": b"long"}),
    "append-the-same": Case(write("a", os.O_RDWR | os.O_APPEND, 4, b"aa"), {"top/a": b"aaaa"}),
    "open": Case(open_("a", os.O_RDWR), {"top/a": b"up"}),
    "open-trunc": Case(open_("a", os.O_WRONLY | os.O_TRUNC), {"top/a": b"up"}),
    "open-trunc-lower": Case(open_("a", os.O_WRONLY | os.O_TRUNC), {"base/a": b"low"}),
    "opendir": Case(opendir("d"), MERGED),
    "write-unlinked": Case(write_unlinked("a", os.O_RDWR, 1, b"XY"), {"top/a": b"long"}),
    "write-unlinked-lower": Case(write_unlinked("a", os.O_RDWR, 1, b"XY"), {"base/a": b"long"}),
    "append-unlinked-lower": Case(write_unlinked("a", os.O_RDWR | os.O_APPEND, 4, b"XY"), {"base/a": b"long"}),
    "write-unlinked-lower-hard-link": Case(
        write_unlinked("a", os.O_RDWR, 1, b"XY"), {"base/a": b"long", "base/b": ("link", "base/a")}
    ),
    "unlink-open": Case(opened("a", os.O_RDWR, unlink("a")), {"top/a": b"up", "base/a": b"low"}),
    "unlink-open-lower": Case(opened("a", os.O_RDONLY, unlink("a")), {"base/a": b"low"}),
    "rename-over-open": Case(opened("b", os.O_RDWR, rename("a", "b")), {"top/a": b"up", "top/b": b"old"}),
    "rename-open-lower": Case(opened("a", os.O_RDWR, rename("a", "b")), {"base/a": b"low", "base/b": b"old"}),
    "chmod-open-lower": Case(opened("a", os.O_RDWR, setattr_("a", wire.SET_MODE, mode=0o600)), {"base/a": b"low"}),
    "punch": Case(fallocate("a", 3, 1, 2), {"top/a": b"long"}),
    "allocate": Case(fallocate("a", 0, 0, 10), {"top/a": b"long"}),
    "copy": Case(copy("a", "b", 3), {"base/a": b"abc", "top/b": b"long"}),
}


def differences(tmp_path: Path, case: Case, whiteouts: str = "aufs") -> list[str]:
    """Of each process that is killed from one that is not."""
    found: list[str] = []
    number = 0

    def run(at: int, after: bool) -> Any:
        nonlocal number
        number += 1
        directory = tmp_path / str(number)
        build(directory, case.content)
        case.prepare(directory)
        for name, permission in case.layers.items():
            if whiteouts == "overlay" and permission == "rw":
                (directory / name).mkdir(exist_ok=True)
                swept(directory / name, True)  # devices, where the content says `.wh.NAME`
        try:
            return outcome(directory, case.layers, case.ask, at, after, whiteouts=whiteouts, **case.options)
        finally:
            shutil.rmtree(directory)

    right, faults = run(0, False)
    assert faults.calls[-1] in ("answer", "write", "writev"), "the answer is the last of them"
    for at in range(1, faults.count + 1):
        for after in (False, True) if at < faults.count else (False,):
            came, _ = run(at, after)
            found += [
                f"{'after' if after else 'before'} {at}, {faults.calls[at - 1]}: {line}" for line in came.differs(right)
            ]
    return found


@pytest.mark.parametrize("name", CASES)
def test_each_operation_is_done_once(tmp_path: Path, name: str) -> None:
    assert differences(tmp_path, CASES[name]) == []


OF_NAMES = [
    name
    for name in CASES
    if name.split("-")[0] in ("mkdir", "mknod", "symlink", "create", "link", "unlink", "rmdir", "rename", "exchange")
]


@pytest.mark.parametrize("name", OF_NAMES)
def test_each_is_done_once_with_whiteouts_of_overlayfs(tmp_path: Path, name: str) -> None:
    assert differences(tmp_path, CASES[name], "overlay") == []


@pytest.mark.parametrize("name", ["chmod-lower", "write-lower-hard-link", "link-lower-whited"])
def test_a_copy_up_under_a_temporary_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where the file system has no files without one."""
    refuse_tmpfile(monkeypatch)
    assert differences(tmp_path, CASES[name]) == []


@contextmanager
def without(capability: int) -> Iterator[None]:
    """In this thread, capabilities(7). capability: its number in linux/capability.h."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    before = ctypes.create_string_buffer(24)
    assert libc.capget(head, before) == 0
    words = list(struct.unpack("6I", before.raw[:24]))
    words[0] &= ~(1 << capability)  # effective; permitted it stays
    assert libc.capset(head, ctypes.create_string_buffer(struct.pack("6I", *words))) == 0
    try:
        yield
    finally:
        assert libc.capset(head, before) == 0


CAP_DAC_OVERRIDE: Final = 1


def test_a_file_that_its_owner_may_not_write(tmp_path: Path) -> None:
    """Who makes it may, where udbad has not the privilege to do so later: killed when it is made, and the successor at
    each of its steps."""
    number, killed = 0, True
    while killed:
        number += 1
        killed = made_by_three(tmp_path / str(number), number)
    assert number == 4, "before and behind each change of its mode"


def made_by_three(directory: Path, step: int) -> bool:
    """Whether the second process was killed before that step. Checks what the last one makes of it."""
    before = descriptors()
    build(directory, {"base/o": b""})
    with without(CAP_DAC_OVERRIDE), ExitStack() as stack:
        mount = stack.enter_context(mounted(directory, TWO))
        opcode, node, body = create("n", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)(mount)
        mount.record.flush()
        for number, faults in enumerate((Faults(1, after=True), Faults(step), Faults())):
            if number:
                mount = stack.enter_context(mounted(directory, TWO, mount.record, served=mount.fs.sb.branches))
            with faults.armed(), suppress(Killed):
                mount.send(opcode, node, body, UNIQUE | RESENT if number else UNIQUE)
            if not faults.fired:
                break
        answer = mount.answer()
        assert answer is not None
        assert answer[1] == 0
        handle = mount.fs.handles.files[wire.QWORD.unpack_from(answer[2], wire.ENTRY_SIZE)[0]]
        assert os.write(handle.fd, b"written") == 7
        assert struct.unpack_from("<I", answer[2], wire.ENTRY_SIZE - 28)[0] == st_mod.S_IFREG | 0o444
        assert st_mod.S_IMODE((directory / "top/n").stat().st_mode) == 0o444
    killed = number == 2
    del mount, handle
    gc.collect()
    for fd in descriptors() - before:
        os.close(fd)  # of what was killed
    return killed


def test_there_is_a_rule_for_whatever_changes_something() -> None:
    reads = {
        wire.LOOKUP, wire.GETATTR, wire.READLINK, wire.READ, wire.STATFS, wire.GETXATTR, wire.LISTXATTR, wire.READDIR,
        wire.READDIRPLUS, wire.LSEEK, wire.STATX,
    }  # fmt: skip
    assert not RULES.keys() & REPEATED
    assert TABLE.keys() - reads == RULES.keys() | REPEATED


@dataclass(frozen=True)
class Interfered:
    """others: do something directly, after the process was killed behind a system call that the operation makes."""

    ask: Ask
    content: Mapping[str, Make]
    behind: str
    others: Callable[[Path], object]
    kept: Mapping[str, bytes]
    errno: int = 0


def put(path: str, content: bytes = b"direct") -> Callable[[Path], object]:
    return lambda directory: (directory / path).write_bytes(content)


def replace(path: str) -> Callable[[Path], object]:
    def others(directory: Path) -> None:
        (directory / "new").write_bytes(b"direct")
        (directory / "new").rename(directory / path)

    return others


def extend(path: str) -> Callable[[Path], object]:
    def others(directory: Path) -> None:
        with open(directory / path, "ab") as file:
            file.write(b"direct")

    return others


def make_directory(path: str) -> Callable[[Path], object]:
    return lambda directory: build(directory, {path: b"direct"})


def uncover(name: str) -> Callable[[Path], object]:
    def others(directory: Path) -> None:
        os.unlink(directory / f"top/.wh.{name}")
        put(f"top/{name}")(directory)

    return others


def put_out_of_sight(directory: Path) -> None:
    """Into the directory that is about to be removed, by who has it open."""
    (temporary,) = (path for path in (directory / "top").glob(".wh..wh.d.*"))
    put(f"top/{temporary.name}/direct")(directory)


INTERFERED: dict[str, Interfered] = {
    "unlink": Interfered(unlink("a"), {"top/a": b"up"}, "unlink", put("top/a"), {"a": b"direct"}),
    "unlink-lower": Interfered(
        unlink("a"), {"base/a": b"low"}, "link",
        uncover("a"), {"a": b"direct"},
    ),
    "rmdir": Interfered(rmdir("d"), {"top/d": None}, "rmdir", make_directory("top/d/x"), {"d/x": b"direct"}),
    "rmdir-marks": Interfered(
        rmdir("d"), {"top/d/.wh.x": WH, "base/d/x": b"low"}, "rename", put_out_of_sight, {"d/direct": b"direct"}, 39
    ),
    "rename-source": Interfered(
        rename("a", "b"), {"top/a": b"up"}, "rename", put("top/a"), {"a": b"direct", "b": b"up"}
    ),
    "rename-target": Interfered(rename("a", "b"), {"top/a": b"up"}, "rename", replace("top/b"), {"b": b"direct"}),
    "rename-both": Interfered(
        rename("a", "b"), {"top/a": b"up", "top/b": b"old"}, "rename",
        lambda directory: (replace("top/a")(directory), replace("top/b")(directory)), {"a": b"direct", "b": b"direct"},
    ),
    "create": Interfered(create("n"), {"base/o": b""}, "open", put("top/n"), {"n": b"direct"}, 17),
    "mkdir": Interfered(mkdir("n"), {"base/o": b""}, "mkdir", make_directory("top/n/x"), {"n/x": b"direct"}, 17),
    "truncate": Interfered(
        setattr_("a", wire.SET_SIZE, 0), {"top/a": b"long"}, "ftruncate", extend("top/a"), {"a": b"direct"}
    ),
    "open-trunc": Interfered(
        open_("a", os.O_WRONLY | os.O_TRUNC), {"top/a": b"long"}, "ftruncate", extend("top/a"), {"a": b"direct"}
    ),
    "append": Interfered(
        write("a", os.O_WRONLY | os.O_APPEND, 4, b"more"), {"top/a": b"long"}, "pwrite", extend("top/a"),
        {"a": b"longmoredirect"},
    ),
    "setxattr-create": Interfered(
        setxattr("a", os.XATTR_CREATE), {"top/a": b"up"}, "setxattr",
        lambda directory: os.setxattr(directory / "top/a", b"user.key", b"direct"), {"a": b"up"}, 17,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INTERFERED)
def test_what_others_did_meanwhile_stays(tmp_path: Path, name: str, expect_log: Callable[[str], None]) -> None:
    case = INTERFERED[name]
    if name == "rmdir-marks":
        expect_log("b'd' and its whiteout are both in branch")
    build(tmp_path / "right", case.content)
    _, faults = outcome(tmp_path / "right", TWO, case.ask)
    at = max(number for number, call in enumerate(faults.calls, 1) if call == case.behind)
    build(tmp_path / "killed", case.content)
    came, _ = outcome(tmp_path / "killed", TWO, case.ask, at, True, lambda directory: case.others(directory))
    assert came.errno == case.errno
    for path, content in case.kept.items():
        assert came.union[path][5] == content


def test_what_was_begun_within_a_system_call_is_finished(tmp_path: Path) -> None:
    """A process that is killed in an append may have written a part of it."""
    build(tmp_path, {"top/a": b"long"})
    ask = write("a", os.O_WRONLY | os.O_APPEND, 4, b"more")
    came, _ = outcome(tmp_path, TWO, ask, 1, False, put("top/a", b"longmo"))
    assert came.errno == 0
    assert came.union["a"][5] == b"longmore"


def test_a_handle_that_was_given_since_stays(tmp_path: Path) -> None:
    """An operation notes the number of the next handle; what its successor gives while it waits is another one's."""
    build(tmp_path, {"top/a": b"up", "top/b": b"up"})
    with mounted(tmp_path, TWO) as first:
        opcode, node, body = unlink("a")(first)
        opening, other, flags = open_("b", os.O_RDWR)(first)
        first.record.flush()
        faults = Faults(1, after=True)
        with faults.armed(), pytest.raises(Killed):
            first.send(opcode, node, body)
        assert faults.calls == ["unlink"]
        with mounted(tmp_path, TWO, first.record) as last:
            last.send(opening, other, flags, UNIQUE + 2)
            answer = last.answer()
            assert answer is not None
            handle = wire.QWORD.unpack_from(answer[2])[0]
            last.send(opcode, node, body, UNIQUE | RESENT)
            assert last.answer() == (UNIQUE | RESENT, 0, b"")
            assert handle in last.fs.handles.files


OF_DIRECTORIES = {
    "rename-dir": "n", "rename-dir-over-lower-empty": "e", "rename-dir-beside-lower-hidden": "n",
    "rename-lower-empty-dir": "n", "redirect-merged": "n", "redirect-lower": "n",
}  # fmt: skip
"""Of cases: the name that a directory has afterwards."""


@pytest.mark.parametrize("name", OF_DIRECTORIES)
def test_a_directory_stays_itself(tmp_path: Path, name: str) -> None:
    """Whoever is in one that is renamed, wherever its process is killed."""
    case, faults, at = CASES[name], Faults(), 0
    before = descriptors()
    while not at or faults.fired:
        at += 1
        directory = tmp_path / str(at)
        build(directory, case.content)
        with mounted(directory, case.layers, **case.options) as first:
            number = first.id("d")
            opcode, node, body = case.ask(first)
            first.record.flush()
            faults = Faults(at, after=True)
            with faults.armed(), suppress(Killed):
                first.send(opcode, node, body)
            served = first.fs.sb.branches
            with mounted(directory, case.layers, first.record, served=served, **case.options) as last:
                if faults.fired:
                    last.send(opcode, node, body, UNIQUE | RESENT)
                    answer = last.answer()
                    assert answer is not None
                    assert answer[1] == 0
                assert last.id(OF_DIRECTORIES[name]) == number, faults.calls[-1]
    del first, last
    gc.collect()
    for fd in descriptors() - before:
        os.close(fd)  # of what was killed
    assert at > 2
