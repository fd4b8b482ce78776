"""A branch that does not answer is left out: nothing is asked of it, nothing is guessed of what it has, and when it
answers again all is as it was.

Its root directory has no descriptor here while it is away, so whoever asks it all the same gets EBADF.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.t2_core.core import STRATEGIES, Core, core
from tests.t2_core.test_recall import bury, succeed
from udbad.branch.branches import BranchSet
from udbad.branch.policy import parse_create
from udbad.inodes.handles import OpenFile
from udbad.inodes.record import Record
from udbad.union import homes, recall
from udbad.union.fs import SetAttr, UnionFs
from udbad.union.superblock import Superblock


@dataclass
class Pool:
    """A union by direct calls (core.py), the branch `gone` of which can be away."""

    core: Core
    record: Record
    branches: BranchSet
    gone: int = 1

    def leave(self) -> None:
        """Another process goes on without the branch."""
        away = [one.but(offline=True, root_fd=-1) if one.index == self.gone else one for one in self.branches.branches]
        self._go_on(BranchSet(tuple(away)))

    def come_back(self) -> None:
        self._go_on(self.branches)

    def _go_on(self, branches: BranchSet) -> None:
        if self.record.changed:
            self.record.flush()
        core, old = self.core, self.core.fs
        sb = Superblock(branches, old.sb.options, max_fds=1000)
        homes.load(sb)
        fs = UnionFs(sb, old.creds)
        recall.recall(fs, self.record, (os.dup,))
        self.record = succeed(core, fs, self.record, self.bury)

    def bury(self, fs: UnionFs) -> None:
        for handle in fs.handles.lost.values():
            os.close(handle.fd)
        bury(fs)

    def handle(self, handle: OpenFile) -> OpenFile:
        return self.core.fs.handles.file(handle.fh)


@pytest.fixture(params=list(STRATEGIES))
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pool]:
    for path in ("a/all", "b/all", "c/all", "b/only", "a/apart/s", "c/apart"):
        (tmp_path / path).mkdir(parents=True)
    for path in ("a/all/in_a", "b/all/in_b", "c/all/in_c", "b/only/f", "c/apart/f", "b/shadow", "c/shadow", "c/root_c"):
        (tmp_path / path).write_text(path)
    layers = {"a": "rw", "b": "rw", "c": "rw"}
    with core(tmp_path, layers, request.param, create=parse_create("rr")) as made:
        record = Record.create()
        recall.keep(made.fs, record)
        made_pool = Pool(made, record, made.sb.branches)
        try:
            yield made_pool
        finally:
            made.fs.sb.changes.hooks.stop()  # type: ignore[attr-defined]  # as above
            made_pool.bury(made.fs)
            made_pool.record.close()


def number_of(call: Callable[..., object], *arguments: Any) -> int | None:
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return None


def test_what_the_others_have_is_served(pool: Pool) -> None:
    union = pool.core
    known = {path: union.find(path).id for path in ("all", "all/in_a", "all/in_c", "apart", "apart/f", "root_c")}
    pool.leave()
    for path, number in known.items():
        assert union.find(path).id == number, path
    assert union.content("all/in_c") == b"c/all/in_c"
    assert union.content("shadow") == b"c/shadow", "that of a branch below, as nobody knows of the one above"
    file = union.open("all/in_c", os.O_RDWR)
    union.write(file, b"C")
    assert (union["c"] / "all/in_c").read_bytes() == b"C/all/in_c"
    assert union.fs.statfs()


def test_what_only_it_may_have_is_an_error(pool: Pool) -> None:
    union = pool.core
    seen = union.find("only/f"), union.find("all/in_b"), union.find("only")
    pool.leave()
    for path in ("only", "all/in_b", "new", "all/new"):
        assert number_of(union.find, path) == errno.EIO, path
    for node in seen:
        assert number_of(union.fs.getattr, node.id) == errno.EIO
    assert number_of(lambda: union.fs.lookup(seen[2].id, b"f")) == errno.EIO
    assert number_of(lambda: union.fs.open(seen[0].id, os.O_RDONLY, union.caller)) == errno.EIO
    assert number_of(lambda: union.fs.setattr(seen[0].id, SetAttr(mode=0o600), None, union.caller)) == errno.EIO
    assert number_of(lambda: union.fs.recover(seen[2].id)) == errno.EIO


def test_no_listing_is_shortened(pool: Pool) -> None:
    union = pool.core
    union.find("all"), union.find("apart")
    pool.leave()
    for path in ("", "all"):
        assert number_of(union.names, path) == errno.EIO, path
        handle = union.fs.opendir(union.find(path).id)
        assert number_of(lambda fh: list(union.fs.readdir_names(fh, 0)), handle.fh) == errno.EIO
    assert union.names("apart") == ["s", "f"], "it is known not to be there"
    assert union.names("apart/s") == []


def test_a_listing_that_was_begun_ends_with_an_error(pool: Pool) -> None:
    union = pool.core
    handle = union.fs.opendir(union.find("all").id)
    first = list(itertools.islice(union.fs.readdir(handle.fh, 0), 3))
    pool.leave()
    assert number_of(lambda: list(union.fs.readdir(handle.fh, first[-1][3]))) == errno.EIO


def test_a_directory_that_was_not_seen_may_be_there(pool: Pool) -> None:
    union = pool.core
    pool.leave()
    assert number_of(lambda: union.names("apart")) == errno.EIO
    pool.leave()
    assert number_of(lambda: union.names("apart")) == errno.EIO, "the next process knows no more"
    pool.come_back()
    assert union.names("apart") == ["s", "f"]


def test_changes_go_elsewhere_or_are_refused(pool: Pool) -> None:
    union = pool.core
    union.find("all"), union.find("apart")
    pool.leave()
    for number in range(4):
        union.create(f"apart/new{number}")
        union.mkdir(f"apart/dir{number}")
    assert union.names("apart/dir1") == []
    union.rename("apart/new1", "apart/dir1/new")
    union.unlink("apart/new2")
    union.rmdir("apart/dir2")
    assert not (union["b"] / "apart").exists()
    root, directory, apart = (union.find(path).id for path in ("", "all", "apart"))
    for parent, name in ((root, b"root_c"), (directory, b"in_a")):
        assert number_of(union.fs.unlink, parent, name) == errno.EIO
        assert number_of(union.fs.rename, parent, name, parent, b"other", 0) == errno.EIO
        assert number_of(union.fs.rename, parent, name, apart, name, 0) == errno.EIO
        assert number_of(union.fs.mkdir, parent, b"new", 0o755, union.caller) == errno.EIO
    assert number_of(lambda: union.fs.rmdir(root, b"all")) == errno.EIO
    assert number_of(lambda: union.rename("apart/new0", "all/new")) == errno.EIO
    assert number_of(lambda: union.fs.directory_fds(union.fs.opendir(directory).fh)) == errno.EIO


def test_everything_is_as_it_was_when_it_answers(pool: Pool) -> None:
    union = pool.core
    paths = ("all", "all/in_a", "all/in_b", "only", "only/f", "shadow")
    known = {path: union.find(path).id for path in paths}
    file = union.open("only/f", os.O_RDWR)
    deleted = union.create("all/gone", b"kept")  # round robin: on c
    other = union.create("all/gone2", b"kept2")  # and on b
    for name in ("gone", "gone2"):
        union.unlink(f"all/{name}")
    assert other.node.branch.index == pool.gone
    pool.leave()
    for handle in (file, other):
        assert number_of(pool.handle, handle) == errno.EIO
    assert union.read(pool.handle(deleted)) == b"kept"
    assert union.find("shadow").id != known["shadow"]
    pool.leave()
    pool.come_back()
    assert {path: union.find(path).id for path in paths} == known
    union.write(pool.handle(file), b"B")
    assert union.content("only/f") == b"B/only/f"
    assert [union.read(pool.handle(one)) for one in (deleted, other)] == [b"kept", b"kept2"]
    assert sorted(union.names("all")) == ["in_a", "in_b", "in_c"]
    assert sorted(union.names()) == ["all", "apart", "only", "root_c", "shadow"]
    with pytest.raises(FileNotFoundError):
        union.find("new")


def test_closing_its_files_asks_nothing(pool: Pool) -> None:
    union = pool.core
    file = union.open("only/f", os.O_RDWR)
    pool.leave()
    left = union.fs.handles.lost[file.fh].fd
    union.fs.release(file.fh)
    os.fstat(left)  # it is there still: close(2) may wait for the branch
    os.close(left)
    assert number_of(lambda: pool.handle(file)) == errno.EBADF
    pool.come_back()
    assert number_of(lambda: pool.handle(file)) == errno.EBADF
    assert union.content("only/f") == b"b/only/f"


def test_a_copy_up_goes_to_no_branch_that_is_away(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/f").write_text("base")
    with core(tmp_path) as union:
        pool = Pool(union, Record.create(), union.sb.branches, gone=0)
        recall.keep(union.fs, pool.record)
        node = union.find("f")
        pool.leave()
        assert union.content("f") == b"base"
        assert number_of(lambda: union.fs.open(node.id, os.O_RDWR, union.caller)) == errno.EIO
        change = partial(union.fs.setattr, node.id, SetAttr(mode=0o600), None, union.caller)
        assert number_of(union.run, change) == errno.EIO
        pool.come_back()
        union.write(union.open("f", os.O_RDWR), b"B")
        assert (union["top"] / "f").read_bytes() == b"Base"
        union.sb.changes.hooks.stop()  # type: ignore[attr-defined]  # as above
        assert union.sb.root.offline is None
        pool.bury(union.fs)
        pool.record.close()
