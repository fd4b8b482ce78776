"""What a power failure leaves of a copy-up, on a disk that forgets what it was not told to flush."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.mount import mounted
from tests.helpers.volatile_disk import Disk, volatile_disk

pytestmark = pytest.mark.fuse

FILES = {"small": b"x" * 1000, "large": bytes(range(256)) * 4000, "linked": b"l" * 5000}


def copy_up_all(disk: Disk, base: Path, mount_point: Path, options: str, udba: str) -> dict[str, bytes | None]:
    """Copy every file up in one way or another; then what the branch has after a power failure, by name."""
    branch = disk.path / mount_point.name
    branch.mkdir()
    with mounted([f"{branch}=rw", f"{base}=ro"], mount_point, udba, options) as mount:
        (mount.path / "d/small").chmod(0o600)
        with (mount.path / "d/large").open("rb+", buffering=0) as large:
            large.write(FILES["large"][:10])
        # Its only known name goes while it is open: the copy becomes the home of a pseudo-link.
        with (mount.path / "d/linked").open("rb+", buffering=0) as linked:
            (mount.path / "d/linked").unlink()
            linked.write(FILES["linked"][:10])
        # Somebody syncs another file, which commits the journal with all the names in it.
        with (disk.path / "other").open("wb") as other:
            os.fsync(other.fileno())
        with disk.after_power_failure() as path:
            after = path / mount_point.name
            found = {name: read(after / "d" / name) for name in ("small", "large")}
            homes = [home for home in (after / ".wh..wh.plnk").iterdir() if home.is_file()]
            found["linked"] = read(homes[0]) if homes else None
    return found


def read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def test_a_name_never_comes_before_its_content(tmp_path: Path) -> None:
    """With the default the copies are whole; without the sync this disk does show what the sync is for."""
    base = tmp_path / "base"
    (base / "d").mkdir(parents=True)
    for name, content in FILES.items():
        (base / "d" / name).write_bytes(content)
    os.link(base / "d/linked", base / "d/other-name")
    with volatile_disk(tmp_path / "disk") as disk:
        assert copy_up_all(disk, base, tmp_path / "default", "", "notify") == FILES
        lost = copy_up_all(disk, base, tmp_path / "off", "copyup_fsync=off", "notify")
        assert {name: content and content.strip(b"\0") for name, content in lost.items()} == dict.fromkeys(FILES, b"")
