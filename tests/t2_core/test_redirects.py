"""Directories that are renamed and have parts on lower branches (union/redirects.py): what is visible, what is on the
branches, and that nothing a redirect says leads out of them."""

from __future__ import annotations

import errno
import gc
import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.t2_core.core import STRATEGIES, Core, core
from tests.t2_core.killed import Faults, Killed, descriptors, swept
from tests.t3_fuse.live import errno_of
from udbad.branch import redirect as notation
from udbad.branch import syscalls
from udbad.branch.branches import BranchSpec
from udbad.errors import UserError
from udbad.inodes.node import Dir
from udbad.layers import pack
from udbad.tools import branchdiff, explain, fsck, mvdown, syncdown
from udbad.tools.carry import Halt
from udbad.types import Perm

KEY = "trusted.overlay.redirect"
EXCHANGE = 2


def tree(at: Core, path: str = "") -> dict[str, Any]:
    """All names below a directory; of a file its content."""
    found: dict[str, Any] = {}
    for name in at.names(path):
        below = f"{path}/{name}" if path else name
        found[name] = tree(at, below) if at.find(below).is_dir() else at.content(below).decode()
    return found


def fill(directory: Path, content: dict[str, Any]) -> None:
    for name, value in content.items():
        if isinstance(value, dict):
            (directory / name).mkdir(exist_ok=True)
            fill(directory / name, value)
        else:
            (directory / name).write_text(value)


def redirect(path: Path) -> str | None:
    try:
        return os.getxattr(path, KEY).decode()
    except OSError:
        return None


@pytest.fixture(params=sorted(STRATEGIES))
def udba(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def union(tmp_path: Path, udba: str) -> Iterator[Core]:
    with core(tmp_path, udba=udba, dirren="on") as made:
        fill(made["base"], {"old": {"a": "a", "sub": {"b": "b"}}, "other": {"c": "c"}, "f": "f"})
        yield made


OLD = {"a": "a", "sub": {"b": "b"}}


def again(union: Core, tmp_path: Path, udba: str) -> dict[str, Any]:
    """What the next mount shows."""
    with core(tmp_path, udba=udba, dirren="off") as made:
        return tree(made)


def test_a_lower_directory(union: Core, tmp_path: Path, udba: str) -> None:
    number = union.find("old").id
    union.rename("old", "new")
    expected = {"new": OLD, "other": {"c": "c"}, "f": "f"}
    assert tree(union) == expected
    assert union.find("new").id == number
    assert redirect(union["top"] / "new") == "/old"
    assert (union["top"] / ".wh.old").exists()
    assert os.listdir(union["top"] / "new") == []
    assert again(union, tmp_path, udba) == expected


def test_a_merged_directory(union: Core, tmp_path: Path, udba: str) -> None:
    union.create("old/mine", b"mine")
    union.unlink("old/a")
    union.rename("old", "new")
    expected = {"new": {"mine": "mine", "sub": {"b": "b"}}, "other": {"c": "c"}, "f": "f"}
    assert tree(union) == expected
    assert again(union, tmp_path, udba) == expected


@pytest.mark.parametrize("path", ["a", "a/old", "a/old/sub"])
def test_past_what_is_no_directory_in_between(tmp_path: Path, udba: str, path: str) -> None:
    """A file between the parts of a directory, which is merged without it."""
    layers = {"top": "rw", "middle": "ro+wh", "base": "ro"}
    with core(tmp_path, layers, udba, dirren="on") as at:
        fill(at["base"], {"a": {"old": OLD}})
        fill(at["top"], {"a": {"old": {"sub": {}}}})
        between = at["middle"] / path
        between.parent.mkdir(parents=True, exist_ok=True)
        between.write_text("no directory")
        at.rename("a/old", "new")
        expected = {"a": {}, "new": OLD}
        assert tree(at) == expected
    with core(tmp_path, layers, udba, dirren="off") as at:
        assert tree(at) == expected


def test_a_renamed_one_is_renamed_and_moved(union: Core, tmp_path: Path, udba: str) -> None:
    union.rename("old", "new")
    union.rename("new", "newer")
    assert not (union["top"] / ".wh.new").exists()
    union.rename("newer", "other/newest")
    assert redirect(union["top"] / "other/newest") == "/old"
    union.rename("other", "another")
    expected = {"another": {"newest": OLD, "c": "c"}, "f": "f"}
    assert tree(union) == expected
    union.rename("another/newest/sub", "sub")
    assert redirect(union["top"] / "sub") == "/old/sub"
    union.rename("sub", "another/newest/sub")
    assert tree(union) == expected
    assert again(union, tmp_path, udba) == expected


def test_what_is_changed_below(union: Core, tmp_path: Path, udba: str) -> None:
    union.rename("old", "new")
    handle = union.open("new/sub/b", os.O_RDWR)
    union.write(handle, b"changed")
    assert (union["top"] / "new/sub/b").read_text() == "changed"
    assert (union["base"] / "old/sub/b").read_text() == "b"
    assert redirect(union["top"] / "new/sub") is None
    union.create("new/sub/more", b"more")
    union.unlink("new/a")
    expected = {"new": {"sub": {"b": "changed", "more": "more"}}, "other": {"c": "c"}, "f": "f"}
    assert tree(union) == expected
    assert again(union, tmp_path, udba) == expected


def test_the_old_name_is_free(union: Core, tmp_path: Path, udba: str) -> None:
    union.rename("old", "new")
    assert not union.exists("old")
    union.mkdir("old")
    assert tree(union)["old"] == {}
    union.create("old/x", b"x")
    expected = {"old": {"x": "x"}, "new": OLD, "other": {"c": "c"}, "f": "f"}
    assert tree(union) == expected
    assert again(union, tmp_path, udba) == expected
    union.unlink("old/x")
    union.rmdir("old")
    assert not union.exists("old")
    union.rename("new", "old")
    expected = {"old": OLD, "other": {"c": "c"}, "f": "f"}
    assert tree(union) == expected
    assert again(union, tmp_path, udba) == expected


def test_over_an_empty_merged_directory(union: Core, tmp_path: Path, udba: str) -> None:
    assert errno_of(lambda: union.rename("old", "other")) == "ENOTEMPTY"
    union.unlink("other/c")
    union.rename("old", "other")
    expected = {"other": OLD, "f": "f"}
    assert tree(union) == expected
    assert again(union, tmp_path, udba) == expected


def test_exchange(union: Core, tmp_path: Path, udba: str) -> None:
    union.rename("old", "other", EXCHANGE)
    expected: dict[str, Any] = {"old": {"c": "c"}, "other": OLD, "f": "f"}
    assert tree(union) == expected
    assert again(union, tmp_path, udba) == expected
    union.rename("old", "other", EXCHANGE)
    assert tree(union) == {"other": {"c": "c"}, "old": OLD, "f": "f"}
    union.rename("old", "f", EXCHANGE)
    expected = {"other": {"c": "c"}, "f": OLD, "old": "f"}
    assert tree(union) == expected
    assert again(union, tmp_path, udba) == expected


def test_rmdir(union: Core, tmp_path: Path, udba: str) -> None:
    union.rename("old", "new")
    assert errno_of(lambda: union.rmdir("new")) == "ENOTEMPTY"
    for name in ("new/a", "new/sub/b"):
        union.unlink(name)
    union.rmdir("new/sub")
    union.rmdir("new")
    expected = {"other": {"c": "c"}, "f": "f"}
    assert tree(union) == expected
    assert again(union, tmp_path, udba) == expected


def test_hard_links_below(union: Core, tmp_path: Path, udba: str) -> None:
    os.link(union["base"] / "old/a", union["base"] / "old/sub/a2")
    number = union.find("old/a").id
    union.rename("old", "new")
    assert union.find("new/a").id == union.find("new/sub/a2").id == number
    union.write(union.open("new/a", os.O_RDWR), b"A")
    assert union.content("new/sub/a2") == b"A"
    union.link("new/sub/b", "b2")
    assert union.content("b2") == b"b"


def test_where_it_is_not_allowed(tmp_path: Path, udba: str) -> None:
    layers = {"top": "rw", "mid": "rw", "base": "ro"}
    for dirren, fails in (("off", True), ("auto", True), ("on", False)):
        with core(tmp_path / dirren, layers, udba=udba, dirren=dirren) as at:
            fill(at["base"], {"old": OLD})
            fill(at["top"], {"old": {}})
            if fails:
                assert errno_of(lambda: at.rename("old", "new")) == "EXDEV"
                assert tree(at) == {"old": OLD}
            else:
                at.rename("old", "new")
                assert tree(at) == {"new": OLD}
    with core(tmp_path / "allowed", {"top": "rw", "mid": "ro", "base": "rr"}, udba=udba, dirren="auto") as at:
        fill(at["base"], {"old": OLD})
        at.rename("old", "new")
        assert tree(at) == {"new": OLD}


def test_several_branches_that_have_renamed_it(tmp_path: Path, udba: str) -> None:
    with core(tmp_path, {"mid": "rw", "base": "ro"}, udba=udba, dirren="on") as at:
        fill(at["base"], {"p": {"old": OLD}, "q": {"y": "y"}})
        at.rename("p/old", "q/new")
        at.create("q/new/m", b"m")
        at.rename("q", "Q")
    with core(tmp_path, {"top": "rw", "mid": "ro+wh", "base": "ro"}, udba=udba, dirren="on") as at:
        expected = {"p": {}, "Q": {"y": "y", "new": {**OLD, "m": "m"}}}
        assert tree(at) == expected
        at.rename("Q/new/sub", "sub")
        assert redirect(at["top"] / "sub") == "/Q/new/sub"
        at.rename("Q", "R")
        at.rename("R/new", "R/newest")
        assert redirect(at["top"] / "R/newest") == "/Q/new"
        at.unlink("R/newest/m")
        expected = {"p": {}, "R": {"y": "y", "newest": {"a": "a"}}, "sub": {"b": "b"}}
        assert tree(at) == expected
    with core(tmp_path, {"top": "rw", "mid": "ro+wh", "base": "ro"}, udba=udba) as at:
        assert tree(at) == expected


@pytest.mark.parametrize("value", [b"/" + b"x/" * 3000 + b"x", b"x" * 60000])
def test_what_is_longer_than_a_path(value: bytes) -> None:
    """Not every file system takes such a value."""
    with pytest.raises(notation.Unusable):
        notation.checked(value)


@pytest.mark.parametrize(
    "value",
    [
        "", "/", "//", "/..", "..", "../x", "/old/../f", "a/b", "/./old", "/old/", "/link", "/link/etc", "/f", "/none",
        "/none/old", "/.wh.old", ".wh..wh.plnk", "/old\0x", "/" + "x" * 300,
        "/mirror", "mirror", "/mirror/mirror",
    ],
)  # fmt: skip
def test_redirects_that_lead_nowhere(tmp_path: Path, udba: str, value: str, expect_log: Callable[[str], None]) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    with core(tmp_path, udba=udba, dirren="on") as at:
        fill(at["base"], {"old": OLD, "f": "f", "mirror": {"m": "m"}})
        (at["base"] / "link").symlink_to(tmp_path / "outside")
        fill(at["top"], {"mirror": {"t": "t"}})
        (at["top"] / ".wh..wh.redirects").touch()
    os.setxattr(tmp_path / "top/mirror", KEY, value.encode())
    possible = {"/link", "/link/etc", "/f", "/none", "/none/old", "/mirror", "mirror", "/mirror/mirror"}
    if value not in possible:
        expect_log("cannot be a path; what it has on lower branches is not shown")
    with core(tmp_path, udba=udba, dirren="on") as at:
        shown = tree(at, "mirror")
        assert bool(at.sb.bad_redirects) == (value not in possible)
        if value in ("/mirror", "mirror"):
            assert shown == {"t": "t", "m": "m"}
        else:
            assert shown == {"t": "t"}
            at.rename("mirror", "new")
            assert tree(at, "new") == {"t": "t"}


def test_redirects_that_lead_through_many_others(tmp_path: Path, expect_log: Callable[[str], None]) -> None:
    """Each name of the path is a directory that leads through the same number of others, one branch further down."""
    layers = {"top": "rw", **{f"l{number}": "ro+wh" for number in range(8)}, "base": "ro"}
    path = "/" + "/".join("d" * 12)
    with core(tmp_path, layers) as at:
        for name in at.paths:
            place = at[name]
            (place / ".wh..wh.redirects").touch()
            for part in path[1:].split("/"):
                place = place / part
                place.mkdir()
                os.setxattr(place, KEY, path.encode())
    expect_log("leads through too many others")
    with core(tmp_path, layers) as at:
        assert at.names("d") == ["d"]


def test_the_mark_is_not_seen_through_the_mount(union: Core) -> None:
    union.rename("old", "new")
    number = union.find("new").id
    key = KEY.encode()
    assert key not in union.fs.listxattr(number, union.caller)
    for forbidden in (
        lambda: union.fs.getxattr(number, key),
        lambda: union.fs.setxattr(number, key, b"/other", union.caller),
        lambda: union.fs.removexattr(number, key, union.caller),
    ):
        assert errno_of(forbidden) == "EOPNOTSUPP"


def test_a_rename_that_fails_leaves_what_was(union: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    real = syscalls.rename_at

    def refuse(src_fd: int, src: bytes, dst_fd: int, dst: bytes, flags: int = 0) -> None:
        if src == b"old":
            raise OSError(errno.EIO, "injected")
        real(src_fd, src, dst_fd, dst, flags)

    monkeypatch.setattr(syscalls, "rename_at", refuse)
    for flags in (0, EXCHANGE):
        with pytest.raises(OSError, match="injected"):
            union.rename("old", "other" if flags else "new", flags)
        assert redirect(union["top"] / "old") is None
        assert not (union["top"] / ".wh.old").exists()
        assert tree(union) == {"old": OLD, "other": {"c": "c"}, "f": "f"}


def test_where_no_attribute_can_be_set(union: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "injected")

    monkeypatch.setattr(syscalls, "setxattr", refuse)
    assert errno_of(lambda: union.rename("old", "new")) == "EXDEV"
    assert tree(union) == {"old": OLD, "other": {"c": "c"}, "f": "f"}


def test_direct_changes_of_where_it_is(tmp_path: Path) -> None:
    """reval: of what is below, of the way there, and of the redirect."""
    with core(tmp_path, dirren="on") as at:
        fill(at["base"], {"a": {"b": {"old": OLD}}})
        at.rename("a/b/old", "new")
        assert tree(at, "new") == OLD
        for _ in range(3):  # it is watched by then
            assert at.exists("new/sub/b")
        (at["base"] / "a/b/old/a").unlink()
        (at["base"] / "a/b/old/sub/d").write_text("d")
        assert tree(at, "new") == {"sub": {"b": "b", "d": "d"}}
        (at["base"] / "a/b").rename(at["base"] / "a/c")
        assert tree(at, "new") == {}
        (at["base"] / "a/c").rename(at["base"] / "a/b")
        assert tree(at, "new") == {"sub": {"b": "b", "d": "d"}}
        (at["base"] / "a/b/old").rename(at["base"] / "x")
        assert tree(at, "new") == {}
        os.setxattr(at["top"] / "new", KEY, b"/x/sub")
        assert tree(at, "new") == {"b": "b", "d": "d"}
        os.removexattr(at["top"] / "new", KEY)
        assert tree(at, "new") == {}


def test_few_descriptors(tmp_path: Path, udba: str) -> None:
    with core(tmp_path, udba=udba, max_fds=4, dirren="on") as at:
        deep: dict[str, Any] = {"f": "f"}
        for number in range(20):
            deep = {f"d{number}": deep, "g": "g"}
        fill(at["base"], {"old": deep, "q": {}})
        at.rename("old", "q/new")
        for _ in range(2):
            assert tree(at, "q/new") == deep
            at.sb.table.trim()
            assert at.sb.table.open_fds < 30


# -- kills -----------------------------------------------------------------------------------------


STEPS: dict[str, tuple[Callable[[Core], object], Callable[[Core], object]]] = {
    "a lower one": (lambda at: None, lambda at: at.rename("old", "new")),
    "a merged one": (lambda at: at.mkdir("old/mine"), lambda at: at.rename("old", "other/new")),
    "one that was renamed": (lambda at: at.rename("old", "new"), lambda at: at.rename("new", "other/newer")),
    "back": (lambda at: at.rename("old", "new"), lambda at: at.rename("new", "old")),
    "over a merged one": (lambda at: at.unlink("other/c"), lambda at: at.rename("old", "other")),
    "exchange": (lambda at: None, lambda at: at.rename("old", "other", EXCHANGE)),
    "exchange with a renamed one": (lambda at: at.rename("old", "new"), lambda at: at.rename("new", "other", EXCHANGE)),
    "exchange with a file": (lambda at: None, lambda at: at.rename("old", "f", EXCHANGE)),
}


@pytest.mark.parametrize("steps", STEPS)
def test_a_kill_leaves_the_old_state_or_the_new(tmp_path: Path, steps: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody does the rest; with and without the sweep of what is left."""
    prepare, act = STEPS[steps]
    caplog.set_level(logging.ERROR, "udbad.union.view")  # a directory beside the whiteout of its old name

    def run(number: int, after: bool) -> tuple[Faults, dict[str, Any], list[dict[str, Any]]]:
        place = tmp_path / f"{number}{after}"
        faults = Faults(number, after)
        with core(place, dirren="on") as at:
            fill(at["base"], {"old": {"a": "a", "sub": {"b": "b"}}, "other": {"c": "c"}, "f": "f"})
            prepare(at)
            before = tree(at)
            held = descriptors()
            with faults.armed(), suppress(Killed):
                act(at)
            if faults.fired:
                gc.collect()
                kept = {layer.fd for node in at.sb.table.nodes.values() if type(node) is Dir for layer in node.layers}
                for fd in descriptors() - held - kept:
                    os.close(fd)
        shown = []
        for _ in range(2):
            with core(place) as at:
                shown.append(tree(at))
            swept(place / "top")
        return faults, before, shown

    faults, old, (new, _) = run(0, False)
    assert old != new
    reached = set()
    for number in range(1, faults.count + 1):
        for after in (False, True):
            _, _, shown = run(number, after)
            assert shown[0] == shown[1]
            assert shown[0] in (old, new), f"{'after' if after else 'before'} {number}, {faults.calls[number - 1]}"
            reached.add(shown[0] == new)
    assert reached == {False, True}


# -- tools -----------------------------------------------------------------------------------------


def test_why_and_where(union: Core) -> None:
    union.create("old/sub/mine", b"mine")
    union.rename("old", "other/new")
    base = str(union["base"])
    names = (b"other", b"new", b"sub", b"b")
    answer = explain.where(union.sb, names)
    assert answer["branch"] == base
    steps = explain.why(union.sb, names)["steps"]
    new = {row["branch"].partition("=")[0]: row for row in steps[2]["branches"]}
    assert new[base]["role"] == "merged"
    assert "leads to /old" in new[base]["why"]
    assert [row["role"] for row in steps[4]["branches"]] == ["absent", "serves"]
    fill(union["base"], {"other": {"new": {"hidden": "hidden"}}})
    assert not explain.why(union.sb, (b"other", b"new", b"hidden"))["exists"]
    assert explain.why(union.sb, (b"other", b"new", b"a"))["exists"]
    assert not explain.why(union.sb, (b"old",))["exists"]


def test_diff(union: Core) -> None:
    union.create("old/sub/mine", b"mine")
    union.unlink("old/a")
    union.rename("old", "other/new")
    top, base = (BranchSpec(os.fsencode(union[name]), Perm.RO) for name in ("top", "base"))
    with branchdiff.opened(top, [base]) as (branch, lowers):
        found = {(os.fsdecode(one.path), one.kind.value, one.detail) for one in branchdiff.changes(branch, lowers)}
    assert {one for one in found if one[1] != "identical" and "time" not in one[2]} == {
        ("old", "deleted", ""),
        ("other/new", "added", "was /old"),
        ("other/new/a", "deleted", ""),
        ("other/new/sub/mine", "added", ""),
    }


def test_fsck(union: Core) -> None:
    union.rename("old", "new")
    fd = os.open(union["top"], os.O_PATH)
    try:
        kinds = fsck.DefectKind
        assert [one for one in fsck.find_defects(fd) if one.kind is not kinds.TEMPORARY] == []
        os.setxattr(union["top"] / "new", KEY, b"../outside")
        (defect,) = fsck.find_defects(fd)
        assert (defect.kind, defect.path) == (kinds.BAD_REDIRECT, b"new")
        fsck.repair(fd, defect)
        assert redirect(union["top"] / "new") is None
        os.setxattr(union["top"] / "new", KEY, b"/old")
        (union["top"] / ".wh..wh.redirects").unlink()
        (defect,) = fsck.find_defects(fd)
        assert (defect.kind, defect.remedy) == (kinds.UNTOLD_REDIRECT, "")
    finally:
        os.close(fd)


def test_an_archive_has_no_words_for_it(union: Core) -> None:
    union.rename("old", "new")
    fd = os.open(union["top"], os.O_PATH)
    try:
        with pytest.raises(OSError, match="renamed directory"):
            pack.pack(fd, io.BytesIO())
    finally:
        os.close(fd)


def test_what_goes_by_names_is_refused(tmp_path: Path) -> None:
    with core(tmp_path, {"top": "rw", "base": "rw"}, dirren="on") as at:
        fill(at["base"], {"old": OLD})
        fill(at["top"], {"old": {}})
        at.rename("old", "new")
        at.fs.release(at.create("new/mine", b"mine").fh)
        before = tree(at)
        src, dst = syncdown.check(at.sb, os.fsencode(at["top"]), os.fsencode(at["base"]), True)

        def merge() -> None:
            for work in syncdown.Sync(at.sb, src, dst, True, Halt()).steps():
                if work is not None:
                    work()

        with pytest.raises(UserError, match=r"new on .*top is a renamed directory"):
            merge()
        with pytest.raises(UserError, match="renamed, which hides"):
            next(mvdown.steps(at.sb, (b"new", b"mine"), mvdown.Options(), Halt()))
        with at.sb.carrying():
            fill(at["base"], {"further": OLD})
            fill(at["top"], {"further": {}})
            assert errno_of(lambda: at.rename("further", "away")) == "EXDEV"
        assert tree(at) == {**before, "further": OLD}
