"""What a branch that does not answer costs the other four: `python -m tests.bench.hung` (as root).

Two mounts of five branches each, side by side: of one the fifth branch is a local directory as the others are, of the
other it is a file system that has stopped, and `branch_timeout` has passed. The same operations on the other four
branches of either, in turns, so that whatever else the machine does meets both. Figures: microseconds an operation,
median and 99th percentile.

That nothing waits is shown by a test that counts (tests/t5_daemon/test_hung.py); this is for how long it takes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import perf_counter_ns, sleep
from typing import TypeVar

from tests.helpers.mount import Mount
from tests.helpers.offline import number_of, offline
from tests.helpers.stalling import stalling

LAYERS = ("a", "b", "hung", "c", "d")
ROUNDS = 60
FILES = 10
Took = dict[str, list[int]]
Fifth = TypeVar("Fifth")


@contextmanager
def _local(directory: Path, mount_point: Path) -> Iterator[None]:
    mount_point.mkdir()
    yield


@contextmanager
def _union(
    directory: Path, fifth: Callable[[Path, Path], AbstractContextManager[Fifth]]
) -> Iterator[tuple[Mount, Fifth]]:
    """fifth: makes the branch from its directory, on a mount point."""
    for name in ("a", "b", "real", "c/apart", "d/apart"):
        (directory / name).mkdir(parents=True)
    for number in range(FILES):
        (directory / f"c/apart/old{number}").write_text("old")
    with fifth(directory / "real", directory / "hung") as server:
        branches = [f"{directory / name}=rw" for name in LAYERS]
        mount = Mount(branches, directory / "mnt", "notify", "survive=on,branch_timeout=1,create=rr")
        try:
            mount.start()
            os.stat(mount.path / "apart")
            yield mount, server
        finally:
            mount.unmount()
            mount.destroy()


def timed(took: Took, name: str, call: Callable[..., object], *arguments: object) -> None:
    begun = perf_counter_ns()
    call(*arguments)
    took[name].append(perf_counter_ns() - begun)


def _round(apart: Path, took: Took) -> None:
    for number in range(FILES):
        old, new, moved = (apart / f"{name}{number}" for name in ("old", "new", "moved"))
        timed(took, "read", old.read_bytes)
        timed(took, "create", new.write_bytes, b"new")
        timed(took, "chmod", os.chmod, new, 0o600)
        timed(took, "rename", os.rename, new, moved)
        timed(took, "unlink", os.unlink, moved)
        timed(took, "mkdir", os.mkdir, new)
        timed(took, "rmdir", os.rmdir, new)
    timed(took, "readdir", os.listdir, apart)


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[int(len(values) * part)] / 1000


def main() -> int:
    with (
        tempfile.TemporaryDirectory(prefix="udbad-hung-") as directory,
        _union(Path(directory) / "1", _local) as (whole, _),
        _union(Path(directory) / "2", stalling) as (lacking, server),
    ):
        kept = os.open(lacking.path / "apart", os.O_PATH)  # the kernel does not forget it
        server.stall()
        number_of(os.stat, lacking.path / "new")
        while offline(lacking) != [str(Path(directory) / "2/hung")]:
            sleep(0.1)
        took: dict[str, Took] = {"all answer": defaultdict(list), "one does not": defaultdict(list)}
        for _ in range(ROUNDS):
            for mount, each in zip((whole, lacking), took.values(), strict=True):
                _round(mount.path / "apart", each)
        os.close(kept)
        server.go_on()
    print(f"{'':10}" + "".join(f"{name:>24}" for name in took))
    for name in took["all answer"]:
        figures = [(percentile(each[name], 0.5), percentile(each[name], 0.99)) for each in took.values()]
        print(f"{name:10}" + "".join(f"{median:12.0f}{worst:12.0f}" for median, worst in figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
