"""On which file systems content that is written comes before a later rename (branch/ordering.py)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from udbad.branch.ordering import keeps_order

pytestmark = pytest.mark.fuse  # it mounts


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        ([], "", True),
        ([], "data=journal", True),
        ([], "data=writeback", False),
        ([], "nobarrier", False),
        (["-O", "^has_journal"], "", False),
    ],
)
def test_ext4(tmp_path: Path, make: list[str], options: str, expected: bool) -> None:
    image, place = tmp_path / "image", tmp_path / "place"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", *make, str(image)], check=True, timeout=60)
    subprocess.run(["mount", "-o", f"loop,{options}".rstrip(","), str(image), str(place)], check=True, timeout=60)
    try:
        assert keeps_order("ext4", os.stat(place).st_dev) is expected
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=60)


def test_others() -> None:
    assert keeps_order("xfs", 0)
    assert not keeps_order("btrfs", os.stat("/").st_dev)
    assert not keeps_order("ext4", os.stat("/dev/shm").st_dev)  # no such device: /proc may be hidden, too
