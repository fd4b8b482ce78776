"""io=cached: the kernel opens directories by itself, and everybody who reads one is one reader to us."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory
from tests.t3_fuse.live import errno_of
from tests.t3_fuse.test_readdir import getdents, opened, read_all

pytestmark = pytest.mark.fuse

LAYERS = {"top": "rw", "base": "ro"}
NAMES = {f"name of a file {number:04}" for number in range(2000)}
"""More than a getdents64(2) of the tests takes, or a reply."""


def fill(tmp_path: Path) -> None:
    (tmp_path / "base/d").mkdir(parents=True)
    for name in NAMES:
        (tmp_path / "base/d" / name).touch()


def shown(records: list[tuple[bytes, int, int, int]]) -> list[str]:
    return [os.fsdecode(name) for name, _, _, _ in records if name not in (b".", b"..")]


def asked(mount: Mount) -> dict[str, int]:
    return {name: count for name, count in mount.requests().items() if "dir" in name or name in ("lookup", "getattr")}


@pytest.mark.parametrize("udba", ["none", "notify"])
def test_the_second_pass_asks_for_nothing(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    mount = union(LAYERS, udba, "io=cached")
    for _ in range(2):
        assert set(os.listdir(mount.path / "d")) == NAMES
    before = asked(mount)
    assert set(os.listdir(mount.path / "d")) == NAMES
    assert asked(mount) == before
    assert before["opendir"] == before["releasedir"] == 0


def test_readers_of_different_times(union: UnionFactory, tmp_path: Path) -> None:
    """Who is in the middle of a listing goes on in that one: nothing comes twice, and what stays is not left out,
    though others begin anew, and though so many directories are read that nothing is held of this one."""
    fill(tmp_path)
    for number in range(100):
        (tmp_path / "base/many" / str(number) / "in").mkdir(parents=True)
    mount = union(LAYERS, "notify", "io=cached")
    d = mount.path / "d"
    with opened(d) as first, opened(d) as second:
        begun = shown(getdents(first))
        (d / "made").touch()
        (tmp_path / "base/d/made directly").touch()
        gone = max(NAMES - set(begun))
        (d / gone).unlink()
        mount.flush()
        later = getdents(second)
        for number in range(100):
            assert os.listdir(mount.path / "many" / str(number)) == ["in"]
        whole = begun + shown(list(read_all(first)))
        assert len(whole) == len(set(whole))
        assert NAMES - {gone} <= set(whole) <= NAMES | {"made", "made directly"}
        middle = later[-1][3]
        rest = shown(list(read_all(second)))
        assert set(shown(later)) | set(rest) == NAMES - {gone} | {"made", "made directly"}
        os.lseek(second, middle, os.SEEK_SET)
        assert shown(list(read_all(second))) == rest
        os.lseek(first, 0, os.SEEK_SET)
        assert set(shown(list(read_all(first)))) == NAMES - {gone} | {"made", "made directly"}


def test_reval_from_now_on(union: UnionFactory, tmp_path: Path) -> None:
    """What the kernel has is shown to nobody any more, whoever opened the directory when."""
    fill(tmp_path)
    (tmp_path / "top/d").mkdir(parents=True)  # whose mtime a change on the other branch leaves alone
    mount = union(LAYERS, "notify", "io=cached")
    d, real = mount.path / "d", tmp_path / "base/d"
    with opened(d) as early:
        assert set(shown(list(read_all(early)))) == NAMES
        mount.control({"op": "udba", "mode": "reval"})
        with opened(d) as late:
            for number in range(5):
                (real / str(number)).touch()
                for fd in (early, late):
                    os.lseek(fd, 0, os.SEEK_SET)
                    assert set(shown(list(read_all(fd)))) >= {str(number)}
                assert str(number) in os.listdir(d)
                (real / str(number)).unlink()
                assert str(number) not in os.listdir(d)
                assert str(number) not in os.listdir(d)


def test_removed_while_it_is_read(union: UnionFactory, tmp_path: Path) -> None:
    fill(tmp_path)
    mount = union(LAYERS, "notify", "io=cached")
    d = mount.path / "d"
    with opened(d) as fd:
        assert getdents(fd)
        for name in NAMES:
            (d / name).unlink()
        d.rmdir()
        assert errno_of(lambda: list(read_all(fd))) in ("", "ENOENT")
        os.fsync(fd)
    d.mkdir()
    assert os.listdir(d) == []


def test_whiteouts_that_are_shown_are_never_old(union: UnionFactory, tmp_path: Path) -> None:
    """Nobody is told of those: with shwh each listing is asked for."""
    fill(tmp_path)
    mount = union(LAYERS, "notify", "io=cached,shwh")
    for name in sorted(NAMES)[:3]:
        (mount.path / "d" / name).unlink()
        assert f".wh.{name}" in os.listdir(mount.path / "d")
    (tmp_path / "top/d" / f".wh.{min(NAMES)}").unlink()
    assert f".wh.{min(NAMES)}" not in os.listdir(mount.path / "d")


def test_who_has_a_directory_open_is_found(union: UnionFactory, tmp_path: Path) -> None:
    fill(tmp_path)
    mount = union(LAYERS, "notify", "io=cached")
    with opened(mount.path / "d"):
        users = mount.control({"op": "busy", "branch": str(tmp_path / "base")})["users"]
        assert [(one["path"], one["pid"], one["what"]) for one in users] == [("/d", os.getpid(), "open directory")]
