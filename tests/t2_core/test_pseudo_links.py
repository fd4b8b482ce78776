"""Which names lead to the home of a pseudo-link: never another file's, over reused numbers and other branches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.t2_core.core import Core, core
from tests.t3_fuse.live import file_system
from udbad.branch import syscalls
from udbad.branch.accept import open_branches
from udbad.branch.spec import parse_branches
from udbad.coherence.base import Coherence
from udbad.errors import UserError
from udbad.kernel import wire
from udbad.tools import mvdown, syncdown
from udbad.tools.carry import Halt
from udbad.union import reconfigure

pytestmark = pytest.mark.fuse  # it mounts file systems

PLNK = ".wh..wh.plnk"
UPPER = {"top": "rw", "low": "ro"}
SEVERAL = pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c")], ids=len)
BOTH = pytest.mark.parametrize("udba", ["none", "reval"])


@pytest.fixture
def low(tmp_path: Path) -> Iterator[Path]:
    """A small ext4, which gives the number of a removed file to the next one."""
    with file_system(tmp_path / "low", "ext4", megabytes=4):
        yield tmp_path / "low"


def linked(directory: Path, *names: str, content: str = "old") -> int:
    """One file with these names; returns its inode number."""
    directory.mkdir(exist_ok=True)
    (directory / names[0]).write_text(content)
    for name in names[1:]:
        os.link(directory / names[0], directory / name)
    return (directory / names[0]).stat().st_ino


def reuse(directory: Path, number: int, *names: str) -> None:
    """A new file that has this inode number."""
    for name in (directory / f"try{index}" for index in range(1000)):
        name.write_text("other")
        if name.stat().st_ino == number:
            break
    else:
        raise AssertionError("the number was not given again")
    for other in names:
        os.link(name, directory / other)
    name.rename(directory / "other")


def change(union: Core, name: str, content: bytes) -> None:
    handle = union.open(name, os.O_WRONLY)
    union.write(handle, content)
    union.fs.release(handle.fh)


def copied_up(union: Core, names: tuple[str, ...]) -> str:
    """Change the file in such a way that it gets a home, also with one name: by link(2). Returns a name on top."""
    if len(names) == 1:
        union.link(names[0], "new")
    change(union, names[0], b"NEW")
    assert {union.content(name) for name in names} == {b"NEW"}
    assert len(homes(union)) == 1
    (upper,) = (name for name in ("new", *names) if (union["top"] / name).exists())
    return upper


def homes(union: Core, branch: str = "top") -> list[str]:
    return sorted(os.listdir(union[branch] / PLNK))


def links(union: Core, name: str) -> int:
    """st_nlink, as the kernel is told; fails when it does not fit there."""
    node = union.find(name)
    st = union.sb.stat(node)
    wire.attributes(node, st, 0.0)
    return st.st_nlink + node.nlink_extra


def number(union: Core, name: str) -> int:
    return union.find(name).id


# -- the lower file goes, and its number is used again ----------------------------------------------------


@BOTH
@SEVERAL
def test_reused_number_while_mounted(tmp_path: Path, low: Path, names: tuple[str, ...], udba: str) -> None:
    old = linked(low, *names)
    with core(tmp_path, UPPER, udba) as union:
        upper = copied_up(union, names)
        for name in names:
            (low / name).unlink()
        reuse(low, old, "second")
        assert union.content("other") == b"other"
        assert links(union, "other") == 2
        assert number(union, "other") != number(union, upper), "two files, two numbers"
        change(union, "other", b"other, changed")
        assert union.content("second") == b"other, changed"
        assert union.content(upper) == b"NEW", "the old copy is another file"


@BOTH
@SEVERAL
def test_reused_number_after_a_remount(tmp_path: Path, low: Path, names: tuple[str, ...], udba: str) -> None:
    old = linked(low, *names)
    with core(tmp_path, UPPER, udba) as union:
        upper = copied_up(union, names)
        inode = number(union, upper)
    for name in names:
        (low / name).unlink()
    reuse(low, old)
    os.chmod(low / "other", 0o640)
    for first in (upper, "other"):
        with core(tmp_path, UPPER, udba) as union:
            union.find(first)
            union.forget_all()
            assert union.content("other") == b"other"
            assert union.sb.stat(union.find("other")).st_mode & 0o777 == 0o640
            change(union, "other", b"other")
            assert union.content(upper) == b"NEW"
            assert number(union, "other") != number(union, upper)
    with core(tmp_path, UPPER, udba) as union:
        assert number(union, upper) == inode


@BOTH
def test_a_name_that_was_pending_is_replaced(tmp_path: Path, low: Path, udba: str) -> None:
    """By a file with the number of the one that was copied, under the very name that led to the copy."""
    old = linked(low, "a", "b")
    with core(tmp_path, UPPER, udba) as union:
        copied_up(union, ("a", "b"))
        (low / "a").unlink()
        (low / "b").unlink()
        reuse(low, old)
        (low / "other").rename(low / "b")
        assert union.content("b") == b"other"
        assert union.content("a") == b"NEW"


def test_reused_within_one_tick_of_the_clock(tmp_path: Path, low: Path) -> None:
    """Birth times come from a clock that stands still for milliseconds."""
    for turn in range(10):
        with core(tmp_path, UPPER) as union:
            old = linked(low, "a", "b", content=f"old{turn}")
            change(union, "a", b"NEW!")
            (low / "a").unlink()
            (low / "b").unlink()
            reuse(low, old)
            assert union.content("other") == b"other"
            (low / "other").unlink()
            union.unlink("a")


# -- over mounts: what the home's name says ---------------------------------------------------------------


def test_another_order_of_file_systems(tmp_path: Path, low: Path) -> None:
    """The number in the mount changes with the order; who the lower file is does not."""
    with file_system(tmp_path / "low2", "ext4", megabytes=4) as other:
        assert linked(low, "a", "b") == linked(other, "x", "y", content="other")
        with core(tmp_path, {**UPPER, "low2": "ro"}) as union:
            copied_up(union, ("a", "b"))
        for order in (("low2", "low"), ("low", "low2"), ("low2",)):
            with core(tmp_path, {"top": "rw", **dict.fromkeys(order, "ro")}) as union:
                assert union.content("x") == union.content("y") == b"other"
                change(union, "y", b"other")
                assert union.content("a") == b"NEW"
                assert number(union, "x") not in (number(union, "a"), 0)
                if "low" in order:
                    assert union.content("b") == b"NEW"
                    assert number(union, "b") == number(union, "a")


def test_without_birth_times(tmp_path: Path, low: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the number has to be the same, and the file must not have been written to; else what is there shows."""
    monkeypatch.setattr(syscalls, "birth_ns", lambda *_: 0)
    linked(low, "a", "b")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b"))
    (low / "pushed").mkdir()
    with core(tmp_path, UPPER) as union:
        assert union.content("b") == b"NEW"
        assert number(union, "b") == number(union, "a")
    with core(tmp_path, {"top": "rw", "pushed": "ro", "low": "ro"}) as union:
        assert union.content("b") == b"NEW", "a directory of another branch's file system changes no order"
    (low / "b").write_text("direct")
    with core(tmp_path, UPPER) as union:
        assert union.content("b") == b"direct"
        assert union.content("a") == b"NEW"


def test_second_birth_times_are_not_enough(tmp_path: Path, low: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image made by mkfs -d gives all its files one birth time, in seconds."""
    monkeypatch.setattr(syscalls, "birth_ns", lambda *_: 1_700_000_000 * 10**9)
    old = linked(low, "a", "b")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b"))
    (low / "a").unlink()
    (low / "b").unlink()
    reuse(low, old)
    with core(tmp_path, UPPER) as union:
        assert union.content("other") == b"other"


def earlier(top: Path) -> str:
    """Give the one home the name that earlier versions gave it."""
    (home,) = (top / PLNK).iterdir()
    ino = int(home.name.split(".")[1])
    name = f"{(1 << 48) + ino}.{ino}"  # the lower branch is on the second file system
    home.rename(home.with_name(name))
    return name


def test_homes_of_earlier_versions(tmp_path: Path, low: Path) -> None:
    old = linked(low, "a", "b", "c")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b", "c"))
    earlier(tmp_path / "top")
    with core(tmp_path, UPPER) as union:
        assert union.content("b") == b"NEW"
        assert number(union, "b") == number(union, "a")
        (low / "a").unlink()
        (low / "b").unlink()
        (low / "c").unlink()
        reuse(low, old, "second")
        assert union.content("other") == b"other"
        assert union.content("a") == b"NEW"
    with core(tmp_path, UPPER) as union:
        assert union.content("other") == b"other"


def test_a_home_of_an_earlier_version_out_of_a_backup(tmp_path: Path, low: Path) -> None:
    """It is younger than all files then; unless it looks like the lower file, it is not taken for its copy."""
    linked(low, "a", "b")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b"))
    home = tmp_path / "top" / PLNK / earlier(tmp_path / "top")
    past = 1_600_000_000_123_456_789
    os.utime(home, ns=(past, past))
    with core(tmp_path, UPPER) as union:
        assert union.content("b") == b"old"
        assert union.content("a") == b"NEW"
    os.truncate(home, 3)
    os.utime(home, ns=(past, past))
    os.utime(low / "b", ns=(past, past))
    with core(tmp_path, UPPER) as union:
        assert union.content("b") == b"NEW"


@pytest.mark.parametrize(
    "name", ["300.{ino}", "{huge}.{ino}", "{ino}.{huge}", "{huge}.{huge}.1", "x", ".wh..wh.p.0a1b"]
)
def test_names_that_others_left(tmp_path: Path, low: Path, name: str) -> None:
    """aufs has numbers of its own there; what does not fit 64 bits is nobody's."""
    ino = linked(low, "a", "b")
    top = tmp_path / "top"
    (top / PLNK).mkdir(parents=True)
    (top / "up").write_text("of aufs")
    os.link(top / "up", top / PLNK / name.format(ino=ino, huge="1234567890123456789012345"))
    with core(tmp_path, UPPER) as union:
        assert union.content("up") == b"of aufs"
        assert links(union, "up") in (1, 2)
        assert union.content("a") == b"old"
        change(union, "a", b"NEW")
        assert union.content("b") == b"NEW"
        assert union.content("up") == b"of aufs"
    assert (top / "up").stat().st_nlink == 2, "nothing of it was removed"


def test_a_home_that_is_gone(tmp_path: Path, low: Path) -> None:
    """auplink(8) takes homes away: what names remain are names of ordinary files."""
    linked(low, "a", "b")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b"))
        (home,) = (union["top"] / PLNK).iterdir()
        home.unlink()
        assert union.content("b") == b"old"
        assert union.content("a") == b"NEW"
        assert (links(union, "a"), links(union, "b")) == (1, 2)
        union.unlink("a")
        assert union.content("b") == b"old"


def test_another_file_in_the_place_of_a_home(tmp_path: Path, low: Path) -> None:
    linked(low, "a", "b")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b"))
        (home,) = (union["top"] / PLNK).iterdir()
        (union["top"] / "else").write_text("else")
        (union["top"] / "else").rename(home)
        assert union.content("b") == b"old"
        assert union.content("a") == b"NEW"
        union.unlink("a")
        assert home.read_text() == "else"


def test_two_branches_with_a_home_of_one_file(tmp_path: Path, low: Path) -> None:
    """The upper one counts."""
    linked(low, "a", "b", "c")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b", "c"))
    with core(tmp_path, {"top2": "rw", "low": "ro"}) as union:
        change(union, "b", b"TOP2")
    with core(tmp_path, {"top2": "rw", "top": "ro+wh", "low": "ro"}) as union:
        assert [union.content(name) for name in "abc"] == [b"NEW", b"TOP2", b"TOP2"]
    with core(tmp_path, {"top": "rw", "top2": "ro+wh", "low": "ro"}) as union:
        assert [union.content(name) for name in "abc"] == [b"NEW", b"TOP2", b"NEW"]


# -- how many names there are -----------------------------------------------------------------------------


@BOTH
def test_names_made_and_removed_directly(tmp_path: Path, low: Path, udba: str) -> None:
    """The count follows as far as names are seen, is never negative, and a home lives while a name leads to it."""
    linked(low, "a", "b", "c")
    with core(tmp_path, UPPER, udba) as union:
        copied_up(union, ("a", "b", "c"))
        os.link(low / "b", low / "d")
        assert union.content("d") == b"NEW"
        assert links(union, "a") == 4
        (low / "a").unlink()
        for name in ("a", "b", "c"):
            union.unlink(name)
            assert union.content("d") == b"NEW"
            assert links(union, "d") >= 1
        union.unlink("d")
        assert homes(union) == []


@BOTH
def test_removed_directly_before_the_copy_up(tmp_path: Path, low: Path, udba: str) -> None:
    linked(low, "a", "b", "c", "d")
    with core(tmp_path, UPPER, udba) as union:
        for name in ("a", "b", "c", "d"):
            union.find(name)
        union.unlink("a")
        union.unlink("b")
        (low / "c").unlink()
        change(union, "d", b"NEW")
        assert links(union, "d") >= 0
        assert union.content("d") == b"NEW"


def test_a_name_that_is_removed_without_being_known(tmp_path: Path, low: Path) -> None:
    linked(low, "a", "b")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b"))
        union.forget_all()
        union.unlink("b")
        assert links(union, "a") == 1
        union.forget_all()
        union.unlink("a")
        assert homes(union) == []


# -- branches that are no longer writable -----------------------------------------------------------------

ROTATED = {"top2": "rw", "top": "ro+wh", "low": "ro"}


def everything(directory: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for place, directories, files in os.walk(directory):
        for name in (".", *directories, *files):
            st = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = (st.st_ino, st.st_nlink, st.st_ctime_ns)
    return found


@BOTH
def test_rotated_layers(tmp_path: Path, low: Path, udba: str) -> None:
    """The data stays, what is changed now goes to the new layer, and nothing into the old one."""
    linked(low, "a", "b", "c", "d")
    with core(tmp_path, UPPER, udba) as union:
        copied_up(union, ("a", "b", "c", "d"))
        change(union, "c", b"NEW")  # by two names in the old layer
        union.link("a", "e")
    before = everything(tmp_path / "top")
    with core(tmp_path, ROTATED, udba) as union:
        inode = number(union, "a")
        assert [union.content(name) for name in "abcde"] == [b"NEW"] * 5
        assert [number(union, name) for name in "bcde"] == [inode] * 4
        change(union, "b", b"AGAIN")
        assert [union.content(name) for name in "abcde"] == [b"AGAIN"] * 5
        union.link("d", "f")
        change(union, "c", b"THIRD")
        assert len(homes(union, "top2")) == 1
    for order in (ROTATED, {"top3": "rw", "top2": "ro+wh", "top": "ro+wh", "low": "ro"}):
        with core(tmp_path, order, udba) as union:
            assert [union.content(name) for name in "abcdef"] == [b"THIRD"] * 6
            assert {number(union, name) for name in "abcdef"} == {inode}
            assert links(union, "a") > 1
            union.rename("d", "g")
            union.unlink("e")
            assert [union.content(name) for name in "abcfg"] == [b"THIRD"] * 5
            union.rename("g", "d")
            union.link("d", "e")
    assert everything(tmp_path / "top") == before


def test_only_the_home_is_left_in_the_rotated_layer(tmp_path: Path, low: Path) -> None:
    linked(low, "a", "b", "c")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b", "c"))
        union.unlink("a")
    with core(tmp_path, ROTATED) as union:
        assert union.content("b") == b"NEW"
        change(union, "b", b"AGAIN")
        assert union.content("c") == b"AGAIN"
    with core(tmp_path, ROTATED) as union:
        handle = union.open("c", os.O_RDWR)
        assert union.read(handle) == b"AGAIN"


def test_written_through_a_descriptor_whose_name_is_gone(tmp_path: Path, low: Path) -> None:
    """From a home on a read-only layer: the other names find the new one."""
    linked(low, "a", "b", "c")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b", "c"))
    with core(tmp_path, ROTATED) as union:
        handle = union.open("b", os.O_RDWR)
        union.unlink("b")
        union.forget_all()
        union.write(handle, b"AGAIN")
        union.fs.release(handle.fh)
        assert union.content("a") == union.content("c") == b"AGAIN"


def test_layers_whose_marks_do_not_count(tmp_path: Path, low: Path) -> None:
    """Homes count where whiteouts do."""
    linked(low, "a", "b")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b"))
    with core(tmp_path, {**ROTATED, "top": "ro"}) as union:
        assert [union.content(name) for name in "ab"] == [b"NEW", b"old"]


def test_without_pseudo_links_from_a_rotated_layer(tmp_path: Path, low: Path) -> None:
    linked(low, "a", "b", "c")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b", "c"))
    with core(tmp_path, ROTATED, plink=False) as union:
        assert [union.content(name) for name in "abc"] == [b"NEW"] * 3
        change(union, "b", b"ALONE")
        assert [union.content(name) for name in "abc"].count(b"ALONE") == 1


# -- branches that change while mounted -------------------------------------------------------------------


def rebranch(union: Core, directory: Path, layers: dict[str, str], old: ExitStack) -> None:
    """What mount/rebranch.py does to the tree."""
    text = ":".join(f"{directory / name}={perm}" for name, perm in layers.items())
    before = union.sb.branches
    fresh = open_branches(parse_branches(text), False, os.fsencode(directory / "mnt"))
    new = reconfigure.carry_over(before, fresh)
    strategy = union.sb.changes.hooks
    assert isinstance(strategy, Coherence)
    strategy.hand_over()
    reconfigure.apply(union.sb, new)
    strategy.start()
    for branch in reconfigure.removed(before, new):
        old.callback(branch.close)


def test_branches_come_and_go(tmp_path: Path, low: Path) -> None:
    linked(low, "a", "b")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b"))
    (tmp_path / "new").mkdir()
    seen = []
    with ExitStack() as opened, core(tmp_path, {"new": "rw", "low": "ro"}) as union:
        seen.append([union.content(name) for name in "ab"])
        for top in ("rw", "ro+wh", "ro", "ro+wh", ""):
            rebranch(union, tmp_path, {"new": "rw", **({"top": top} if top else {}), "low": "ro"}, opened)
            seen.append([union.content(name) for name in "ab"])
        assert union.sb.plinks == {}
        assert union.sb.plink_fds.keys() <= {union.sb.branches[0].id}
    new, half = [b"NEW", b"NEW"], [b"NEW", b"old"]
    assert seen == [[b"old", b"old"], new, new, half, new, [b"old", b"old"]]


# -- branches that are merged down ------------------------------------------------------------------------


def move_down(union: Core, source: str, target: str) -> dict[bytes, str]:
    """`udbad sync move`; returns what had to stay, and why."""
    src, dst = syncdown.check(union.sb, os.fsencode(union[source]), os.fsencode(union[target]), True)
    job = syncdown.Sync(union.sb, src, dst, True, Halt())
    for work in job.steps():
        if work is not None:
            work()
    return job.progress.left


@BOTH
def test_the_source_of_a_home_stays_when_its_branch_is_merged_down(tmp_path: Path, low: Path, udba: str) -> None:
    """Its names lead to the home as long as they are its names."""
    (tmp_path / "base").mkdir()
    linked(low, "a", "b", "c")
    linked(low, "single")
    with core(tmp_path, {"top": "rw", "low": "ro", "base": "ro"}, udba) as union:
        copied_up(union, ("a", "b", "c"))
    with core(tmp_path, {"top": "rw", "low": "rw", "base": "rw"}, udba) as union:
        left = move_down(union, "low", "base")
        assert [union.content(name) for name in ("a", "b", "c", "single")] == [b"NEW", b"NEW", b"NEW", b"old"]
        assert set(left) == {b"a", b"b", b"c"}
        with pytest.raises(UserError, match="pseudo-link"):
            for _ in mvdown.steps(union.sb, [b"b"], mvdown.Options(), Halt()):
                pass
    assert (tmp_path / "base" / "single").exists()


def test_a_home_without_names_is_told_when_its_branch_is_merged_down(tmp_path: Path, low: Path) -> None:
    linked(low, "a", "b")
    with core(tmp_path, UPPER) as union:
        copied_up(union, ("a", "b"))
        union.unlink("a")
        (home,) = homes(union)
    with core(tmp_path, {"top": "rw", "low": "rw"}) as union:
        assert list(move_down(union, "top", "low")) == [os.fsencode(f"{PLNK}/{home}")]
        assert union.content("b") == b"NEW"
