"""How long a direct change on a file server takes to be seen through a mount that is told of it, by NATS and by Redis.

    unshare -m python -m tests.bench.hosts [SAMPLES]     as root; prints a table

All are processes of one machine: what a network adds is not in the figures. The branch is an sshfs that caches nothing.
A name that is not there is looked up in the mount, which the kernel answers alone while the branch is believed, until a
file that is made on the server shows. "Busy" are 5,000 changes a second in another directory of the server, half of
them new names and half of them deletions.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.bus import bus_server, sshfs
from tests.helpers.mount import mounted
from udbad.hosts.bus import BusSettings
from udbad.hosts.link import MountLink
from udbad.hosts.serving import Watched
from udbad.hosts.subscriber import Following, Subscriber

SECONDS = 30.0
RATE = 5000
BOUND = 10.0
_IN_STEP = 50


def publish(url: str, export: str) -> None:
    asyncio.run(Watched(BusSettings((url,)), "share", "server", export, "inotify").run())


def subscribe(url: str, branch: str, control: str) -> None:
    following = Following("share", branch, BOUND, settle=0.0)
    asyncio.run(Subscriber(BusSettings((url,)), following, MountLink("", "m", branch, control)).run())


def storm(directory: str, count: Any) -> None:
    """RATE changes a second, as far as that goes. count: of those made so far."""
    place = Path(directory)
    begun = time.monotonic()
    while True:
        for _ in range(_IN_STEP):
            number = count.value // 2
            (place / str(number)).touch()
            if number >= 100:
                (place / str(number - 100)).unlink()
            count.value += 2
        time.sleep(max(begun + count.value / RATE - time.monotonic(), 0.0))


@contextmanager
def running(function: Any, *arguments: object) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments, daemon=True)
    process.start()
    try:
        yield
        assert process.is_alive(), f"{function.__name__} has ended"
    finally:
        process.kill()
        process.join()


def is_believed(mount: Any) -> bool:
    states: list[tuple[tuple[str, str], float]] = mount.control({"op": "metrics"})["metrics"]["udbad_coherence_state"]
    return sum(value for (_, state), value in states if state == "healthy") == 2


def measure(export: Path, mount: Any, samples: int) -> str:
    """p50 and p99 in milliseconds, and in how many percent the branch was believed: else the mount has looked."""
    found = []
    believed = 0
    seen = mount.path / "d"
    for number in range(samples):
        name = f"sample{number}"
        assert not (seen / name).exists()
        believed += is_believed(mount)
        begun = time.monotonic()
        (export / name).touch()
        while not (seen / name).exists():
            assert time.monotonic() < begun + SECONDS, "not seen"
            time.sleep(0.0002)
        found.append((time.monotonic() - begun) * 1000)
        (export / name).unlink()
        time.sleep(0.01)
    return (
        f"{statistics.median(found):6.1f} {statistics.quantiles(found, n=100)[98]:6.1f} {100 * believed / samples:8.0f}"
    )


def wait_for_lease(mount: Any) -> None:
    end = time.monotonic() + SECONDS
    while not is_believed(mount):
        assert time.monotonic() < end, "the branch is not believed"
        time.sleep(0.05)


def main(samples: int) -> None:
    print("bus    idle: p50 p99 ms believed %  busy: p50 p99 ms believed %  changes/s")
    for kind in ("nats", "redis"):
        with tempfile.TemporaryDirectory(prefix="udbad-hosts-") as scratch:
            root = Path(scratch)
            for name in ("export/d", "export/storm", "top"):
                (root / name).mkdir(parents=True)
            with (
                bus_server(kind, root / "bus") as server,
                sshfs(root / "export", root / "far") as far,
                mounted([f"{root / 'top'}=rw", f"{far}=ro"], root / "mnt", "notify", "", allow_log=".*") as mount,
                running(publish, server.url, str(root / "export")),
                running(subscribe, server.url, str(far), str(mount.control_path)),
            ):
                wait_for_lease(mount)
                idle = measure(root / "export/d", mount, samples)
                count = multiprocessing.get_context("spawn").Value("q", 0)
                with running(storm, str(root / "export/storm"), count):
                    time.sleep(2.0)
                    before, begun = count.value, time.monotonic()
                    busy = measure(root / "export/d", mount, samples)
                    rate = (count.value - before) / (time.monotonic() - begun)
                wait_for_lease(mount)
            print(f"{kind:6}     {idle}           {busy}      {rate:6.0f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
