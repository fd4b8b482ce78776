"""A Debian (or Ubuntu) system lives in a union: packages come and go, and the lower layers stay as they were.

The lower layer is what debootstrap makes; the one above it is what removing a package and some files by hand changed,
as a container image would keep it: changed objects, whiteouts, opaque directories.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.system.debian import apt_get, in_chroot
from tests.system.support import Manifest, assert_same, below, each_mode, manifest, require, run, unchanged

pytestmark = [pytest.mark.system, pytest.mark.fuse]

REMOVED_PACKAGE = "tzdata"
"""Removed in the middle layer, installed again in the union: directories appear over whiteouts."""
NEW_PACKAGES = ("hello", "tree", "less", "file")


@dataclass(frozen=True)
class Layers:
    """Two read-only layers and the tree they must look like together."""

    base: Path
    middle: Path
    merged: Manifest


def change(root: Path) -> None:
    """What the middle layer does to the base."""
    apt_get(root, "purge", REMOVED_PACKAGE)
    shutil.rmtree(root / "srv/gone")
    (root / "srv/opaque/under").unlink()
    (root / "srv/opaque/over").write_text("over\n")
    (root / "srv/pool/new").write_text("new\n")
    (root / "srv/note").write_text("middle\n")
    (root / "etc/hostname").chmod(0o640)
    (root / "srv/was").rename(root / "srv/is")


def difference(old: Manifest, new: Manifest, source: Path, layer: Path) -> None:
    """Write to `layer` what turns the tree `old` into `new`, whose files are in `source`."""
    changed = {path for path in new if new[path] != old.get(path)}
    gone = {path for path in old.keys() - new.keys() if os.path.dirname(path) in new or b"/" not in path}
    parents = {os.path.dirname(path) for path in changed | gone} - {b""}
    listing = b"\0".join(sorted(changed | parents)) + b"\0"
    run("rsync", "-dlptgoDHAX", "--from0", "--files-from=-", f"{source}/", f"{layer}/", stdin=listing)
    for parent in {os.path.dirname(path) for path in gone}:
        prefix = parent + b"/" if parent else b""
        children = {path for path in old if os.path.dirname(path) == parent and path != b"."}
        marks = [prefix + b".wh..wh..opq"]
        if parent == b"" or children & new.keys():
            marks = [prefix + b".wh." + path[len(prefix) :] for path in children & gone]
        for mark in marks:
            (layer / os.fsdecode(mark)).touch(0o444)
    # Not before: the marks changed them, and rsync leaves a time that is right to the second.
    for path in changed | parents:
        if new[path].kind == "d":
            os.utime(layer / os.fsdecode(path), ns=(new[path].mtime_ns, new[path].mtime_ns))


@pytest.fixture(scope="session")
def layers(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Layers]:
    """The two lower layers, made once and never written to again; removed at the end."""
    require("rsync", "apt-get")
    directory = tmp_path_factory.mktemp("debian")
    base, middle, changed = debian, directory / "middle", directory / "changed"
    try:
        run("cp", "-a", base, changed)
        change(changed)
        merged = below(changed)
        middle.mkdir()
        difference(manifest(base), merged, changed, middle)
        shutil.rmtree(changed)
        assert (middle / "srv/opaque/.wh..wh..opq").exists()
        assert (middle / "srv/.wh.gone").exists()
        yield Layers(base, middle, merged)
    finally:
        shutil.rmtree(directory)


def assert_healthy(root: Path) -> None:
    """Every file of every package is there and has its checksum, and no package is half installed."""
    assert in_chroot(root, "dpkg", "--verify") == ""
    assert in_chroot(root, "dpkg", "--audit") == ""
    apt_get(root, "check")


def packages(root: Path) -> set[str]:
    return set(in_chroot(root, "dpkg-query", "-W", "-f", "${db:Status-Abbrev}${Package}\n").replace("ii ", "").split())


def system_at_work(root: Path) -> None:
    """Install, use, remove and purge packages in the system at `root`."""
    assert_healthy(root)
    original = packages(root)
    assert REMOVED_PACKAGE not in original
    apt_get(root, "update")
    apt_get(root, "install", REMOVED_PACKAGE, *NEW_PACKAGES)
    assert_healthy(root)
    assert "Hello, world!" in in_chroot(root, "hello")
    assert "ELF" in in_chroot(root, "file", "-L", "/bin/sh")
    assert "/srv" in in_chroot(root, "tree", "-d", "-f", "/srv")
    assert "CET" in in_chroot(root, "env", "TZ=Europe/Paris", "date", "-d", "2024-01-01T00:00:00Z", "+%Z")

    apt_get(root, "remove", "hello", "tree")
    in_chroot(root, "test", "-e", "/usr/bin/hello", ok=(1,))
    # coreutils: programs of the lower layer replaced while they run.
    apt_get(root, "install", "--reinstall", "hello", "less", "coreutils")
    assert_healthy(root)
    apt_get(root, "purge", REMOVED_PACKAGE, *NEW_PACKAGES)
    apt_get(root, "autoremove", "--purge")
    assert_healthy(root)
    assert packages(root) == original

    # Accounts and permissions as inside any system.
    in_chroot(root, "useradd", "--create-home", "someone")
    as_someone = ("setpriv", "--reuid=someone", "--regid=someone", "--clear-groups")
    in_chroot(root, *as_someone, "cat", "/etc/shadow", ok=(1,))
    in_chroot(root, *as_someone, "sh", "-c", "echo mine >/home/someone/file && ! true >/etc/file")
    assert in_chroot(root, "cat", "/home/someone/file") == "mine\n"
    in_chroot(root, "userdel", "--remove", "someone")


def assert_layers_show(root: Path) -> None:
    """What the middle layer changed and deleted, seen through the union."""
    srv = root / "srv"
    assert sorted(os.listdir(srv)) == ["is", "note", "opaque", "pool"]
    assert (srv / "note").read_text() == "middle\n"
    assert os.listdir(srv / "opaque") == ["over"]
    assert sorted(os.listdir(srv / "pool")) == ["new", "old"]


@each_mode
def test_packages_come_and_go(layers: Layers, union: UnionFactory, udba: str) -> None:
    mount = union({"top": "rw", str(layers.middle): "ro+wh", str(layers.base): "ro"}, udba, watchdog=1200)
    with unchanged(layers.middle, layers.base):
        assert_same(below(mount.path), layers.merged, "the two layers united")
        system_at_work(mount.path)
        assert_layers_show(mount.path)
        mount.remount()
        assert_layers_show(mount.path)
        assert_healthy(mount.path)
