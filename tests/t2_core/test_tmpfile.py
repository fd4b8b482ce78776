"""O_TMPFILE in UnionFs, without a kernel: files of no name, and the link(2) that gives them one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.merge import snapshot
from tests.t2_core.core import STRATEGIES, Core, core
from tests.t3_fuse.live import debris, errno_of, names
from udbad.branch.branches import BranchSet
from udbad.branch.credentials import Credentials
from udbad.inodes.node import Node
from udbad.kernel import wire
from udbad.types import ROOT_ID, Caller, Perm
from udbad.union import reconfigure
from udbad.union.fs import SetAttr


@pytest.fixture(params=list(STRATEGIES))
def union(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Core]:
    (tmp_path / "base/d").mkdir(parents=True)
    (tmp_path / "base/d/f").write_bytes(b"lower")
    with core(tmp_path, udba=request.param) as made:
        yield made


def links(union: Core, node: Node) -> int:
    return wire.links(node, union.fs.getattr(node.id)[1])


def test_it_is_where_creation_would_put_it_and_has_no_name(union: Core) -> None:
    handle = union.tmpfile("d", b"content", 0o640)
    node = handle.node
    assert (node.branch.index, links(union, node)) == (0, 0)
    assert union.names("d") == ["f"]
    assert (names(union["top"]), os.listdir(union["top"] / "d")) == (["d"], []), "as for creat(2), parents are made"
    assert union.read(handle) == b"content"
    st = union.fs.setattr(node.id, SetAttr(size=4), handle.fh, union.caller)[1]
    assert (st.st_size, stat.S_IMODE(st.st_mode)) == (4, 0o640)
    union.fs.setxattr(node.id, b"user.a", b"v", union.caller)
    assert union.fs.getxattr(node.id, b"user.a") == b"v"


def test_nothing_is_left_of_one_that_got_no_name(union: Core) -> None:
    before = set(union.sb.table.nodes)
    handle = union.tmpfile("", b"content")
    node = handle.node
    union.fs.release(handle.fh)
    union.forget_all()
    assert node.id not in union.sb.table.nodes
    assert set(union.sb.table.nodes) == before
    assert errno_of(lambda: union.fs.getattr(node.id)) == "ESTALE"
    assert debris(union["top"]) == []
    assert names(union["top"]) == []


def test_link_publishes_it(union: Core) -> None:
    handle = union.tmpfile("d", b"content")
    node = handle.node
    assert union.publish(handle, "d/new") is node
    assert (links(union, node), sorted(union.names("d"))) == (1, ["f", "new"])
    assert union.find("d/new") is node
    assert (union["top"] / "d/new").read_bytes() == b"content"
    assert union.publish(handle, "second") is node, "a file as any other"
    assert links(union, node) == 2
    union.fs.release(handle.fh)
    union.unlink("d/new")
    union.rename("second", "third")
    assert union.content("third") == b"content"
    union.unlink("third")
    assert names(union["top"]) == ["d"]


def test_further_descriptors_of_it(union: Core) -> None:
    """open(2) of /proc/self/fd/N."""
    first = union.tmpfile("", b"content")
    second, _ = union.run(lambda: union.fs.open(first.node.id, os.O_RDONLY, union.caller))
    union.fs.release(first.fh)
    assert union.read(second) == b"content"
    union.publish(second, "new")
    assert (union["top"] / "new").read_bytes() == b"content"


def test_a_name_that_is_taken(union: Core) -> None:
    handle = union.tmpfile("d")
    assert errno_of(lambda: union.publish(handle, "d/f")) == "EEXIST"
    assert errno_of(lambda: union.publish(handle, ".wh.x")) == "EPERM"
    union.unlink("d/f")
    union.publish(handle, "d/f")
    assert union.content("d/f") == b""
    assert names(union["top"] / "d") == ["f"], "and no whiteout of it"


def test_a_name_in_another_directory(union: Core) -> None:
    """Which is made on the file's branch."""
    (union["base"] / "e").mkdir(mode=0o700)
    handle = union.tmpfile("d", b"content")
    union.publish(handle, "e/new")
    assert (union["top"] / "e/new").read_bytes() == b"content"
    assert stat.S_IMODE((union["top"] / "e").stat().st_mode) == 0o700


def test_a_name_that_would_be_hidden(tmp_path: Path) -> None:
    """It is on a branch below the one whose whiteout hides the name there."""
    for name in ("top/d", "low/d"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "low/d/f").touch()
    (tmp_path / "top/d/.wh.f").touch()
    with core(tmp_path, {"top": "rw", "low": "rw"}) as union:
        handle = union.tmpfile("d")
        handle.node.branch = union.sb.branches[1]  # as a policy that goes by free space might have it
        before = snapshot(tmp_path)
        assert errno_of(lambda: union.publish(handle, "d/f")) == "EXDEV"
        assert snapshot(tmp_path) == before


def test_where_it_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "base/d").mkdir(parents=True)
    with core(tmp_path, {"base": "ro"}) as union:
        assert errno_of(lambda: union.tmpfile("d")) == "EROFS"
    with core(tmp_path, {"top": "rw", "base": "ro"}, read_only=True) as union:
        assert errno_of(lambda: union.tmpfile("d")) == "EROFS"


def test_not_in_a_directory_that_is_gone(union: Core) -> None:
    node = union.mkdir("gone")
    union.rmdir("gone")
    assert errno_of(lambda: union.fs.tmpfile(node.id, os.O_RDWR, 0o600, union.caller)) == "ENOENT"


def test_owner_and_mode_are_those_of_a_new_file(tmp_path: Path) -> None:
    """The group of a setgid directory, the umask, nobody's supplementary groups."""
    for name in ("top/d", "base"):
        (tmp_path / name).mkdir(parents=True)
    os.chown(tmp_path / "top/d", 0, 2000)
    os.chmod(tmp_path / "top/d", 0o2777)
    umask = os.umask(0)
    try:
        with core(tmp_path) as union:
            union.fs.creds, union.caller = Credentials(), Caller(1001, 1002, 0, 0o027)
            handle = union.tmpfile("d", b"", 0o666)
            union.caller = Caller(0, 0, 0, 0)
            union.publish(handle, "d/new")
            st = (tmp_path / "top/d/new").stat()
            assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (1001, 2000, 0o640)
    finally:
        os.umask(umask)


def test_an_inode_that_comes_round_again_gets_another_number(union: Core) -> None:
    """The kernel still holds the file that had it before."""
    for _ in range(20):  # somebody else may be faster to take it
        old = union.create("old")
        ino = old.node.ino
        union.fs.release(old.fh)
        union.unlink("old")
        made = (union.tmpfile() for _ in range(100))  # ext4 takes the lowest free one of a group
        handle = next((handle for handle in made if handle.node.ino == ino), None)
        if handle is not None:
            break
    assert handle is not None
    assert handle.node is not old.node
    assert handle.node.id != old.node.id
    union.publish(handle, "new")
    assert union.find("new") is handle.node


def test_its_branch_is_in_use(union: Core) -> None:
    handle = union.tmpfile()
    branch = union.sb.branches[0]
    assert [use.what for use in reconfigure.users(union.sb, branch)] == ["open file"]
    union.fs.release(handle.fh)
    assert reconfigure.users(union.sb, branch) == []


def test_its_branch_becomes_read_only(tmp_path: Path) -> None:
    """It can be read, but neither written to nor published where nothing above is writable."""
    with core(tmp_path) as union:
        handle = union.tmpfile("", b"content")
        old = union.sb.branches
        reconfigure.apply(union.sb, BranchSet((old[0].but(perm=Perm.RO), *old.branches[1:]), old.generation + 1))
        assert union.read(handle) == b"content"
        assert errno_of(lambda: union.write(handle, b"x")) == "EROFS"
        assert errno_of(lambda: union.publish(handle, "new")) == "EXDEV"
        assert ROOT_ID in union.sb.table.nodes
