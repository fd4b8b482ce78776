"""buildah and podman on udbad-overlay: images are built, run, changed and committed, by root and by an ordinary user.

The same script runs on fuse-overlayfs, and what is in the images afterwards must be the same. Nothing here needs a
network: the first image is made of busybox-static.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest

from tests.helpers.merge import Tree, diff, snapshot
from tests.helpers.mount import REPOSITORY
from tests.system.support import clean_env, require
from tests.t5_daemon.daemon import until

pytestmark = [pytest.mark.system, pytest.mark.fuse]

USER: Final = 54321
SUBORDINATE: Final = 600000
PURE: Final = os.environ.get("UDBAD_PURE", "")
"""As what calls us runs, what it starts does."""

SCRIPT: Final = r"""
set -eu
c=$(buildah from scratch)
m=$(buildah mount $c)
mkdir -p $m/bin $m/etc/sub $m/data $m/srv/a/b
cp /bin/busybox $m/bin/
for name in sh ls cat rm mkdir mv echo ln chmod touch; do ln -s busybox $m/bin/$name; done
echo hello > $m/etc/hello
echo linked > $m/etc/first
ln $m/etc/first $m/etc/second
echo sub > $m/etc/sub/file
seq 100 > $m/etc/numbers
for i in $(seq 50); do echo $i > $m/data/$i; done
echo deep > $m/srv/a/b/file
buildah umount $c >/dev/null
buildah commit -q $c base >/dev/null
buildah rm $c >/dev/null

c=$(buildah from base)
m=$(buildah mount $c)
rm $m/etc/numbers $m/bin/echo
echo more >> $m/etc/hello
mv $m/etc/sub $m/etc/moved
rm -r $m/data
mkdir $m/data
echo new > $m/data/new
mkdir $m/etc/sub
buildah run --isolation chroot $c -- /bin/sh -c \
    'cat /etc/hello; mkdir /made; cat /etc/hello > /made/copy; rm /etc/moved/file; ln /made/copy /made/link'
buildah commit -q $c changed >/dev/null
buildah commit -q $c oci-archive:$PWD/changed.tar >/dev/null
buildah umount $c >/dev/null

cat > Containerfile <<X
FROM changed
RUN touch /one && rm -r /made
RUN mkdir /made && cat /etc/hello > /made/two
COPY Containerfile /copied
RUN rm /data/new && mv /srv /srv2 && chmod 700 /etc/moved
X
buildah build -q --isolation chroot --layers -t built . >/dev/null
podman diff changed > changes
m=$(podman image mount built)
cd $m
find etc/sub > ~-/replaced
find . -path ./etc/sub -prune -o \( -type f -printf '%p %m %n %s\n' -o -printf '%p %m %y %l\n' \) | sort
cat etc/hello srv2/a/b/file made/*
cd - >/dev/null
podman image umount built >/dev/null
buildah rm -a >/dev/null
podman image prune -f >/dev/null
podman image inspect --format '{{.GraphDriver.Data.UpperDir}}:{{.GraphDriver.Data.LowerDir}}' built > layers
"""

RUN: Final = r"""
set -eu
mount -t cgroup2 none /sys/fs/cgroup  # crun wants to know of which kind it is
mkdir -p /run/libpod
mount -t tmpfs none /run/libpod  # short, as conmon's sockets are in there; where their names get too long, all waits
# What crun sets without that, it may not everywhere.
run="podman run --cgroups=disabled --network=none --ulimit nofile=1024:1024 --ulimit nproc=1024:1024"
c=$(buildah from scratch)
m=$(buildah mount $c)
mkdir -p $m/bin $m/etc $m/dir/sub
cp /bin/busybox $m/bin/
for name in sh cat rm ls mv touch; do ln -s busybox $m/bin/$name; done
echo hello > $m/etc/hello
echo below > $m/dir/sub/file
buildah commit -q --rm $c base >/dev/null
$run --name first base /bin/sh -c \
    'cat /etc/hello; echo new > /new; rm /bin/touch; mv /dir/sub/file /dir/file; ls / /bin'
podman start -a first | tail -n 1
podman diff first | sort
podman commit -q first changed >/dev/null
$run --rm changed /bin/sh -c 'cat /new /dir/file; ls /bin /dir/sub; ! rm /none 2>/dev/null'
$run --rm --read-only changed /bin/sh -c '! touch /no 2>/dev/null && echo read-only'
podman rm first >/dev/null
podman ps -a --format '{{.Names}}'
"""

AS_USER: Final = r"""
# What an ordinary user needs, in this mount namespace only: his name and ids, /dev/fuse, the way to what is root's.
set -eu
work=$1; shift
cp -L /etc/passwd $work/passwd; echo "tester:x:$ID:$ID::$work:/bin/sh" >> $work/passwd
cp -L /etc/group $work/group; echo "tester:x:$ID:" >> $work/group
echo "tester:$SUB:65536" > $work/subuid
for name in passwd group; do mount --bind $work/$name /etc/$name; done
for name in subuid subgid; do [ -e /etc/$name ] || touch /etc/$name; mount --bind $work/subuid /etc/$name; done
mknod -m 666 $work/fuse c 10 229
mount --bind $work/fuse /dev/fuse
n=0
for path in "$@"; do
    closed= above=$path
    while ! setpriv --reuid $ID --regid $ID --clear-groups test -x "$above"; do
        closed=$above above=$(dirname "$above")
    done
    [ -n "$closed" ] || continue
    mkdir $work/way$n; mount --bind "$path" $work/way$n
    mount -t tmpfs -o mode=755 none "$closed"
    mkdir -p "$path"; mount --move $work/way$n "$path"
    n=$((n+1))
done
cd $work/home
export HOME=$work/home XDG_RUNTIME_DIR=$work/run
exec setpriv --reuid $ID --regid $ID --init-groups buildah unshare bash -c "$SCRIPT"
"""


CONFS: Final = {"STORAGE_CONF": "storage.conf", "CONF": "containers.conf"}


@dataclass
class Storage:
    """A private store of containers, and the program that mounts them. state: where they keep what they know of those
    that run; default: beside it."""

    home: Path
    program: Path
    state: str = ""

    def __post_init__(self) -> None:
        self.home.mkdir()
        (self.home / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.home}/graph"\n'
            f'runroot = "{self.state or self.home}/state"\n'
            f'[storage.options.overlay]\nmount_program = "{self.program}"\n'
        )
        (self.home / "containers.conf").write_text('[engine]\nevents_logger = "none"\nlock_type = "file"\n')

    def run(self, *command: str, **extra: str) -> str:
        confs = {f"CONTAINERS_{name}": f"{self.home}/{file}" for name, file in CONFS.items()}
        env = clean_env(**confs, UDBAD_PURE=PURE, **extra)
        done = subprocess.run(
            command, cwd=self.home, env=env, capture_output=True, text=True, timeout=500, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def layers(self) -> list[str]:
        """Of the image `built`, the uppermost first."""
        text = (self.home / "layers").read_text().strip().replace("<no value>", "")
        return [path for path in text.split(":") if path]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """udbad-overlay, of these sources."""
    path = tmp_path / "udbad-overlay"
    path.write_text(
        f'#!/bin/sh\nexport PYTHONPATH={REPOSITORY}\nexec {sys.executable} -P -m udbad.commands.overlay "$@"\n'
    )
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def tools() -> Iterator[None]:
    require("buildah", "podman", "fuse-overlayfs", "unshare", "setpriv", "newuidmap")
    assert Path("/bin/busybox").exists(), "busybox-static"
    yield
    # Mounts that a container was left with end with the mount namespace of their script, and the processes then.
    until(lambda: not served(), "the end of every mount process")


def served() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"udbad.commands.overlay" in words:
            found.append(str(path))
    return found


def test_images_by_root(tmp_path: Path, program: Path) -> None:
    ours, theirs = Storage(tmp_path / "ours", program), Storage(tmp_path / "theirs", Path("/usr/bin/fuse-overlayfs"))
    said = [one.run("unshare", "-m", "bash", "-c", SCRIPT) for one in (ours, theirs)]
    assert said[0].splitlines() == said[1].splitlines()
    for one in (ours, theirs):
        same_tree_in_all(tmp_path, program, one.layers())
    changes = (ours.home / "changes").read_text().splitlines()
    assert {"D /etc/numbers", "D /bin/echo", "C /etc/hello", "A /etc/moved", "A /made/link", "A /data/new"} <= {
        *changes
    }
    # The directory that has taken another one's place is empty; a commit with fuse-overlayfs has the old file in it.
    assert (ours.home / "replaced").read_text() == "etc/sub\n"
    archives = [uppermost_layer(one.home / "changed.tar") for one in (ours, theirs)]
    # In the one of fuse-overlayfs there is nothing of the new directory at all.
    assert archives[0].pop("etc/sub")
    assert archives[0].pop("etc/sub/.wh..wh..opq", None) or archives[0].pop("etc/sub/.wh.file")
    assert archives[0] == archives[1]
    assert {"bin/.wh.echo", "etc/hello", "data/.wh..wh..opq", "made/link"} & archives[0].keys()
    committed = [json.loads(one.run("podman", "image", "inspect", "built"))[0] for one in (ours, theirs)]
    assert len(committed[0]["RootFS"]["Layers"]) == len(committed[1]["RootFS"]["Layers"])


def uppermost_layer(path: Path) -> dict[str, tuple[object, ...]]:
    """What the archive of an image has in its last layer, but for times: name to type, attributes and content."""
    with tarfile.open(path) as image:

        def blob(digest: str) -> bytes:
            file = image.extractfile(f"blobs/{digest.replace(':', '/')}")
            assert file is not None
            return file.read()

        index = image.extractfile("index.json")
        assert index is not None
        manifest = json.loads(blob(json.loads(index.read())["manifests"][0]["digest"]))
        data = blob(manifest["layers"][-1]["digest"])
    found: dict[str, tuple[object, ...]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as layer:
        for one in layer:
            content = layer.extractfile(one) if one.isreg() else None
            xattrs = {key: value for key, value in one.pax_headers.items() if key.startswith("SCHILY")}
            found[one.name] = (
                one.type, one.mode, one.uid, one.gid, one.linkname, one.devmajor, one.devminor, xattrs, one.size,
                None if content is None else content.read(),
            )  # fmt: skip
    return found


def test_podman_runs_containers(tmp_path: Path, program: Path) -> None:
    """By crun, in name spaces of their own; what they leave is committed, and runs."""
    require("crun", "conmon")
    said = []
    for name, mounts in (("ours", program), ("theirs", Path("/usr/bin/fuse-overlayfs"))):
        said.append(Storage(tmp_path / name, mounts, "/run/libpod").run("unshare", "-m", "bash", "-c", RUN))
    assert said[0].splitlines() == said[1].splitlines()
    assert "read-only" in said[0].splitlines()


PACKAGES: Final = r"""
set -eu
podman import -q ../base.tar debian >/dev/null
c=$(buildah from debian)
buildah run --isolation chroot $c -- /bin/sh -ec '
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update
    apt-get -qy install hello less file
    apt-get -qy remove tzdata
    rm -r /usr/share/doc/hello /var/lib/apt/lists
    mkdir /var/lib/apt/lists
'
buildah commit -q $c oci-archive:$PWD/changed.tar >/dev/null
buildah rm $c >/dev/null
"""
NEVER_THE_SAME: Final = ("var/log/", "var/cache/", "var/lib/dpkg/", "etc/ld.so.cache", "run/")
"""Where Debian writes down when something was done, or in which order the disk had it."""


def test_packages_are_installed_in_a_build_step(debian: Path, tmp_path: Path, program: Path) -> None:
    """The layer of it is the one that fuse-overlayfs gives, entry by entry."""
    require("chroot", "tar")
    subprocess.run(["tar", "-C", debian, "-cf", tmp_path / "base.tar", "."], check=True, timeout=300)
    found = []
    for name, mounts in (("ours", program), ("theirs", Path("/usr/bin/fuse-overlayfs"))):
        storage = Storage(tmp_path / name, mounts)
        storage.run("unshare", "-m", "bash", "-c", PACKAGES)
        found.append(uppermost_layer(storage.home / "changed.tar"))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert {"usr/bin/hello", "var/lib/dpkg/status"} <= ours.keys()
    assert any(".wh." in name and "zoneinfo" in name for name in ours)
    for path, (*attributes, size, content) in ours.items():
        *expected, their_size, their_content = theirs[path]
        assert attributes == expected, path
        if not path.startswith(NEVER_THE_SAME):
            assert (size, content) == (their_size, their_content), path


def test_layers_that_were_written_are_those_of_overlayfs(tmp_path: Path, program: Path) -> None:
    """What a container has written, before it is committed: the kernel shows the same tree."""
    for name in ("lower/dir", "lower/gone", "upper", "work", "merged"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("kept", "removed", "changed", "dir/removed", "dir/kept", "gone/file"):
        (tmp_path / "lower" / name).write_text(name)
    words = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    merged = tmp_path / "merged"
    subprocess.run([program, "-o", words, merged], check=True, timeout=60, env=clean_env(UDBAD_PURE=PURE))
    try:
        for name in ("removed", "dir/removed", "gone/file"):
            (merged / name).unlink()
        (merged / "gone").rmdir()
        (merged / "gone").mkdir()
        (merged / "changed").write_text("new")
        with pytest.raises(OSError, match="cross-device"):
            (merged / "dir").rename(merged / "other")
    finally:
        subprocess.run(["fusermount3", "-u", merged], check=True, timeout=60)
    until(lambda: not served(), "the end of every mount process")
    assert sorted(os.listdir(tmp_path / "upper")) == ["changed", "dir", "gone", "removed"]
    same_tree_in_all(tmp_path, program, [f"{tmp_path}/upper", f"{tmp_path}/lower"], kernel=True)


def test_a_container_goes_on_when_its_mount_process_is_killed(tmp_path: Path, program: Path) -> None:
    """With the owners that it had."""
    for name in ("lower", "upper", "work", "merged", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "file").write_text("lower")
    merged = tmp_path / "merged"
    env = clean_env(UDBAD_PURE=PURE, UDBAD_RUN_DIR=f"{tmp_path}/run", PYTHONPATH=str(REPOSITORY))
    words = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work,uidmapping=0:100000:1000"
    subprocess.run([program, "-o", words, merged], check=True, timeout=60, env=env)
    try:
        asked = [sys.executable, "-P", "-m", "udbad", "status", "--json"]
        said = subprocess.run(asked, check=True, timeout=60, env=env, capture_output=True, text=True).stdout
        pid = next(int(one["pid"]) for one in json.loads(said)["mounts"])
        with (merged / "file").open() as file:
            os.kill(pid, signal.SIGKILL)
            assert file.read() == "lower"
            assert (merged / "file").stat().st_uid == 100000
    finally:
        subprocess.run(["fusermount3", "-u", merged], check=True, timeout=60)
    until(lambda: not served(), "the end of every mount process")


@pytest.mark.parametrize("word", ["-f", "-d"])
def test_in_the_foreground_and_with_layers_that_change(tmp_path: Path, program: Path, word: str) -> None:
    """It serves until it is told to stop; udba=notify."""
    for name in ("lower", "upper", "work", "merged", "run"):
        (tmp_path / name).mkdir()
    merged = tmp_path / "merged"
    words = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work,udba=notify"
    with (tmp_path / "log").open("w") as log:
        serving = subprocess.Popen(
            [program, word, "-o", words, merged], stderr=log,
            env=clean_env(UDBAD_PURE=PURE, UDBAD_RUN_DIR=f"{tmp_path}/run"),
        )  # fmt: skip
    try:
        until(merged.is_mount, "the mount")
        assert not (merged / "new").exists()
        (tmp_path / "lower/new").write_text("directly")
        until((merged / "new").exists, "the file that was made in a layer")
        assert serving.poll() is None
    finally:
        serving.terminate()
        assert serving.wait(60) == 0
    assert not merged.is_mount()
    assert (tmp_path / "log").read_text().endswith("SIGTERM: unmounting\n")


def without_marks(tree: Tree) -> Tree:
    """overlayfs hides its own attributes in layers, the others show them."""
    return {
        path: replace(entry, xattrs=tuple(one for one in entry.xattrs if "overlay" not in one[0]))
        for path, entry in tree.items()
    }


def same_tree_in_all(tmp_path: Path, program: Path, layers: list[str], kernel: bool = False) -> None:
    """One set of layers, as udbad-overlay, fuse-overlayfs and overlayfs show it. containers/storage keeps committed
    layers in the notation of aufs, which overlayfs does not read, where there is a mount_program: kernel."""
    assert len(layers) > 1
    place = tmp_path / "place"
    place.mkdir(exist_ok=True)
    lower = "lowerdir=" + ":".join(layers)
    trees = []
    commands = [[str(program), "-o", lower, str(place)], ["fuse-overlayfs", "-o", lower, str(place)]]
    if kernel:
        commands.append(["mount", "-t", "overlay", "overlay", "-o", lower + ",redirect_dir=on", str(place)])
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, timeout=60, env=clean_env(UDBAD_PURE=PURE))
        try:
            trees.append(without_marks(snapshot(place)))
        finally:
            subprocess.run(["umount", place], check=True, timeout=60)
    for other in trees[1:]:
        assert diff(trees[0], other) == []


def test_images_by_an_ordinary_user(tmp_path: Path, program: Path) -> None:
    """In a user namespace, as rootless podman has it: mounted there by its root, who is nobody outside."""
    opened = tmp_path
    while opened != opened.parent:
        opened.chmod(opened.stat().st_mode | 0o111) if opened.stat().st_uid == os.geteuid() else None
        if opened.name.startswith("udbad-test"):
            break
        opened = opened.parent
    said = []
    for name, mounts in (("ours", program), ("theirs", Path("/usr/bin/fuse-overlayfs"))):
        work = tmp_path / name
        work.mkdir()
        (work / "run").mkdir(mode=0o700)
        storage = Storage(work / "home", mounts)
        for path in (work, work / "run", storage.home, storage.home / "storage.conf"):
            os.chown(path, USER, USER)
        ways = [sys.base_prefix, sys.prefix, str(REPOSITORY)]
        said.append(
            storage.run(
                "unshare", "-m", "bash", "-c", AS_USER, "-", str(work), *ways,
                ID=str(USER), SUB=str(SUBORDINATE), SCRIPT=SCRIPT,
            )
        )  # fmt: skip
    assert said[0].splitlines() == said[1].splitlines()
    assert "./made/two" in said[0]
