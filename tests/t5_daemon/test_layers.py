"""Stores of layers: what Docker's tests of its aufs driver ask for (daemon/graphdriver/aufs/aufs_test.go), on ours."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import forked
from tests.helpers.leaks import mounts_under
from tests.t5_daemon.daemon import DEADLINE, Daemon, until
from tests.t5_daemon.test_mount_helper import HELPER
from udbad.control import registry
from udbad.errors import ExitCode
from udbad.layers import store
from udbad.settings.options import parse_mount_options

pytestmark = pytest.mark.fuse


class Layers:
    """A store below tmp_path, and the commands for it."""

    def __init__(self, daemon: Daemon, name: str = "store") -> None:
        self.daemon = daemon
        self.root = daemon.tmp_path / name
        self.root.mkdir()

    def create(self, layer: str, *parent: str, code: int = 0) -> str:
        words = [word for one in parent for word in ("--parent", one)]
        return self.daemon.command("layer", "create", *words, str(self.root), layer, code=code)

    def source(self, layer: str) -> str:
        return f"docker-aufs:{self.root}#{layer}"

    def mount(self, layer: str, *words: str) -> Path:
        options = [word for text in ("survive=off,udba=none", *words) for word in ("-o", text)]
        self.daemon.command("mount", *options, self.source(layer))
        return self.root / "mnt" / layer

    def umount(self, layer: str) -> None:
        self.daemon.command("umount", str(self.root / "mnt" / layer))
        until(lambda: not registry.find(self.daemon.run_dir, str(self.root / "mnt" / layer)), "the end of the mount")

    def remove(self, layer: str, code: int = 0) -> str:
        return self.daemon.command("layer", "remove", str(self.root), layer, code=code)

    def all(self) -> dict[str, dict[str, Any]]:
        found = json.loads(self.daemon.command("layers", "--json", str(self.root)))
        return {one["id"]: one for one in found}

    def changes(self, layer: str) -> list[tuple[str, str]]:
        found = json.loads(self.daemon.command("layer", "changes", "--json", str(self.root), layer))
        return [(one["change"], one["path"]) for one in found]

    def diff(self, layer: str) -> Path:
        target = self.daemon.tmp_path / f"{layer}.tar"
        self.daemon.command("layer", "diff", "-o", str(target), str(self.root), layer)
        return target


@pytest.fixture
def layers(daemon: Daemon) -> Layers:
    return Layers(daemon)


def names(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if not name.startswith(".wh."))


def test_create_and_remove(layers: Layers) -> None:
    """CreateDirStructure, NewDriverFromExistingDir, CreateNewDirStructure, CreateWithInvalidParent, Exists,
    RemoveImage."""
    layers.create("1")
    assert names(layers.root) == ["diff", "layers", "mnt"]
    layers.create("2", "1")
    layers.create("3", "2")
    assert (layers.root / "layers" / "3").read_text() == "2\n1\n"
    for part in ("diff", "layers", "mnt"):
        assert names(layers.root / part) == ["1", "2", "3"]
    assert {one["id"]: (one["parent"], one["depth"]) for one in layers.all().values()} == {
        "1": (None, 1), "2": ("1", 2), "3": ("2", 3),
    }  # fmt: skip
    assert "there is no layer docker in" in layers.create("4", "docker", code=ExitCode.BRANCH)
    assert "there is a layer 2 in" in layers.create("2", code=ExitCode.REFUSED)
    assert "the id of a layer is" in layers.create("../4", code=ExitCode.USAGE)
    assert "layer 1: 2 lies on it" in layers.remove("1", code=ExitCode.REFUSED)
    layers.remove("3")
    assert "there is no layer 3" in layers.remove("3", code=ExitCode.BRANCH)
    for part in ("diff", "layers", "mnt"):
        assert names(layers.root / part) == ["1", "2"]


def test_stale_removals_are_swept(layers: Layers) -> None:
    """InitStaleCleanup; and what crashes leave of a creation, a removal, and an archive that was being unpacked."""
    layers.create("1")
    for name in ("a-removing", "1-applying-removing"):
        (layers.root / "diff" / name / "deep" / "er").mkdir(parents=True)
        (layers.root / "diff" / name / "deep" / "file").touch()
    (layers.root / "diff" / "2").mkdir()
    layers.create("2", "1")
    assert names(layers.root / "diff") == ["1", "2"]
    (layers.root / "diff" / "2").rename(layers.root / "diff" / "2-removing")
    assert layers.all()["2"]["size"] is None
    layers.remove("2")
    assert names(layers.root / "diff") == names(layers.root / "layers") == ["1"]
    (layers.root / "diff" / "3").mkdir()
    (layers.root / "diff" / "3" / "file").touch()
    assert "something of a layer 3 already: Directory not empty" in layers.create("3", code=ExitCode.REFUSED)


def test_mounted_layers(layers: Layers) -> None:
    """GetWithoutParent, MountWithParent, MountedFalseResponse, MountedTrueResponse, DiffSize, ChildDiffSize, Changes,
    RemoveMountedDir, GetDiff, ApplyDiff."""
    layers.create("1")
    mount = layers.mount("1")
    (mount / "test_file").write_bytes(b"x" * 1234)
    layers.umount("1")
    layers.create("2", "1")
    assert not layers.all()["2"]["mounted"]
    mount = layers.mount("2")
    assert mount == layers.root / "mnt" / "2"
    assert (mount / "test_file").stat().st_size == 1234
    found = layers.all()
    assert [found[one]["mounted"] for one in "12"] == [False, True]
    assert [found[one]["size"] for one in "12"] == [1234, 0]
    (mount / "test.txt").touch()
    (mount / "test_file").unlink()
    assert layers.changes("2") == [("added", "test.txt"), ("deleted", "test_file")]
    assert "4 KiB" not in layers.daemon.command("layers", str(layers.root))
    layers.create("3", "2")
    (layers.root / "diff" / "3" / "test2.txt").write_text("there")
    assert layers.changes("3") == [("added", "test2.txt")]

    archive = layers.diff("2")
    with tarfile.open(archive) as tar:
        assert tar.getnames() == [".wh.test_file", "test.txt"]
    layers.create("4", "1")
    layers.daemon.command("layer", "apply", str(layers.root), "4", str(archive))
    assert names(layers.mount("4")) == ["test.txt"]
    assert "is written to by a mount" in layers.daemon.command(
        "layer", "apply", str(layers.root), "4", str(archive), code=ExitCode.BRANCH
    )
    with (layers.root / "mnt" / "4" / "busy").open("w"):
        assert "Device or resource busy" in layers.remove("4", code=ExitCode.FAILURE)
    layers.remove("4")
    layers.umount("2")
    drawn = layers.daemon.command("layers", str(layers.root)).splitlines()
    assert drawn == ["1  1.2 KiB", "└── 2  0 B", "    └── 3  5 B"]


def test_views_of_an_image(layers: Layers) -> None:
    """Any number at once, and a layer below whose whiteouts count; nothing is written, not even marks."""
    layers.create("1")
    (layers.root / "diff" / "1" / "a").touch()
    layers.create("2", "1")
    (layers.root / "diff" / "2" / ".wh.a").touch()
    (layers.root / "diff" / "2" / "b").touch()
    other = layers.daemon.tmp_path / "view"
    other.mkdir()
    mount = layers.mount("2", "ro")
    layers.daemon.command("mount", "-o", "ro,survive=off", layers.source("2"), str(other))
    for path in (mount, other):
        assert os.listdir(path) == ["b"]
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            (path / "b").unlink()
    assert sorted(os.listdir(layers.root / "diff" / "2")) == [".wh.a", "b"]
    layers.daemon.command("umount", str(other))
    layers.umount("2")


COUNT = 126
LONG = "x" * 231


def test_mount_of_126_layers(layers: Layers) -> None:
    """MountMoreThan42Layers, with ids as long as can be: each adds a file, every tenth deletes one of its parent."""
    expected = set()
    layer = ""
    with store.opened(str(layers.root), make=True) as found:
        for number in range(1, COUNT + 1):
            parent, layer = layer, f"{number:04}{LONG}"
            found.create(layer, parent or None)
            (layers.root / "diff" / layer / layer).touch()
            expected.add(layer)
            if number % 50 == 0:
                (layers.mount(layer) / parent).unlink()
                layers.umount(layer)
            elif number % 10 == 0:
                (layers.root / "diff" / layer / f".wh.{parent}").touch()  # as that has made it
            if number % 10 == 0:
                assert (layers.root / "diff" / layer / f".wh.{parent}").exists()
                expected.remove(parent)
    mount = layers.mount(layer)
    assert set(os.listdir(mount)) == expected
    assert len(expected) == COUNT - COUNT // 10
    (entry,) = registry.entries(layers.daemon.run_dir)
    assert len(parse_mount_options(entry.options).branches) == COUNT
    layers.umount(layer)
    # All of them in a configuration as well, which goes to the mount process twice when it changes.
    branches = [f"{layers.root}/diff/{number:04}{LONG}=ro+wh" for number in range(COUNT, 0, -1)]
    path = layers.daemon.add("a", (), branches=[branches[0].replace("ro+wh", "rw"), *branches[1:]])
    layers.daemon.start()
    assert set(os.listdir(path)) == expected
    layers.daemon.mounts["a"]["branches"] = branches[:-1]
    layers.daemon.mounts["a"]["ro"] = True
    layers.daemon.write()
    said = layers.daemon.command("reload")
    assert "mounts.a.branches: applied" in said
    assert set(os.listdir(path)) == expected - {f"0001{LONG}"}
    layers.daemon.stop()


def test_concurrent_access(layers: Layers) -> None:
    """BenchmarkConcurrentAccess: layers are made, mounted and removed by many at a time."""
    layers.create("base")
    (layers.root / "diff" / "base" / "file").touch()
    ids = [f"c{number}" for number in range(6)]
    root = str(layers.root)

    def at_once(*commands: list[str]) -> None:
        log = os.open(layers.daemon.tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            running = [forked.start(words, log, environment=layers.daemon.environment) for words in commands]
            codes = [process.wait(DEADLINE) for process in running]
        finally:
            os.close(log)
        assert codes == [0] * len(commands), (layers.daemon.tmp_path / "log").read_text()

    at_once(*(["layer", "create", "--parent", "base", root, one] for one in ids))
    at_once(*(["mount", "-o", "survive=off,udba=none", layers.source(one)] for one in ids))
    for one in ids:
        (layers.root / "mnt" / one / "file").unlink()
    assert all(one["mounted"] for one in layers.all().values() if one["id"] != "base")
    at_once(*(["layer", "remove", root, one] for one in ids))
    assert names(layers.root / "diff") == names(layers.root / "layers") == names(layers.root / "mnt") == ["base"]
    assert not mounts_under(layers.root)


def test_source_in_a_configuration(layers: Layers) -> None:
    """It waits for the layer, stays what it is when another process takes it over, and another one needs a remount."""
    daemon = layers.daemon
    layers.create("1")
    (layers.root / "diff" / "1" / "one").touch()
    path = daemon.tmp_path / "mnt"
    path.mkdir()
    daemon.mounts["a"] = {"mount_point": str(path), "source": layers.source("2")}
    daemon.start()
    daemon.wait_for("a", "waiting")
    layers.create("2", "1")
    (layers.root / "diff" / "2" / "two").touch()
    state = daemon.wait_for("a")
    assert names(path) == ["one", "two"]
    daemon.command("branch", "add", "a", f"{daemon.tmp_path}/more=ro", code=ExitCode.BRANCH)
    assert "the branches are those of its source" in daemon.command(
        "branch", "del", "a", "--save", str(layers.root / "diff" / "1"), code=ExitCode.CONFIG
    )
    os.kill(state["pid"], 9)
    with (path / "two").open() as file:
        assert file.read() == ""
    daemon.wait_for("a", not_pid=state["pid"])
    assert names(path) == ["one", "two"]
    daemon.mounts["a"]["source"] = layers.source("1")
    daemon.write()
    assert "mounts.a.source: needs remount" in daemon.command("reload", code=None)
    assert names(path) == ["one", "two"]
    daemon.command("restart", "a", "--force")
    daemon.wait_for("a")
    assert names(path) == ["one"]
    daemon.mounts["a"]["branches"] = ["/a"]
    daemon.write()
    assert "source and branches exclude each other" in daemon.command(
        "check-config", "-c", str(daemon.config), code=ExitCode.CONFIG
    )
    daemon.stop()


def test_mount_8(layers: Layers) -> None:
    """As fstab has it: the source is the first word of the line, and the same mount is asked for twice."""
    layers.create("1")
    (layers.root / "diff" / "1" / "one").touch()
    layers.create("2", "1")
    mount = layers.root / "mnt" / "2"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", HELPER, layers.source("2"), str(mount), "-o", "rw,survive=off"],
            env=layers.daemon.environment, capture_output=True, text=True, timeout=DEADLINE, cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "is mounted so already" in done.stderr
    assert os.listdir(mount) == ["one"]
    assert [entry.mount_point for entry in registry.entries(layers.daemon.run_dir)] == [str(mount)]
    layers.umount("2")
