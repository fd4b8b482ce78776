"""The budget of descriptors: directories give up theirs between operations, never what cannot be had again."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from tests.helpers.inprocess import notify_union
from tests.t2_core.core import STRATEGIES, Core, core, few_descriptors
from tests.t2_core.test_native import Kernel, look_up
from udbad.inodes.node import Dir
from udbad.inodes.table import LEAST_FDS
from udbad.kernel import wire
from udbad.types import ROOT_ID, Perm

modes = pytest.mark.parametrize("udba", list(STRATEGIES))


@modes
def test_a_path_deeper_than_there_are_descriptors(tmp_path: Path, udba: str) -> None:
    deep = "/".join("d" * 200)
    (tmp_path / "base" / deep).mkdir(parents=True)
    (tmp_path / "base" / deep / "f").write_text("deep")
    with core(tmp_path, udba=udba, max_fds=20) as union:
        node = union.sb.root
        with few_descriptors(60):
            for _ in range(200):
                found = union.fs.lookup(node.id, b"d")
                assert found is not None
                assert isinstance(found[0], Dir)
                node = found[0]
                union.took(node)
                union.sb.table.trim()
            union.sb.table.shed()
            found = union.fs.lookup(node.id, b"f")
            assert found is not None
            union.took(found[0])
            assert union.fs.getattr(node.id)[0] is node


@modes
def test_what_cannot_be_opened_again_keeps_its_descriptor(tmp_path: Path, udba: str) -> None:
    """A directory that was removed, or taken away directly, is somebody's current one: natively it goes on working."""
    for name in ("removed", "moved", "replaced", "gone", "kept"):
        (tmp_path / "top" / name).mkdir(parents=True)
    (tmp_path / "base/lower").mkdir(parents=True)
    with core(tmp_path, udba=udba) as union:
        nodes = {name: union.find(name).id for name in ("removed", "moved", "replaced", "gone", "kept", "lower")}
        union.rmdir("removed")
        union.rmdir("lower")
        (union["top"] / "moved").rename(tmp_path / "away")
        (union["top"] / "replaced").rename(union["top"] / "other")
        (union["top"] / "replaced").mkdir()
        (union["top"] / "gone").rmdir()
        before = {name: os.fstat(union.sb.layer_fd(dir_of(union, node), dir_of(union, node).layers[0]))
                  for name, node in nodes.items()}  # fmt: skip
        assert union.sb.table.shed()
        assert dir_of(union, nodes["kept"]).layers[0].fd < 0
        assert not union.sb.table.shed()
        for name, node in nodes.items():
            st = union.fs.getattr(node)[1]
            assert (st.st_ino, st.st_dev) == (before[name].st_ino, before[name].st_dev), name
            handle = union.fs.opendir(node)
            union.fs.releasedir(handle.fh)
        union.forget_all()
        assert union.sb.table.open_fds == len(union.paths)


def dir_of(union: Core, node: int) -> Dir:
    return union.sb.table.directory(node)


@modes
def test_below_a_directory_that_was_renamed(tmp_path: Path, udba: str) -> None:
    """A closed directory is opened again by the names it has now; never another that has got its old one."""
    for branch in ("top", "base"):
        (tmp_path / branch / "a/b/c").mkdir(parents=True)
        (tmp_path / branch / "a/b/c/f").write_text(branch)
    with core(tmp_path, {"top": "rw"}, udba=udba) as union:
        inner = union.find("a/b/c").id
        union.sb.table.shed()
        union.rename("a", "moved")
        union.mkdir("a")
        union.mkdir("a/b")
        union.mkdir("a/b/c")
        union.create("a/b/c/f", b"another")
        union.sb.table.shed()
        found = union.fs.lookup(inner, b"f")
        assert found is not None
        assert union.content("moved/b/c/f") == b"top"
        assert found[0] is union.find("moved/b/c/f")
        if udba == "none":
            return
        (union["top"] / "moved").rename(union["top"] / "again")
        union.sb.table.shed()
        assert union.content("again/b/c/f") == b"top"
        assert union.find("again/b/c").id == inner


def test_open_files_leave_fewer_descriptors_to_directories(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"base/d{i}").mkdir(parents=True)
        (tmp_path / f"base/d{i}/f").write_text(f"{i}")
    with core(tmp_path, udba="none", max_fds=100, all_fds=160) as union:
        table = union.sb.table
        for i in range(200):
            union.open(f"d{i}/f")
            if table.over_budget():
                table.trim()
            assert table.open_fds <= max(min(100, 160 - i), LEAST_FDS)
        assert table.open_fds == LEAST_FDS
        assert union.content("d7/f") == b"7"


def test_descriptors_of_directories_are_few_whatever_opened_them(tmp_path: Path) -> None:
    """Known paths in many directories, none of them listed."""
    for i in range(50):
        (tmp_path / f"base/d{i}").mkdir(parents=True)
        (tmp_path / f"base/d{i}/f").write_text(f"{i}")
    with notify_union([(tmp_path / "base", Perm.RO)], tmp_path / "mnt", max_fds=10) as union:
        kernel = Kernel(union)
        for i in range(50):
            kernel.ask(wire.LOOKUP, ROOT_ID, b"d%d\0" % i)
            (directory,) = wire.QWORD.unpack_from(kernel.answer()[1])
            kernel.ask(wire.LOOKUP, directory, b"f\0")
            assert kernel.answer()[0] == 0
            assert union.fs.table.open_fds <= 10 + 1
        kernel.forget_all()
        kernel.close()


def test_descriptors_of_directories_are_few_when_only_events_come(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"base/d{i}").mkdir(parents=True)
    (tmp_path / "top").mkdir()
    with notify_union(
        [(tmp_path / "top", Perm.RW), (tmp_path / "base", Perm.RO)], tmp_path / "mnt", max_fds=10
    ) as union:
        for i in range(30):
            union.look_up(ROOT_ID, b"d%d" % i)
        for i in range(30):
            (tmp_path / f"top/d{i}").mkdir()  # to be merged into what is known
        union.coherence.drain()
        assert all(len(node.layers) == 2 for node in union.fs.table.nodes.values() if isinstance(node, Dir))
        assert union.fs.table.open_fds <= 10


@pytest.mark.parametrize("opcode", [wire.OPEN, wire.CREATE, wire.LOOKUP])
def test_without_a_descriptor_directories_give_theirs(tmp_path: Path, opcode: int) -> None:
    """EMFILE: what is only kept for speed is closed, and there is a second try."""
    (tmp_path / "top").mkdir()
    (tmp_path / "top/file").write_bytes(b"content")
    for i in range(30):
        (tmp_path / f"top/d{i}").mkdir()
    with notify_union([(tmp_path / "top", Perm.RW)], tmp_path / "mnt") as union:
        kernel = Kernel(union)
        file = look_up(kernel)
        for i in range(29):
            union.look_up(ROOT_ID, b"d%d" % i)
        node, body = {
            wire.OPEN: (file, struct.pack("<II", os.O_RDONLY, 0)),
            wire.CREATE: (ROOT_ID, struct.pack("<IIII", os.O_RDWR | os.O_CREAT, 0o644, 0o022, 0) + b"new\0"),
            wire.LOOKUP: (ROOT_ID, b"d29\0"),
        }[opcode]
        with few_descriptors(0):
            kernel.ask(opcode, node, body)
            assert kernel.answer()[0] == 0
        assert union.fs.table.open_fds <= 2, "all but the root's, and one that was looked up"
        union.fs.table.shed()
        with few_descriptors(0):
            kernel.ask(wire.LOOKUP, ROOT_ID, b"d28\0")  # known, and to be opened again
            assert kernel.answer() == (errno.EMFILE, b"")
        for fh in list(union.fs.handles.files):
            union.fs.release(fh)
        kernel.forget_all()
        union.references.clear()
        kernel.close()
