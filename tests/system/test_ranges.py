"""Programs that allocate, punch, look for holes, copy ranges, publish files without a name."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.system.support import Manifest, assert_same, each_mode, manifest, require, run

pytestmark = [pytest.mark.system, pytest.mark.fuse]

MIB = 1 << 20

PUBLISH = """
import os, tempfile
with tempfile.TemporaryFile(dir="d") as file:  # O_TMPFILE | O_EXCL
    assert os.fstat(file.fileno()).st_nlink == 0
    file.write(b"temporary")
fd = os.open("d", os.O_TMPFILE | os.O_WRONLY, 0o640)
os.write(fd, b"published" * 1000)
os.link(f"/proc/self/fd/{fd}", "d/published", src_dir_fd=fd)
"""

STEPS: tuple[tuple[str, ...], ...] = (
    ("fallocate", "-l", "3MiB", "allocated"),
    ("fallocate", "--keep-size", "-o", "3MiB", "-l", "1MiB", "allocated"),
    ("fallocate", "--punch-hole", "-o", "1MiB", "-l", "1MiB", "data"),
    ("fallocate", "--zero-range", "-o", "10", "-l", "5000", "data"),
    ("fallocate", "--dig-holes", "zeros"),
    ("cp", "sparse", "copied"),
    ("cp", "-a", "data", "copied-data"),
    ("cp", "--reflink=never", "sparse", "copied-otherwise"),
    ("cp", "--sparse=never", "sparse", "filled"),
    ("install", "-m", "640", "data", "installed"),
    ("dd", "if=data", "of=dd", "bs=64k", "conv=sparse", "status=none"),
    ("truncate", "-s", "5M", "dd"),
    ("tar", "-S", "-cf", "archive.tar", "sparse", "copied"),
    ("tar", "-S", "-C", "d", "-xf", "archive.tar"),
    ("rsync", "-aS", "sparse", "data", "d/synced/"),
    ("rsync", "-a", "--inplace", "copied-data", "filled"),
    ("mv", "copied", "moved"),
    (sys.executable, "-c", PUBLISH),
)


def make_tree(root: Path) -> None:
    (root / "d").mkdir(parents=True)
    (root / "data").write_bytes(bytes(range(256)) * (3 * MIB // 256))
    (root / "zeros").write_bytes(b"begin" + bytes(MIB) + b"end")
    with (root / "sparse").open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(2 * MIB)
        file.write(os.urandom(MIB))


def blocks(root: Path) -> dict[str, int]:
    """Mebibytes that each file takes, rounded."""
    return {
        str(path.relative_to(root)): (path.stat().st_blocks * 512 + MIB // 2) // MIB
        for path in root.rglob("*")
        if path.is_file()
    }


def contents(root: Path) -> Manifest:
    """Without times, which differ from run to run."""
    return {path: replace(entry, mtime_ns=0) for path, entry in manifest(root).items() if path != b"archive.tar"}


@each_mode
def test_as_natively(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    require("fallocate", "rsync")
    make_tree(tmp_path / "base")
    run("cp", "-a", "--sparse=auto", tmp_path / "base", tmp_path / "native")
    mount = union({"top": "rw", "base": "ro"}, udba)
    before = manifest(tmp_path / "base")
    for step in STEPS:
        said = [run(*step, cwd=place) for place in (tmp_path / "native", mount.path)]
        assert said[0] == said[1], step
        assert blocks(mount.path) == blocks(tmp_path / "native"), step
        assert_same(contents(mount.path), contents(tmp_path / "native"), " ".join(step[:2]))
    assert manifest(tmp_path / "base") == before
