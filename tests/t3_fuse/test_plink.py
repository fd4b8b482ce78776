"""Hard links: inside one branch, and across branches as pseudo-links (semantics 10.2 and 10.3).

One file has one st_ino in all its names, before and after its copy-up, and st_nlink counts the names a user can
find.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory
from tests.t3_fuse.live import debris, errno_of, modes, names

pytestmark = pytest.mark.fuse

NAMES = ("one", "two", "sub/three")


def lower(tmp_path: Path) -> None:
    """A file of the read-only branch that has three names, in two directories."""
    base = tmp_path / "base"
    (base / "sub").mkdir(parents=True)
    (base / "one").write_text("content")
    os.link(base / "one", base / "two")
    os.link(base / "one", base / "sub/three")


def check(mount: Mount, present: set[str], inode: int | None, content: str = "content", guessed: bool = False) -> int:
    """Every name that is there shows the same file, with as many links as there are names.

    guessed: the link count may be larger, never smaller: names that were removed while their file was on the
    lower branch only, or by an earlier mount, are whiteouts, and nobody searches the branch for them.
    """
    if guessed:
        for name in present:  # the guess is made when a name that is still below is seen
            os.stat(mount.path / name)
    seen = {name: os.stat(mount.path / name) for name in present}
    assert {info.st_ino for info in seen.values()} == {inode or next(iter(seen.values())).st_ino}
    links = {info.st_nlink for info in seen.values()}
    assert len(links) == 1
    assert links == {len(present)} or (guessed and min(links) > len(present))
    for name in present:
        assert (mount.path / name).read_text() == content, name
    for name in set(NAMES) - present:
        assert not (mount.path / name).exists()
    return next(iter(seen.values())).st_ino


@modes
def test_names_of_a_lower_file(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    mount = union(None, udba)
    check(mount, set(NAMES), None)
    assert names(mount["top"]) == []


@modes
@pytest.mark.parametrize("written", NAMES)
def test_copy_up_shows_in_every_name(union: UnionFactory, tmp_path: Path, udba: str, written: str) -> None:
    lower(tmp_path)
    mount = union(None, udba)
    inode = check(mount, set(NAMES), None)
    with (mount.path / written).open("r+b", buffering=0) as stream:
        stream.write(b"CHANGED")
    check(mount, set(NAMES), inode, "CHANGED")
    links = list((mount["top"] / ".wh..wh.plnk").iterdir())
    (link,) = links
    assert link.name.split(".")[:2] == [f"{inode}", f"{(tmp_path / 'base/one').stat().st_ino}"]
    # The kernel says which inode is written to, not by which name: one of them, and only one, is made above.
    made = [name for name in NAMES if (mount["top"] / name).exists()]
    assert [links[0].samefile(mount["top"] / name) for name in made] == [True]
    assert (tmp_path / "base/one").read_text() == "content"
    assert debris(mount["top"]) == []


@modes
def test_other_names_are_linked_not_copied(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    mount = union(None, udba)
    inode = check(mount, set(NAMES), None)
    for number, name in enumerate(NAMES):
        (mount.path / name).write_text(f"text{number}")
        check(mount, set(NAMES), inode, f"text{number}")
    copies = {(mount["top"] / name).stat().st_ino for name in NAMES if (mount["top"] / name).exists()}
    assert len(copies) == 1
    assert debris(mount["top"]) == []


@modes
def test_descriptor_of_another_name_sees_the_change(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    mount = union(None, udba)
    with (
        (mount.path / "two").open("rb", buffering=0) as reader,
        (mount.path / "one").open("r+b", buffering=0) as writer,
    ):
        assert reader.read(1) == b"c"
        writer.write(b"CHANGED")
        assert reader.read() == b"HANGED"
        os.chmod(mount.path / "sub/three", 0o600)
        assert os.fstat(reader.fileno()).st_mode & 0o777 == 0o600


@modes
@pytest.mark.parametrize("copied", [None, "one", "sub/three"])
def test_unlink_in_any_order(union: UnionFactory, tmp_path: Path, udba: str, copied: str | None) -> None:
    for number, order in enumerate(itertools.permutations(NAMES)):
        place = tmp_path / f"{number}"
        place.mkdir()
        lower(place)
        layers = {f"{number}/top": "rw", f"{number}/base": "ro"}
        mount = union(layers, udba, mount_point=f"mnt{number}")
        present = set(NAMES)
        inode = check(mount, present, None)
        content = "content"
        if copied is not None:
            content = "changed"
            (mount.path / copied).write_text(content)
            check(mount, present, inode, content)
        with (mount.path / order[2]).open("rb", buffering=0) as reader:
            for name in order:
                (mount.path / name).unlink()
                present.discard(name)
                if present:
                    check(mount, present, inode, content, guessed=copied is None)
            if copied is not None:  # else its names are whiteouts, and the lower file still has three links
                assert os.fstat(reader.fileno()).st_nlink == 0
            assert reader.read() == content.encode()
        assert list((mount["top"] / ".wh..wh.plnk").iterdir()) == [], "the last name took the pseudo-link with it"
        assert names(mount["top"]) == [".wh.one", ".wh.two", "sub"]
        assert names(mount["top"] / "sub") == [".wh.three"]
        mount.unmount()


@modes
def test_remount_in_between(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """The identity of the names and the data survive; a pseudo-link of an earlier mount is taken up."""
    lower(tmp_path)
    mount = union(None, udba)
    check(mount, set(NAMES), None)
    (mount.path / "two").write_text("changed")
    mount.remount()
    inode = check(mount, set(NAMES), None, "changed")
    (mount.path / "one").write_text("again")
    check(mount, set(NAMES), inode, "again")
    (mount.path / "two").unlink()
    check(mount, {"one", "sub/three"}, inode, "again", guessed=True)
    mount.remount()
    check(mount, {"one", "sub/three"}, None, "again", guessed=True)
    assert (tmp_path / "base/one").read_text() == "content"


@modes
@pytest.mark.parametrize("options", ["", "noplink"])
def test_links_inside_one_writable_branch(union: UnionFactory, tmp_path: Path, udba: str, options: str) -> None:
    mount = union(None, udba, options)
    (mount.path / "sub").mkdir()
    (mount.path / "one").write_text("content")
    inode = os.stat(mount.path / "one").st_ino
    for name in NAMES[1:]:
        os.link(mount.path / "one", mount.path / name)
    check(mount, set(NAMES), inode)
    assert (mount["top"] / "one").stat().st_nlink == 3
    (mount.path / "one").unlink()
    check(mount, set(NAMES[1:]), inode)
    mount.remount()
    check(mount, set(NAMES[1:]), None)


@modes
def test_link_of_a_lower_file(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Only the new name is made above; the old ones go on, as names of the same file."""
    lower(tmp_path)
    mount = union(None, udba)
    inode = check(mount, set(NAMES), None)
    os.link(mount.path / "two", mount.path / "new")
    check(mount, {*NAMES, "new"}, inode)
    assert names(mount["top"]) == ["new"]
    os.link(mount.path / "new", mount.path / "newer")
    os.link(mount.path / "one", mount.path / "newest")
    check(mount, {*NAMES, "new", "newer", "newest"}, inode)
    (mount.path / "newer").write_text("changed")
    check(mount, {*NAMES, "new", "newer", "newest"}, inode, "changed")
    for name in ("new", "newer", "newest"):
        (mount.path / name).unlink()
    check(mount, set(NAMES), inode, "changed")
    mount.remount()
    check(mount, set(NAMES), None, "changed")


@modes
def test_link_where_a_name_was_removed(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    mount = union(None, udba)
    inode = check(mount, set(NAMES), None)
    (mount.path / "two").unlink()
    check(mount, {"one", "sub/three"}, inode, guessed=True)
    os.link(mount.path / "one", mount.path / "two")
    check(mount, set(NAMES), inode, guessed=True)
    assert names(mount["top"]) == ["two"]
    assert errno_of(lambda: os.link(mount.path / "one", mount.path / "two")) == "EEXIST"


@modes
def test_rename_of_one_name(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    mount = union(None, udba)
    inode = check(mount, set(NAMES), None)
    (mount.path / "one").rename(mount.path / "sub/four")
    check(mount, {"two", "sub/three", "sub/four"}, inode)
    (mount.path / "sub/four").write_text("changed")
    check(mount, {"two", "sub/three", "sub/four"}, inode, "changed")
    # Two names of one file: rename(2) does nothing.
    (mount.path / "two").rename(mount.path / "sub/three")
    check(mount, {"two", "sub/three", "sub/four"}, inode, "changed")


@modes
def test_noplink_ends_the_identity(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Without pseudo-links the copied name is a file of its own, and its st_ino says so (semantics 10.2).

    Which name is copied the kernel does not say when it knew several; the others keep what they had.
    """
    lower(tmp_path)
    mount = union(None, udba, "noplink")
    check(mount, set(NAMES), None)
    (mount.path / "one").write_text("changed")
    mount.flush()
    name, *others = sorted(NAMES, key=lambda name: not (mount["top"] / name).exists())
    assert (mount.path / name).read_text() == "changed"
    assert (mount.path / others[0]).read_text() == "content"
    one, two, three = (os.stat(mount.path / each) for each in (name, *others))
    assert one.st_ino != two.st_ino == three.st_ino
    assert one.st_nlink == 1
    assert not (mount["top"] / ".wh..wh.plnk").exists()
    (mount.path / others[0]).unlink()
    assert (mount.path / name).read_text() == "changed"
    assert (mount.path / others[1]).read_text() == "content"
    mount.remount()
    assert [(mount.path / each).read_text() for each in (name, others[1])] == ["changed", "content"]


@modes
def test_symlinks_and_fifos_have_names_too(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    os.symlink("target", base / "link")
    os.mkfifo(base / "fifo")
    for name in ("link", "fifo"):
        os.link(base / name, base / f"{name}2", follow_symlinks=False)
    mount = union(None, udba)
    for name in ("link", "fifo"):
        inode = os.lstat(mount.path / name).st_ino
        os.chown(mount.path / name, 7, 8, follow_symlinks=False)
        for each in (name, f"{name}2"):
            info = os.lstat(mount.path / each)
            assert (info.st_ino, info.st_nlink, info.st_uid) == (inode, 2, 7)
    assert os.readlink(mount.path / "link2") == "target"


def edit(mount: Mount, *edits: tuple[str, str]) -> None:
    answer = mount.control({"op": "branches", "edits": list(edits)})
    assert "error" not in answer, answer


@modes
def test_branches_come_and_go_with_their_pseudo_links(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """What the kernel remembers of a name must not outlive a change of its branches."""
    lower(tmp_path)
    mount = union({"old": "rw", "base": "ro"}, udba)
    inode = os.stat(mount.path / "one").st_ino
    (mount.path / "one").write_text("changed")
    mount.unmount()
    before = {name: os.lstat(tmp_path / "old" / name).st_ctime_ns for name in os.listdir(tmp_path / "old")}
    mount = union({"top": "rw", "base": "ro"}, udba, mount_point="second")
    check(mount, set(NAMES), None)
    old = str(tmp_path / "old")
    edit(mount, ("add", f"1:{old}=ro+wh"))
    check(mount, set(NAMES), inode, "changed", guessed=True)
    (mount.path / "two").write_text("again")
    check(mount, set(NAMES), inode, "again", guessed=True)
    assert {name: os.lstat(tmp_path / "old" / name).st_ctime_ns for name in before} == before
    edit(mount, ("del", old))
    found = {name: (mount.path / name).read_text() for name in NAMES}
    assert sorted(found.values()) == ["again", "content", "content"], "without the branch between nothing tells"


@pytest.mark.parametrize("udba", ["reval", "notify"])
def test_a_name_that_is_replaced_directly(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """It led to the copy, and stands for another file now."""
    lower(tmp_path)
    mount = union(None, udba)
    (mount.path / "one").write_text("changed")
    check(mount, set(NAMES), None, "changed")
    (tmp_path / "base" / "new").write_text("another")
    (tmp_path / "base" / "new").rename(tmp_path / "base" / "two")
    mount.flush()
    assert (mount.path / "two").read_text() == "another"
    assert (mount.path / "two").stat().st_ino != (mount.path / "one").stat().st_ino
    (mount.path / "two").write_text("another, written")
    assert (mount.path / "sub/three").read_text() == (mount.path / "one").read_text() == "changed"
