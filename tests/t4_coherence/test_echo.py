"""Events are hints, state decides.

Own changes come back as events and cost nothing: no notification is written because of them. And a
foreign change that the daemon came across before its event was read is not lost: then there is nothing
left to compare, but the kernel still has to be told.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.inprocess import Union, notify_union
from tests.helpers.mount import Mount, UnionFactory
from tests.helpers.posix import KEEP_SIZE, PUNCH_HOLE, fallocate, link_fd
from tests.helpers.profile import scaled
from tests.t2_core.fake_notifier import Message
from udbad.coherence.watcher import Watch, Watcher
from udbad.types import ROOT_CALLER, ROOT_ID, Perm
from udbad.union.fs import SetAttr

pytestmark = pytest.mark.fuse

DIRECTORIES = 20
CREATED = scaled(1_000, 5_000)
"""Files created, and as many renamed; what is missing to TOTAL are writes."""
TOTAL = scaled(20_000, 100_000)


def sent(mount: Mount) -> dict[str, int]:
    """Notifications written to the kernel so far, by kind, with nothing left waiting."""
    mount.flush()
    counts: dict[str, int] = mount.control({"op": "stats"})["invalidator"]["sent"]
    return counts


def events(mount: Mount) -> tuple[int, int]:
    """How many have been handled, and how many names had not changed when theirs were (one for each burst)."""
    statistics = mount.control({"op": "stats"})["coherence"]
    assert (statistics["state"], statistics["overflows"]) == ("healthy", 0)
    return statistics["events"], statistics["echoes"]


def test_many_thousand_own_changes_invalidate_nothing(union: UnionFactory) -> None:
    mount = union({"top": "rw", "base": "ro"}, "notify")
    for number in range(DIRECTORIES):
        (mount.path / f"d{number}").mkdir()
    before, (events_before, echoes_before) = sent(mount), events(mount)
    writes = (TOTAL - 2 * CREATED) // CREATED
    done = 0
    for number in range(CREATED):
        here = mount.path / f"d{number % DIRECTORIES}"
        name = here / f"f{number}"
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for turn in range(writes):
                os.pwrite(fd, b"%d" % turn, turn)
        finally:
            os.close(fd)
        # Within a directory and across two, onto a new name and onto one that is there.
        target = mount.path / f"d{(number + number % 2) % DIRECTORIES}" / f"g{number // 3}"
        os.rename(name, target)
        done += writes + 2
    rest = TOTAL - done
    with (mount.path / "d0" / "last").open("wb", buffering=0) as stream:
        for _ in range(rest):
            stream.write(b"x")
    assert sent(mount) == before
    handled, echoes = events(mount)
    assert handled - events_before >= 3 * CREATED, "created, moved from, moved to: the events did come"
    assert echoes > echoes_before


def change_in_every_other_way(root: Path) -> None:
    """Everything that is neither create, write nor rename of a file, on objects that are in the top branch."""
    for number in range(50):
        directory = root / f"e{number}"
        directory.mkdir()
        file = directory / "file"
        file.write_bytes(b"content")
        file.chmod(0o600)
        os.chown(file, 1, 1)
        os.truncate(file, 3)
        os.utime(file, ns=(1, 2))
        os.setxattr(file, "user.t", b"1")
        os.removexattr(file, "user.t")
        change_ranges(directory)
        (directory / "sym").symlink_to("file")
        os.mkfifo(directory / "fifo")
        os.link(file, directory / "second")
        file.unlink()
        (directory / "second").rename(directory / "file")
        directory.chmod(0o700)
        directory.rename(root / f"r{number}")
        moved = root / f"r{number}"
        for name in ("sym", "fifo", "file"):
            (moved / name).unlink()
        moved.rmdir()


def change_ranges(directory: Path) -> None:
    """And publish a file that had no name."""
    fd = os.open(directory / "file", os.O_RDWR)
    nameless = os.open(directory, os.O_TMPFILE | os.O_RDWR)
    try:
        fallocate(fd, 0, 0, 10_000)
        fallocate(fd, KEEP_SIZE | PUNCH_HOLE, 0, 4096)
        os.copy_file_range(fd, nameless, 5000, 0, 0)
        link_fd(nameless, str(directory / "published"))
        os.copy_file_range(nameless, fd, 10, 0, 20_000)
        assert os.fstat(fd).st_size == 20_010
    finally:
        os.close(fd)
        os.close(nameless)
    (directory / "published").unlink()


def test_every_other_own_change_invalidates_nothing(union: UnionFactory) -> None:
    mount = union({"top": "rw", "base": "ro"}, "notify")
    before = sent(mount)
    change_in_every_other_way(mount.path)
    assert sent(mount) == before


def test_names_of_a_lower_branch(union: UnionFactory, tmp_path: Path) -> None:
    """Copy-ups and whiteouts change two branches and come back as events of both."""
    lower = tmp_path / "base" / "d"
    lower.mkdir(parents=True)
    for number in range(100):
        (lower / f"f{number}").write_bytes(b"%d" % number)
    mount = union({"top": "rw", "base": "ro"}, "notify")
    inside = mount.path / "d"
    assert len(os.listdir(inside)) == 100
    (inside / "first").touch()  # makes the directory on the top branch, which is a change of its own
    before = sent(mount)
    for number in range(100):
        name = inside / f"f{number}"
        if number % 3 == 0:
            with name.open("r+b") as stream:
                stream.write(b"up")
        elif number % 3 == 1:
            name.unlink()
        else:
            name.rename(inside / f"renamed{number}")
    assert {kind: count for kind, count in sent(mount).items() if kind in ("entry", "data", "epoch")} == {
        kind: count for kind, count in before.items() if kind in ("entry", "data", "epoch")
    }


# -- found before the event came --------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Union]:
    """A union in this process whose base branch has a file `a`, its hard link `b`, a file `c`."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "a").write_bytes(b"linked")
    os.link(base / "a", base / "b")
    (base / "c").write_bytes(b"c")
    (tmp_path / "top").mkdir()
    with notify_union([(tmp_path / "top", Perm.RW), (base, Perm.RO)], tmp_path / "mnt") as union:
        yield union


def root_entry(name: bytes) -> Message:
    return Message("entry", ROOT_ID, name)


def test_a_lost_link_that_getattr_found(here: Union, tmp_path: Path) -> None:
    node = here.look_up(ROOT_ID, b"b")
    assert here.look_up(ROOT_ID, b"a") == node
    (tmp_path / "base" / "a").unlink()
    assert here.fs.getattr(node)[1].st_nlink == 1
    assert root_entry(b"a") in here.told()


def test_a_removed_name_that_a_listing_found(here: Union, tmp_path: Path) -> None:
    assert here.look_up(ROOT_ID, b"c")
    assert b"c" in here.list(ROOT_ID)
    (tmp_path / "base" / "c").unlink()
    assert b"c" not in here.list(ROOT_ID)
    assert root_entry(b"c") in here.told()


def test_a_removed_name_that_a_rename_found(here: Union, tmp_path: Path) -> None:
    assert here.look_up(ROOT_ID, b"c")
    (tmp_path / "base" / "c").unlink()
    with pytest.raises(FileNotFoundError):
        here.fs.run(lambda: here.fs.rename(ROOT_ID, b"c", ROOT_ID, b"e", 0))
    assert root_entry(b"c") in here.told()


def test_a_replaced_name_that_a_listing_found(here: Union, tmp_path: Path) -> None:
    node = here.look_up(ROOT_ID, b"c")
    (tmp_path / "base" / "c").rename(tmp_path / "base" / "moved")
    (tmp_path / "base" / "c").mkdir()
    here.list(ROOT_ID)
    assert root_entry(b"c") in here.told()
    assert here.look_up(ROOT_ID, b"c") != node


def test_a_replaced_file_that_a_rename_moved(here: Union, tmp_path: Path) -> None:
    """The kernel moves what it has under the old name; that is not what was moved."""
    node = here.look_up(ROOT_ID, b"c")
    (tmp_path / "base" / "new").write_bytes(b"other")
    (tmp_path / "base" / "new").rename(tmp_path / "base" / "c")
    here.fs.run(lambda: here.fs.rename(ROOT_ID, b"c", ROOT_ID, b"e", 0))
    assert root_entry(b"e") in here.told()
    assert here.look_up(ROOT_ID, b"e") != node


def test_a_directory_taken_away_before_it_was_changed(here: Union, tmp_path: Path) -> None:
    """Somebody has looked its name up; ESTALE makes the kernel look again (estale_retry())."""
    (tmp_path / "base" / "d").mkdir()
    node = here.look_up(ROOT_ID, b"d")
    (tmp_path / "base" / "d").rename(tmp_path / "elsewhere")
    assert root_entry(b"d") in here.told()
    with pytest.raises(OSError, match="Stale"):
        here.fs.run(lambda: here.fs.setattr(node, SetAttr(mode=0o700), None, ROOT_CALLER))


def test_an_inode_number_that_came_round_as_another_type(here: Union, tmp_path: Path) -> None:
    """ext4 gives the number of a removed file to the next object. The kernel makes an inode bad whose type changes."""
    node = here.look_up(ROOT_ID, b"c")
    (tmp_path / "base" / "c").unlink()
    (tmp_path / "base" / "c").mkdir()
    with pytest.raises(OSError, match="Stale"):
        here.fs.getattr(node)
    with pytest.raises(OSError, match="Stale"):
        here.fs.run(lambda: here.fs.setattr(node, SetAttr(mode=0o600), None, ROOT_CALLER))
    assert root_entry(b"c") in here.told()
    assert here.look_up(ROOT_ID, b"c") != node


def test_a_new_name_that_a_listing_found_and_did_not_tell(here: Union, tmp_path: Path) -> None:
    """The reply was full: the daemon knows the name, the kernel still believes that there is none."""
    assert here.look_up(ROOT_ID, b"new") == 0
    (tmp_path / "base" / "new").touch()
    handle = here.fs.opendir(ROOT_ID)
    assert b"new" in [name for name, *_ in here.fs.readdir(handle.fh, 0)]
    here.fs.releasedir(handle.fh)
    assert Message("expire", ROOT_ID, b"new") in here.told()
    assert here.look_up(ROOT_ID, b"new")
    (tmp_path / "base" / "new").touch()
    assert Message("expire", ROOT_ID, b"new") not in here.told(), "once is enough"
    here.list(ROOT_ID)  # now it has been told of everything


# -- a direct change that sends the same events as ours ----------------------------------------------


def own_links(here: Union, name: bytes) -> None:
    here.fs.link(here.look_up(ROOT_ID, b"own"), ROOT_ID, name)


MAKING: dict[str, tuple[Callable[[Union, bytes], object], Callable[[Path], object]]] = {
    "symlink": (
        lambda here, name: here.fs.symlink(ROOT_ID, name, b"to", ROOT_CALLER),
        lambda path: path.symlink_to("it"),
    ),
    "mknod": (lambda here, name: here.fs.mknod(ROOT_ID, name, stat.S_IFIFO | 0o600, 0, ROOT_CALLER), os.mkfifo),
    "link": (own_links, lambda path: path.write_bytes(b"other")),
}
"""How a name is made through the mount, and directly. That of a link sends the event of any file."""


@pytest.mark.parametrize("how", MAKING)
def test_what_takes_the_place_of_a_new_name_is_no_echo(here: Union, tmp_path: Path, how: str) -> None:
    """Of two events that look alike, one is that of our own change: the name that came for it does not stay unseen."""
    through, directly = MAKING[how]
    fd = os.open(tmp_path / "top" / "own", os.O_CREAT | os.O_CLOEXEC)
    os.close(fd)
    here.told()
    through(here, b"new")
    node = here.look_up(ROOT_ID, b"new")
    echoes = here.coherence.statistics().echoes
    held = os.open(tmp_path / "top" / "new", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)  # nobody else gets its number
    (tmp_path / "top" / "new").unlink()
    directly(tmp_path / "top" / "new")
    os.close(held)
    assert root_entry(b"new") in here.told()
    assert here.coherence.statistics().echoes > echoes, "ours was one"
    assert here.look_up(ROOT_ID, b"new") != node
    through(here, b"alone")
    assert here.look_up(ROOT_ID, b"alone")
    assert root_entry(b"alone") not in here.told()


# -- changed between a look at a directory and its watch ----------------------------------------------


@pytest.mark.parametrize("marked", [True, False], ids=["mark goes", "mark comes"])
def test_an_opaque_mark_that_changes_before_the_watch(
    tmp_path: Path, marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper, lower = tmp_path / "top" / "d", tmp_path / "base" / "d"
    for directory in (upper, lower):
        directory.mkdir(parents=True)
    (lower / "low").touch()
    mark = upper / ".wh..wh..opq"
    if marked:
        mark.touch()
    watch = Watcher.watch_directory
    due = [mark.unlink if marked else mark.touch]

    def late(self: Watcher, fd: int, handle: object, by: str) -> Watch:
        if os.path.samestat(os.stat(fd), upper.stat()) and due:
            due.pop()()
        return watch(self, fd, handle, by)

    with notify_union([(tmp_path / "top", Perm.RW), (tmp_path / "base", Perm.RO)], tmp_path / "mnt") as union:
        monkeypatch.setattr(Watcher, "watch_directory", late)
        node = union.look_up(ROOT_ID, b"d")
        assert not due
        union.told()
        seen = union.fs.lookup(node, b"low")
        assert (seen is not None) == marked
        assert union.fs.table.directory(node).trusted, "with the watch, it can be believed again"
        if marked:
            assert union.look_up(node, b"low")
