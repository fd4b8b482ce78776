"""buildah and podman on udbad-overlay, fuse-overlayfs and the kernel's overlayfs: `python -m tests.bench.containers`.

As root. Each has a store of its own, and every step is done on one and then on the others, in turns, so that whatever
else the machine does meets all. Figures: seconds, the median of the rounds, the ratio to fuse-overlayfs, and the same
of the CPU time of all who have a part in it, buildah and podman too. On overlayfs those call no program, and read what
is in a layer from its directory: no program that mounts can be faster. `--files N`: of the image with many small files,
`--rounds N`. `--scratch DIR`: where all of it is; on /dev/shm it is not the disk that is measured. No round is begun
after ten minutes, and what has been measured is shown when Ctrl-C ends it; no network. Needs Debian's buildah, podman,
crun and busybox-static.
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
from time import monotonic, perf_counter, sleep
from typing import Final, NamedTuple

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
CGROUPS: Final = Path("/sys/fs/cgroup")
OURS: Final = "udbad"
THEIRS: Final = "fuse-overlayfs"
KERNELS: Final = "overlayfs"
END_SECONDS: Final = 30.0
"""For the processes behind what was unmounted."""


class Cost(NamedTuple):
    """Of one step. cpu: seconds of all processes, also of those that nobody waits for, as long as the step takes."""

    seconds: float
    cpu: float


class Watch:
    """Of one step of a store, from here on."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cpu = store.cpu()
        self._begun = perf_counter()

    def read(self) -> Cost:
        return Cost(perf_counter() - self._begun, self._store.cpu() - self._cpu)


@dataclass
class Store:
    """A graph root of its own, and a control group of all that works on it. name: of the column. home: short, as it is
    a part of names of sockets. program: that mounts, None: the kernel does."""

    name: str
    home: Path
    program: Path | None

    @property
    def group(self) -> Path:
        return CGROUPS / f"{self.home.parent.name}-{self.home.name}"

    def cpu(self) -> float:
        """Seconds that its processes have taken so far."""
        words = dict(line.split() for line in (self.group / "cpu.stat").read_text().splitlines())
        return int(words["usage_usec"]) / 1e6

    def make(self) -> None:
        self.home.mkdir()
        self.group.mkdir()
        mounts = "" if self.program is None else f'mount_program = "{self.program}"'
        (self.home / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.home}/g"\nrunroot = "{self.home}/r"\n'
            f"[storage.options.overlay]\n{mounts}\n"
        )
        (self.home / "containers.conf").write_text(
            f'[engine]\ntmp_dir = "{self.home}/t"\nevents_logger = "none"\nlock_type = "file"\n'
        )

    def end(self) -> None:
        self.run("buildah", "rm", "-a")
        self.run("podman", "rm", "-a", "-f")
        end = monotonic() + END_SECONDS
        while (self.group / "cgroup.procs").read_text() and monotonic() < end:
            sleep(0.1)
        self.group.rmdir()

    def run(self, *command: str) -> str:
        """What it says. Raises SystemExit where it fails: without it there is nothing to compare."""
        entered = ("/bin/sh", "-c", f'echo $$ > {self.group}/cgroup.procs && exec "$@"', "-")
        env = {
            **os.environ, "CONTAINERS_STORAGE_CONF": f"{self.home}/storage.conf",
            "CONTAINERS_CONF": f"{self.home}/containers.conf",
            "PYTHONDONTWRITEBYTECODE": "",  # what is installed has its bytecode
        }  # fmt: skip
        done = subprocess.run(
            [*entered, *command],
            env=env,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{self.name}: {' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def timed(self, *command: str) -> Cost:
        watch = Watch(self)
        self.run(*command)
        return watch.read()


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


Took = dict[str, dict[str, list[Cost]]]
"""Row, column, rounds."""


def _fat_image(store: Store, files: Path, took: Took) -> None:
    container = store.run("buildah", "from", f"layers{LAYERS[0]}")
    root = store.run("buildah", "mount", container)
    took["copy many files in"][store.name].append(store.timed("cp", "-a", str(files), f"{root}/files"))
    took["commit them"][store.name].append(store.timed("buildah", "commit", "-q", container, "fat"))
    store.run("buildah", "rm", container)


def _mount_fat_image(store: Store, took: Took) -> None:
    container = store.run("buildah", "from", "fat")
    watch = Watch(store)
    root = store.run("buildah", "mount", container)
    took["mount that image"][store.name].append(watch.read())
    store.run("find", root, "-size", "+1M")
    took["mount it and find -size"][store.name].append(watch.read())
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
        Store(OURS, directory / "u", ours),
        Store(THEIRS, directory / "f", Path("/usr/bin/fuse-overlayfs")),
        Store(KERNELS, directory / "k", None),
    ]
    for store in stores:
        store.make()
    try:
        yield stores
    finally:
        for store in stores:
            store.end()


def _measure(stores: list[Store], files: Path, rounds: int, took: Took) -> None:
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


def _print(took: Took) -> None:
    names = (OURS, THEIRS, KERNELS)
    print(f"{'':26}{'seconds':>10}{'':39}CPU seconds           goal {GOAL}; load {os.getloadavg()[0]:.1f}")
    head = "".join(f"{name:>15}" for name in names) + f"{'ratio':>7}"
    print(f"{'':26}{head}{head}  rounds")
    for row, begun in took.items():
        columns = {name: costs for name, costs in begun.items() if costs}
        if not columns:
            continue
        line = f"{row:26}"
        for of in (lambda cost: cost.seconds, lambda cost: cost.cpu):
            median = {name: statistics.median(map(of, columns[name])) for name in columns}
            line += "".join(f"{median[name]:15.2f}" if name in median else f"{'-':>15}" for name in names)
            both = OURS in median and THEIRS in median
            line += f"{median[OURS] / median[THEIRS]:7.2f}" if both else f"{'-':>7}"
        print(f"{line}  {min(map(len, columns.values()))}")


def main() -> int:
    parser = argparse.ArgumentParser(description="buildah and podman on udbad-overlay and on fuse-overlayfs")
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"))
    words = parser.parse_args()
    if os.environ.get("UDBAD_BENCH_NAMESPACE") != "1":
        os.environ["UDBAD_BENCH_NAMESPACE"] = "1"
        os.execvp("unshare", ["unshare", "-m", sys.executable, "-m", "tests.bench.containers", *sys.argv[1:]])
    # crun wants to know of which kind it is, and refuses a mixture of both.
    subprocess.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"], check=True)
    took: Took = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(prefix="ub-", dir=words.scratch, ignore_cleanup_errors=True) as name:
        files = Path(name) / "files"
        _many_files(files, words.files)
        with _stores(Path(name)) as stores:
            try:
                _measure(stores, files, words.rounds, took)
            finally:
                _print(took)  # what there is, when Ctrl-C has ended it
    return 0


if __name__ == "__main__":
    sys.exit(main())
