"""Own changes come back as events and cost nothing: no notification is written because of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory

pytestmark = pytest.mark.fuse

DIRECTORIES = 20
CREATED = 8_000
"""Files created, and as many renamed; what is missing to TOTAL are writes."""
TOTAL = 100_000


def sent(mount: Mount) -> dict[str, int]:
    """Notifications written to the kernel so far, by kind, with nothing left waiting."""
    mount.flush()
    counts: dict[str, int] = mount.control({"op": "stats"})["invalidator"]["sent"]
    return counts


def echoes(mount: Mount) -> int:
    statistics = mount.control({"op": "stats"})["coherence"]
    assert (statistics["state"], statistics["overflows"]) == ("healthy", 0)
    return int(statistics["echoes"])


def test_a_hundred_thousand_own_changes_invalidate_nothing(union: UnionFactory) -> None:
    mount = union({"top": "rw", "base": "ro"}, "notify")
    for number in range(DIRECTORIES):
        (mount.path / f"d{number}").mkdir()
    before, echoes_before = sent(mount), echoes(mount)
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
    assert echoes(mount) - echoes_before > CREATED, "the events did come"


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
