"""buildah and podman on udbad-overlay and on fuse-overlayfs: `python -m tests.bench.containers` (as root).

Both have a store of their own, and every step is done on one and then on the other, in turns, so that whatever else the
machine does meets both. Figures: seconds, the median of the rounds, and the ratio. `--files N`: of the image with many
small files, `--rounds N`. Within ten minutes by default, and no network. Needs Debian's buildah, podman, crun and
busybox-static.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import Final

from tests.helpers.mount import REPOSITORY

FILES: Final = 130_000
"""Of one image: what a fat image with an interpreter and its packages has."""
PER_DIRECTORY: Final = 100
LAYERS: Final = (2, 100)
ROUNDS: Final = 10
BUDGET: Final = 600.0
"""Seconds after which no further round is begun."""
RUN: Final = (
    "podman", "run", "--rm", "--cgroups=disabled", "--network=none",
    "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024",
)  # fmt: skip
"""What needs no privilege that a container may lack, in which this may run."""
GOAL: Final = 0.8


@dataclass
class Store:
    """A graph root of its own. name: of the column. home: short, as it is a part of names of sockets."""

    name: str
    home: Path
    program: Path

    def make(self) -> None:
        self.home.mkdir()
        (self.home / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.home}/g"\nrunroot = "{self.home}/r"\n'
            f'[storage.options.overlay]\nmount_program = "{self.program}"\n'
        )
        (self.home / "containers.conf").write_text(
            f'[engine]\ntmp_dir = "{self.home}/t"\nevents_logger = "none"\nlock_type = "file"\n'
        )

    def run(self, *command: str) -> str:
        """What it says. Raises SystemExit where it fails: without it there is nothing to compare."""
        env = {
            **os.environ, "CONTAINERS_STORAGE_CONF": f"{self.home}/storage.conf",
            "CONTAINERS_CONF": f"{self.home}/containers.conf",
        }  # fmt: skip
        done = subprocess.run(
            command, env=env, cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{self.name}: {' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def timed(self, *command: str) -> float:
        begun = perf_counter()
        self.run(*command)
        return perf_counter() - begun


def _many_files(root: Path, count: int) -> None:
    for number in range(count):
        directory = root / f"{number // PER_DIRECTORY // 100:02}" / f"{number // PER_DIRECTORY % 100:02}"
        if number % PER_DIRECTORY == 0:
            directory.mkdir(parents=True)
        (directory / f"{number}").write_text(f"{number}\n" * 20)


def _image(path: Path, layers: int) -> None:
    """An archive as `docker save` makes them, of busybox and further layers with a file each."""

    def layer(number: int) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            if number:
                member = tarfile.TarInfo(f"of{number}")
                tar.addfile(member)
            else:
                tar.add("/bin/busybox", "bin/busybox")
                link = tarfile.TarInfo("bin/sh")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
        return stream.getvalue()

    parts = {f"{number}/layer.tar": layer(number) for number in range(layers)}
    digests = [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in parts.values()]
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": digests}}
    manifest = [{"Config": "config.json", "RepoTags": [f"layers{layers}:latest"], "Layers": list(parts)}]
    with tarfile.open(path, "w") as tar:
        said = {"config.json": json.dumps(config).encode(), "manifest.json": json.dumps(manifest).encode()}
        for name, data in {**parts, **said}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


Took = dict[str, dict[str, list[float]]]
"""Row, column, seconds."""


def _fat_image(store: Store, files: Path, took: Took) -> None:
    container = store.run("buildah", "from", f"layers{LAYERS[0]}")
    root = store.run("buildah", "mount", container)
    begun = perf_counter()
    subprocess.run(["cp", "-a", str(files), f"{root}/files"], check=True)
    took["copy many files in"][store.name].append(perf_counter() - begun)
    took["commit them"][store.name].append(store.timed("buildah", "commit", "-q", container, "fat"))
    store.run("buildah", "rm", container)


def _mount_fat_image(store: Store, took: Took) -> None:
    container = store.run("buildah", "from", "fat")
    begun = perf_counter()
    root = store.run("buildah", "mount", container)
    took["mount that image"][store.name].append(perf_counter() - begun)
    subprocess.run(["find", root, "-size", "+1M"], check=True, capture_output=True)
    took["mount it and find -size"][store.name].append(perf_counter() - begun)
    store.run("buildah", "rm", container)


@contextmanager
def _stores(directory: Path) -> Iterator[list[Store]]:
    """In this mount namespace, which ends with the process, and all mounts in it."""
    ours = directory / "udbad-overlay"
    # As setuptools writes it for who installs: what is imported decides how long a mount takes.
    ours.write_text(
        f"#!{sys.executable} -P\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from udbad.commands.overlay import main\nmain()\n"
    )
    ours.chmod(0o755)
    stores = [
        Store("udbad", directory / "u", ours),
        Store("fuse-overlayfs", directory / "f", Path("/usr/bin/fuse-overlayfs")),
    ]
    for store in stores:
        store.make()
    try:
        yield stores
    finally:
        for store in stores:
            store.run("buildah", "rm", "-a")
            store.run("podman", "rm", "-a", "-f")


def _measure(stores: list[Store], files: Path, rounds: int) -> Took:
    took: Took = defaultdict(lambda: defaultdict(list))
    end = monotonic() + BUDGET
    for count in LAYERS:
        _image(files.with_name("image.tar"), count)
        for store in stores:
            store.run("podman", "load", "-q", "-i", str(files.with_name("image.tar")))
    for store in stores:
        _fat_image(store, files, took)
    for turn in range(min(rounds, 3)):
        for store in stores[:: -1 if turn % 2 else 1]:
            _mount_fat_image(store, took)
    for turn in range(rounds):
        if turn > 1 and monotonic() > end:
            break
        for count in LAYERS:
            for store in stores[:: -1 if turn % 2 else 1]:
                row = f"podman run, {count} layers"
                took[row][store.name].append(store.timed(*RUN, f"layers{count}", "/bin/sh", "-c", "true"))
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description="buildah and podman on udbad-overlay and on fuse-overlayfs")
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    words = parser.parse_args()
    if os.environ.get("UDBAD_BENCH_NAMESPACE") != "1":
        os.environ["UDBAD_BENCH_NAMESPACE"] = "1"
        os.execvp("unshare", ["unshare", "-m", sys.executable, "-m", "tests.bench.containers", *sys.argv[1:]])
    # crun wants to know of which kind it is, and refuses a mixture of both.
    subprocess.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"], check=True)
    with tempfile.TemporaryDirectory(prefix="ub-", dir="/var/tmp", ignore_cleanup_errors=True) as name:
        files = Path(name) / "files"
        _many_files(files, words.files)
        with _stores(Path(name)) as stores:
            took = _measure(stores, files, words.rounds)
    print(f"{'':28}{'udbad':>10}{'fuse-overlayfs':>16}{'ratio':>8}   goal {GOAL}; load {os.getloadavg()[0]:.1f}")
    for row, columns in took.items():
        ours, theirs = (statistics.median(columns[column]) for column in ("udbad", "fuse-overlayfs"))
        count = len(columns["udbad"])
        print(f"{row:28}{ours:10.2f}{theirs:16.2f}{ours / theirs:8.2f}   {count} round{'s' * (count > 1)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
