"""What an object was found not to have of extended attributes is remembered, and not after anybody gave it one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.inprocess import notify_union
from tests.helpers.syscalls import counted
from tests.t2_core.core import core
from udbad.edge.operations import Operations
from udbad.inodes.node import XATTR_BITS
from udbad.types import ROOT_CALLER, ROOT_ID, Perm
from udbad.union import xattrs
from udbad.union.fs import SetAttr, UnionFs

KEY = b"security.capability"
LABEL = b"security.selinux"
ACL = b"system.posix_acl_access"
VALUE = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service+p
SELINUX = xattrs.selinux_enabled()
Settle = Callable[[], object]


@contextmanager
def trusting(place: Path, mode: str) -> Iterator[tuple[UnionFs, int, Settle]]:
    """A union with d/file on its lower branch; the file's node id; and what makes direct changes known."""
    top, base = place / "top", place / "base"
    top.mkdir()
    (base / "d").mkdir(parents=True)
    (base / "d" / "file").write_bytes(b"x")
    if mode == "notify":
        with notify_union([(top, Perm.RW), (base, Perm.RO)], place / "mnt") as union:
            yield union.fs, union.look_up(union.look_up(ROOT_ID, b"d"), b"file"), union.told
        return
    with core(place, udba=mode) as made:
        yield made.fs, made.find("d/file").id, lambda: None


def missing(fs: UnionFs, node: int, key: bytes = KEY) -> bool:
    try:
        fs.getxattr(node, key)
    except OSError as error:
        unlabelled = key == LABEL and not fs.sb.options.labels and not SELINUX
        if error.errno != (errno.EOPNOTSUPP if unlabelled else errno.ENODATA):
            raise
        return True
    return False


@pytest.mark.parametrize("mode", ["none", "notify"])
@pytest.mark.parametrize("key", XATTR_BITS)
def test_a_second_question_costs_no_system_call(tmp_path: Path, mode: str, key: bytes) -> None:
    with trusting(tmp_path, mode) as (fs, node, _):
        assert missing(fs, node, key)
        with counted() as calls:
            assert missing(fs, node, key)
        assert not calls


@pytest.mark.parametrize(
    ("selinux", "labels", "answer"),
    [(False, False, errno.EOPNOTSUPP), (False, True, errno.ENODATA), (True, False, errno.ENODATA)],
)
def test_a_missing_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, selinux: bool, labels: bool, answer: int
) -> None:
    """Where there is no SELinux, there are no labels; but those that there are."""
    monkeypatch.setattr(xattrs, "selinux_enabled", lambda: selinux)
    with trusting(tmp_path, "none") as (fs, node, _):
        fs.sb.options = fs.sb.options._replace(labels=labels)
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(answer)):
                fs.getxattr(node, LABEL)
            assert all(missing(fs, node, key) for key in XATTR_BITS if key != LABEL)
        fs.run(lambda: fs.setxattr(node, LABEL, b"a label", ROOT_CALLER))
        assert fs.getxattr(node, LABEL) == b"a label"
        assert fs.listxattr(node, ROOT_CALLER) == [LABEL]
        fs.removexattr(node, LABEL, ROOT_CALLER)
        with pytest.raises(OSError, match=os.strerror(answer)):
            fs.getxattr(node, LABEL)


def test_whether_there_is_selinux(tmp_path: Path) -> None:
    listed = tmp_path / "filesystems"
    listed.write_text("nodev\tsysfs\nnodev\tselinuxfs\n\text4\n")
    assert xattrs.selinux_enabled(str(listed))
    listed.write_text("nodev\tsysfs\n\text4\n")
    assert not xattrs.selinux_enabled(str(listed))
    assert xattrs.selinux_enabled(str(tmp_path / "none"))  # nobody can tell


@pytest.mark.parametrize("mode", ["none", "notify"])
def test_a_new_file_has_no_capabilities(tmp_path: Path, mode: str) -> None:
    """The kernel asks before the first write."""
    with trusting(tmp_path, mode) as (fs, node, settle):
        parent = fs.table.node(node).parent
        assert parent is not None
        strategy = fs.sb.changes.hooks
        operations = Operations(fs, strategy, lambda call, then: None)  # type: ignore[arg-type]  # all of it
        (made, *_), (fh, *_) = operations.create(parent.id, b"new", os.O_WRONLY | os.O_CREAT, 0o644, ROOT_CALLER)
        with counted() as calls:
            assert missing(fs, made.id)
        assert not calls
        settle()
        assert missing(fs, made.id)
        if mode == "notify":
            os.setxattr(tmp_path / "top/d/new", KEY, VALUE)
            settle()
            assert not missing(fs, made.id)
        operations.release(fh)
        operations.forget(made.id, 1)


@pytest.mark.parametrize("mode", ["none", "notify"])
def test_one_question_answers_all_others(tmp_path: Path, mode: str) -> None:
    """As for who packs an image: a list, and what is looked for without one."""
    with trusting(tmp_path, mode) as (fs, node, _):
        assert fs.listxattr(node, ROOT_CALLER) == []
        with counted() as calls:
            assert fs.listxattr(node, ROOT_CALLER) == []
            assert all(missing(fs, node, key) for key in (KEY, b"security.ima", b"user.any", b"trusted.any", ACL))
        assert not calls


def test_what_no_list_tells_is_asked(tmp_path: Path) -> None:
    """system.nfs4_acl and its kind; and of a prefix that the file system does not know, EOPNOTSUPP stays that."""
    with trusting(tmp_path, "none") as (fs, node, _):
        assert fs.listxattr(node, ROOT_CALLER) == []
        for key in (b"system.nfs4_acl", b"nothing.known"):
            with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
                fs.getxattr(node, key)


def test_where_no_list_tells_all(tmp_path: Path) -> None:
    with trusting(tmp_path, "none") as (fs, node, _):
        branch = fs.table.node(node).branch
        branch.lists_xattrs = False
        assert fs.listxattr(node, ROOT_CALLER) == []
        assert missing(fs, node, b"user.any")
        os.setxattr(tmp_path / "base/d/file", "user.any", b"v")
        assert fs.getxattr(node, b"user.any") == b"v"


def test_a_new_attribute_is_listed(tmp_path: Path) -> None:
    """Set through the mount, or directly."""
    with trusting(tmp_path, "notify") as (fs, node, settle):
        assert fs.listxattr(node, ROOT_CALLER) == []
        fs.run(lambda: fs.setxattr(node, b"user.own", b"v", ROOT_CALLER))
        assert fs.listxattr(node, ROOT_CALLER) == [b"user.own"]
        fs.removexattr(node, b"user.own", ROOT_CALLER)
        settle()
        fs.sb.changes.hooks.attr_ttl(*fs.getattr(node))  # type: ignore[attr-defined]  # as kernel/ does
        assert fs.listxattr(node, ROOT_CALLER) == []
        assert fs.listxattr(node, ROOT_CALLER) == []
        os.setxattr(tmp_path / "top/d/file", "user.direct", b"v")
        settle()
        assert fs.listxattr(node, ROOT_CALLER) == [b"user.direct"]
        assert fs.getxattr(node, b"user.direct") == b"v"


def test_reval_asks_each_time(tmp_path: Path) -> None:
    with trusting(tmp_path, "reval") as (fs, node, _):
        assert missing(fs, node)
        assert fs.listxattr(node, ROOT_CALLER) == []
        os.setxattr(tmp_path / "base/d/file", KEY, VALUE)
        assert not missing(fs, node)
        assert fs.listxattr(node, ROOT_CALLER) == [KEY]


@pytest.mark.parametrize("mode", ["none", "notify", "reval"])
def test_given_through_the_mount(tmp_path: Path, mode: str) -> None:
    with trusting(tmp_path, mode) as (fs, node, _):
        assert missing(fs, node)
        fs.run(lambda: fs.setxattr(node, KEY, VALUE, ROOT_CALLER))
        assert not missing(fs, node)
        fs.removexattr(node, KEY, ROOT_CALLER)
        assert missing(fs, node)


@pytest.mark.parametrize("between", ["nothing", "attributes", "own change", "own content"])
def test_given_directly(tmp_path: Path, between: str) -> None:
    """Also when something else has its new times recorded before the event is read."""
    with trusting(tmp_path, "notify") as (fs, node, settle):
        fs.run(lambda: fs.setattr(node, SetAttr(mode=0o600), None, ROOT_CALLER))
        settle()
        fs.sb.changes.hooks.attr_ttl(*fs.getattr(node))  # type: ignore[attr-defined]  # as kernel/ does
        assert missing(fs, node)
        assert missing(fs, node)
        os.setxattr(tmp_path / "top/d/file", KEY, VALUE)
        if between == "attributes":
            fs.sb.changes.hooks.attr_ttl(*fs.getattr(node))  # type: ignore[attr-defined]
        elif between == "own change":
            fs.setattr(node, SetAttr(mode=0o644), None, ROOT_CALLER)
        elif between == "own content":
            fs.setattr(node, SetAttr(mtime_ns=10**18), None, ROOT_CALLER)
        settle()
        assert not missing(fs, node)


def test_given_directly_by_a_name_that_nobody_watches(tmp_path: Path) -> None:
    with trusting(tmp_path, "notify") as (fs, node, settle):
        os.link(tmp_path / "base/d/file", tmp_path / "elsewhere")
        settle()
        fs.sb.changes.hooks.attr_ttl(*fs.getattr(node))  # type: ignore[attr-defined]  # as kernel/ does
        assert missing(fs, node)
        os.setxattr(tmp_path / "elsewhere", KEY, VALUE)
        assert not missing(fs, node)


@pytest.mark.parametrize("mode", ["none", "notify"])
def test_when_nothing_is_believed_any_more(tmp_path: Path, mode: str) -> None:
    """The path is invalidated, as after a change under `none`; or all is, as after lost events."""
    with trusting(tmp_path, mode) as (fs, node, _):
        strategy = fs.sb.changes.hooks
        for forget in (
            lambda: strategy.invalidate([b"d", b"file"]),  # type: ignore[attr-defined]
            lambda: strategy.invalidate([b"d"]),  # type: ignore[attr-defined]
            strategy.drop_everything,  # type: ignore[attr-defined]
        ):
            assert missing(fs, node)
            os.setxattr(tmp_path / "base/d/file", KEY, VALUE)
            forget()
            found = fs.lookup(ROOT_ID, b"d")
            assert found is not None
            assert fs.lookup(found[0].id, b"file") is not None
            assert not missing(fs, node)
            os.removexattr(tmp_path / "base/d/file", KEY)
            forget()
            fs.lookup(found[0].id, b"file")


def test_after_a_copy_up_it_is_the_copy_that_is_asked(tmp_path: Path) -> None:
    with trusting(tmp_path, "none") as (fs, node, _):
        assert missing(fs, node)
        os.setxattr(tmp_path / "base/d/file", KEY, VALUE)  # which `none` may not notice, but the copy has it
        fs.run(lambda: fs.setattr(node, SetAttr(mode=0o600), None, ROOT_CALLER))
        assert not missing(fs, node)
