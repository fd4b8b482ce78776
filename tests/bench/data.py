"""The data every system is measured on: generated once, the same for all, from fixed seeds.

May not touch a mount of a system under test. Layout below the scratch directory: data/lower (the read-only branch),
data/many/bNNN (the branch sets), data/repo, data/files.tar, lists/*.txt (names for the client).
XFS and btrfs are on loop devices beside it, and there is a tmpfs.
"""

import os
import random
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from tests.bench import process
from tests.bench.process import Failed

MIB = 1 << 20
MAKE = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}


@dataclass(frozen=True)
class Scale:
    """How much of everything; two instances, FULL and QUICK."""

    minutes: float  # for the whole run, from the making of the data to the report
    repetitions: int  # at most
    small: int  # files of 2 KiB, 100 in a directory
    levels: int  # directories above a few files
    mutations: int  # files created, renamed, removed
    owned: int  # files of 2 KiB whose owner is changed
    listing: int  # empty files in one directory, of which names are asked
    flat: int  # the same, of which everything is asked
    inodes: int  # files for the memory figure
    big: int  # bytes of the file that is read and written in sequence
    first_writes: tuple[int, ...]  # MiB
    random_file: int  # bytes of the file that is read and written at random
    random_ios: int
    repository: int  # files in the git repository
    archive: int  # files in the tar archive
    sources: int  # C files
    branch_counts: tuple[int, ...]
    branch_names: int  # names looked up over many branches: so many, but no more than
    branch_lookups: int  # so many questions if each branch is asked for each name
    storm_seconds: float
    latency_samples: int


FULL = Scale(
    minutes=24.5,
    repetitions=5,
    small=20000,
    levels=400,
    mutations=5000,
    owned=5000,
    listing=100000,
    flat=20000,
    inodes=100000,
    big=1024 * MIB,
    first_writes=(1, 100, 1024),
    random_file=256 * MIB,
    random_ios=50000,
    repository=10000,
    archive=10000,
    sources=100,
    branch_counts=(2, 8, 32, 100, 500),
    branch_names=2000,
    branch_lookups=50000,
    storm_seconds=1.5,
    latency_samples=400,
)
QUICK = Scale(
    minutes=6.5,
    repetitions=3,
    small=4000,
    levels=400,
    mutations=1000,
    owned=500,
    listing=20000,
    flat=4000,
    inodes=20000,
    big=64 * MIB,
    first_writes=(1, 64),
    random_file=64 * MIB,
    random_ios=5000,
    repository=1500,
    archive=1500,
    sources=12,
    branch_counts=(2, 32, 500),
    branch_names=200,
    branch_lookups=20000,
    storm_seconds=1,
    latency_samples=50,
)
GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_AUTHOR_NAME": "bench",
    "GIT_AUTHOR_EMAIL": "bench@example.org",
    "GIT_COMMITTER_NAME": "bench",
    "GIT_COMMITTER_EMAIL": "bench@example.org",
    "GIT_OPTIONAL_LOCKS": "1",
}


def mount_image(image: Path, mnt: Path, size: int, make: list[str]) -> None:
    """Make a file system of so many bytes in a sparse file and mount it. Raises Failed, OSError."""
    mnt.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    process.run([*make, image], deadline=300)
    process.run(["mount", "-o", "loop", image, mnt], deadline=60)


class Data:
    """Generates the data and knows where it is. Attributes are paths; lists maps a list's name to its file."""

    def __init__(self, images: Path, scratch: Path, scale: Scale, client: Path) -> None:
        self.images = images  # where the loop devices' files go
        self.scratch = scratch
        self.scale = scale
        self.client = client
        self.lower = scratch / "data/lower"
        self.many = scratch / "data/many"
        self.repository = scratch / "data/repo"
        self.deep = "deep" + "/d" * (scale.levels - 1)  # a directory of the lower branch
        self.own = scratch / "data/own"  # what is read of a writable branch
        self.archive = scratch / "data/files.tar"
        self.loops: dict[str, Path] = {}  # file system -> where it is mounted
        self.loop_errors: dict[str, str] = {}
        self.lists: dict[str, Path] = {}
        self._random = random.Random(20240607)

    def generate(self) -> None:
        """Make everything but the loop devices. Raises Failed."""
        (self.scratch / "lists").mkdir(parents=True)
        self.lower.mkdir(parents=True)
        self._small()
        self._deep()
        self._flat("listing", self.scale.listing)
        self._flat("flat", self.scale.flat)
        self._tree(self.lower, "mem", "inodes", self.scale.inodes, 0)
        self._tree(self.lower, "owned", "owned", self.scale.owned, 2048)
        self.list_names("mutations", [f"w/new{i:06}" for i in range(self.scale.mutations)])
        self._big(self.lower, {*self.scale.first_writes, self.scale.big // MIB, self.scale.random_file // MIB})
        self._client("seqwrite", self.own, self.scale.big)
        self.list_names("own", [self.own.name])
        self._project()
        self._repository()
        self._archive()
        self._branches()

    def list_names(self, key: str, names: list[str]) -> Path:
        """Write a list of names for the client."""
        path = self.lists[key] = self.scratch / f"lists/{key}.txt"
        path.write_text("".join(f"{name}\n" for name in names))
        return path

    def _client(self, *argv: object) -> None:
        process.run([self.client, *map(str, argv)], deadline=600)

    def read(self, path: Path) -> None:
        """Read a branch's file, so that its data is in memory. Raises Failed."""
        self._client("seqread", path)

    def evict(self, root: Path, names: Path) -> None:
        """Drop the data of a branch's files from memory; they are on the disk already. Raises Failed."""
        self._client("evict", root, names)

    def _tree(self, root: Path, directory: str, key: str, count: int, size: int) -> list[str]:
        names = [f"{directory}/d{i // 100:04}/f{i:06}" for i in range(count)]
        for parent in sorted({name.rpartition("/")[0] for name in names}):
            (root / parent).mkdir(parents=True)
        self._client("create", root, self.list_names(key, names), size)
        return names

    def _deep(self) -> None:
        """A few files below many directories; the list has each of them many times."""
        directory = self.lower / self.deep
        directory.mkdir(parents=True)
        names = [f"f{i:02}" for i in range(20)]
        for name in names:
            (directory / name).touch()
        self.list_names("deep", names * 25)

    def _big(self, root: Path, sizes: Iterable[int]) -> None:
        (root / "big").mkdir(parents=True)
        for mib in sizes:
            self._client("seqwrite", root / f"big/{mib}M", mib * MIB)

    def _small(self) -> None:
        names = self._tree(self.lower, "small", "small", self.scale.small, 2048)
        shuffled = names.copy()
        self._random.shuffle(shuffled)
        self.list_names("small-shuffled", shuffled)

    def _flat(self, key: str, count: int) -> None:
        (self.lower / key).mkdir()
        self._client("create", self.lower, self.list_names(key, [f"{key}/name{i:06}" for i in range(count)]), 0)

    def _project(self) -> None:
        """A C project whose compiler looks into three include directories for every header."""
        project = self.lower / "proj"
        for name in ("src", "include/a", "include/b", "include/c"):
            (project / name).mkdir(parents=True)
        for i in range(30):
            text = f"#ifndef H{i}\n#define H{i}\nstatic inline int h{i}(int x) {{ return x * {i + 3}; }}\n#endif\n"
            (project / f"include/{'abc'[i % 3]}/h{i}.h").write_text(text)
        for i in range(self.scale.sources):
            used = self._random.sample(range(30), 12)
            includes = "".join(f"#include <h{j}.h>\n" for j in used)
            calls = " + ".join(f"h{j}(x)" for j in used)
            body = "".join(f"int f{i}_{k}(int x) {{ return {calls} + {k}; }}\n" for k in range(20))
            (project / f"src/file{i}.c").write_text(f"#include <stdio.h>\n{includes}{body}")
        (project / "src/main.c").write_text("int f0_0(int); int main(void) { return f0_0(0) ? 0 : 0; }\n")
        rules = (
            "CFLAGS = -O0 -Iinclude/a -Iinclude/b -Iinclude/c\n"
            "OBJECTS = $(patsubst src/%.c,obj/%.o,$(wildcard src/*.c))\n"
            "program: $(OBJECTS)\n\t$(CC) -o $@ $^\n"
            "obj/%.o: src/%.c | obj\n\t$(CC) $(CFLAGS) -c -o $@ $<\n"
            "obj:\n\tmkdir -p $@\n"
        )
        (project / "Makefile").write_text(rules)

    def _repository(self) -> None:
        """Two commits: branch "other" differs from "main" in a fifth of the files and lacks a twentieth."""
        environment = os.environ | GIT

        def git(*argv: str) -> None:
            process.run(["git", "-C", self.repository, *argv], deadline=300, env=environment)

        self.repository.mkdir()
        git("init", "-q", "-b", "main")
        git("config", "gc.auto", "0")
        paths = [self.repository / f"m{i % 40:02}/s{i % 7}/file{i:05}.txt" for i in range(self.scale.repository)]
        for i, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"file {i}\n" * self._random.randint(5, 300))
        git("add", ".")
        git("commit", "-q", "-m", "main")
        git("checkout", "-q", "-b", "other")
        for i, path in enumerate(paths):
            if i % 5 == 0:
                path.write_text(f"changed {i}\n" * 50)
            elif i % 20 == 1:
                path.unlink()
        git("commit", "-q", "-a", "-m", "other")
        git("checkout", "-q", "main")

    def _archive(self) -> None:
        with tarfile.open(self.archive, "w") as tar:
            for i in range(self.scale.archive):
                data = self._random.randbytes(self._random.randint(1, 8) * 1024)
                info = tarfile.TarInfo(f"untar/d{i // 50:03}/file{i:05}")
                info.size, info.mtime, info.mode = len(data), 1700000000, 0o644
                tar.addfile(info, BytesIO(data))

    def _branches(self) -> None:
        """Branches that all have the directory "dir" with names of their own; the last has the names asked for."""
        count = max(self.scale.branch_counts)
        for i in range(count):
            directory = self.many / f"b{i:03}/dir"
            directory.mkdir(parents=True)
            for j in range(5):
                (directory / f"own{i}_{j}").touch()
        last = self.many / "last/dir"
        last.mkdir(parents=True)
        names = [f"dir/name{i:05}" for i in range(self.scale.branch_names)]
        self._client("create", self.many / "last", self.list_names("branch-present", names), 0)
        for count in self.scale.branch_counts:
            asked = min(self.scale.branch_names, self.scale.branch_lookups // count)
            self.list_names(f"branch-present-{count}", names[:asked])
            self.list_names(f"branch-missing-{count}", [f"dir/none{i:05}" for i in range(asked)])
        self.list_names("branch-prime", [f"dir/prime{i:03}" for i in range(64)])

    def branch_set(self, count: int) -> tuple[Path, ...]:
        """Lower branches, highest first, so that with the writable one on top there are count."""
        return (*(self.many / f"b{i:03}" for i in range(count - 2)), self.many / "last")

    def mount_others(self, kinds: Iterable[str]) -> None:
        """Of xfs, btrfs (loop devices) and tmpfs those that are wanted, each with a lower branch; errors are kept in
        loop_errors for the table."""
        for kind in kinds:
            mnt = self.images / kind
            try:
                if kind == "tmpfs":
                    mnt.mkdir()
                    process.run(["mount", "-t", "tmpfs", "-o", "size=1g", "none", mnt], deadline=60)
                    self._tree(mnt / "lower", "small", "small", self.scale.small, 2048)
                else:
                    size = (max(self.scale.first_writes) * 3 + 1024) * MIB  # lower file, one copy, slack
                    mount_image(self.images / f"{kind}.img", mnt, size, MAKE[kind])
                    self._big(mnt / "lower", self.scale.first_writes)
            except (Failed, OSError) as error:
                self.loop_errors[kind] = str(error)
            else:
                self.loops[kind] = mnt

    def umount_others(self) -> None:
        for mnt in self.loops.values():
            subprocess.run(["umount", str(mnt)], check=False, timeout=120)
        self.loops.clear()
