"""Symbolic links: the kernel keeps where they lead, and whoever replaces one directly is seen all the same.

A link never changes, so what is told apart is another link under the same inode number, which ext4 gives to the next
one that is made. Even times and length can be the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory
from tests.t3_fuse.live import PAST, errno_of, file_system, modes

pytestmark = [pytest.mark.fuse, modes]

LAYERS = {"top": "rw", "base": "ro"}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """Branches on ext4, where nobody else takes the numbers that come free."""
    with ExitStack() as stack:
        for name in LAYERS:
            stack.enter_context(file_system(tmp_path / name, "ext4", megabytes=16))
        yield


def fill(root: Path) -> None:
    for branch in LAYERS:
        (root / branch / "d").mkdir(parents=True)
        (root / branch / "d" / branch).symlink_to(f"of {branch}")
        os.utime(root / branch / "d" / branch, ns=(PAST, PAST), follow_symlinks=False)


def replace(link: Path, target: str) -> None:
    """Have another link in the place of one, with its inode number and times."""
    before = link.lstat()
    for number in range(20):
        link.unlink()
        link.symlink_to(target)
        if link.lstat().st_ino == before.st_ino:
            break
        link.with_name(f"spare{number}").symlink_to("x")  # takes the number that is in the way
    else:
        pytest.fail("inode numbers do not come round here")
    os.utime(link, ns=(before.st_atime_ns, before.st_mtime_ns), follow_symlinks=False)


def settle(mount: Mount) -> None:
    """Have a direct change seen, by what the mode promises."""
    if mount.udba == "notify":
        mount.flush()
    elif mount.udba == "none":
        mount.control({"op": "invalidate", "path": ""})


def test_the_second_pass_asks_for_no_target(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    mount = union(LAYERS, udba)
    (mount.path / "d/own").symlink_to("of own")
    links = [mount.path / "d" / name for name in ("top", "base", "own")]

    def look() -> None:
        for link in links:
            assert os.readlink(link) == f"of {link.name}"
            assert errno_of(link.stat) == "ENOENT"  # followed

    look()
    before = mount.requests()["readlink"]
    assert before <= len(links)
    look()
    os.lchown(links[0], 1, 1)
    os.lchown(links[1], 1, 1)  # copied up
    os.link(links[2], mount.path / "d/second", follow_symlinks=False)
    look()
    assert os.readlink(mount.path / "d/second") == "of own"
    assert mount.requests()["readlink"] == before


@pytest.mark.parametrize("name", list(LAYERS))
def test_replaced_under_the_same_number(union: UnionFactory, tmp_path: Path, udba: str, name: str) -> None:
    fill(tmp_path)
    mount = union(LAYERS, udba)
    link, real = mount.path / "d" / name, mount[name] / "d" / name
    old = f"of {name}"
    seen = {link.lstat().st_ino}
    assert os.readlink(link) == old
    for target in (old.upper(), "longer than the one before it", "s", old):
        replace(real, target)
        settle(mount)
        assert os.readlink(link) == target
        assert link.lstat().st_size == len(target)
        seen.add(link.lstat().st_ino)
    assert len(seen) > 1 or udba != "reval"


def test_the_number_goes_to_a_link_elsewhere(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    mount = union(LAYERS, udba)
    first, second = mount["base"] / "d/base", mount["base"] / "d/second"
    assert os.readlink(mount.path / "d/base") == "of base"
    number = first.lstat().st_ino
    first.unlink()
    second.symlink_to("elsewhere")
    assert second.lstat().st_ino == number
    settle(mount)
    assert os.readlink(mount.path / "d/second") == "elsewhere"
    assert errno_of((mount.path / "d/base").lstat) == "ENOENT"


def test_a_link_that_is_held_stays_what_it_was(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """By O_PATH; as natively, where it lives on without a name."""
    fill(tmp_path)
    mount = union(LAYERS, udba)
    link = mount.path / "d/top"
    fd = os.open(link, os.O_PATH | os.O_NOFOLLOW)
    try:
        assert os.readlink("", dir_fd=fd) == "of top"
        link.unlink()
        link.symlink_to("another")
        assert os.readlink(link) == "another"
        assert os.readlink("", dir_fd=fd) == "of top"
    finally:
        os.close(fd)
