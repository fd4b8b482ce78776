"""How long a direct change of a branch stays unseen through the mount (udba=notify; udba=reval to compare).

For each kind of change: make the mount (and so the kernel) know the old state, change the branch, note the time when
the change returned, then look through the mount until it shows. The figure is the time from the return to the start of
the first look that shows the change: 0 means the mount was never wrong. Idle, and beside a storm of other changes.

The looking is done by this module run as a child (``python -m tests.bench.latency MOUNT LOWER UPPER COUNT``), so that
the deadline of the benchmark holds for it too.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.bench import process
from tests.bench.session import Figure, Session
from tests.bench.workload import Workload

STORM_CHANGES = 3  # a file is created, written, removed; four events
STORM_RATE = 5000  # changes a second
GIVE_UP = 5.0  # seconds


@dataclass(frozen=True)
class Change:
    """before: makes the state on the branch that the mount is to know; act: the change; seen_before and seen_after:
    does the mount show the old, the new state?"""

    before: Callable[[str], object]
    act: Callable[[str], object]
    seen_before: Callable[[str], bool]
    seen_after: Callable[[str], bool]


def _size(path: str) -> int | None:
    """Size of a file, None where there is none."""
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return None


def _write(path: str, data: bytes, flags: int = os.O_CREAT | os.O_TRUNC) -> None:
    fd = os.open(path, os.O_WRONLY | flags, 0o644)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # "before" has not shown yet
        return b""
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)


def changes(mnt: str, lower: str, upper: str) -> dict[str, Change]:
    """Every kind of change, by name."""

    def one(name: str) -> None:
        _write(f"{lower}/{name}", b"1")

    def replace(name: str) -> None:
        _write(f"{lower}/{name}.new", b"22")
        os.rename(f"{lower}/{name}.new", f"{lower}/{name}")

    def gone(name: str) -> bool:
        return _size(f"{mnt}/{name}") is None

    def one_byte(name: str) -> bool:
        return _size(f"{mnt}/{name}") == 1

    def two_bytes(name: str) -> bool:
        return _size(f"{mnt}/{name}") == 2

    def mode(name: str) -> int:
        try:
            return os.lstat(f"{mnt}/{name}").st_mode & 0o777
        except FileNotFoundError:
            return 0

    return {
        "create": Change(lambda n: None, one, gone, one_byte),
        "mkdir": Change(lambda n: None, lambda n: os.mkdir(f"{lower}/{n}"), gone, lambda n: not gone(n)),
        "unlink": Change(one, lambda n: os.unlink(f"{lower}/{n}"), one_byte, gone),
        "rename": Change(
            one,
            lambda n: os.rename(f"{lower}/{n}", f"{lower}/{n}.to"),
            lambda n: one_byte(n) and gone(f"{n}.to"),
            lambda n: gone(n) and one_byte(f"{n}.to"),
        ),
        "replace": Change(one, replace, one_byte, two_bytes),
        "append": Change(one, lambda n: _write(f"{lower}/{n}", b"2", os.O_APPEND), one_byte, two_bytes),
        "content": Change(
            one,
            lambda n: _write(f"{lower}/{n}", b"2", 0),
            lambda n: _read(f"{mnt}/{n}") == b"1",
            lambda n: _read(f"{mnt}/{n}") == b"2",
        ),
        "chmod": Change(
            one,
            lambda n: os.chmod(f"{lower}/{n}", 0o600),
            lambda n: mode(n) == 0o644,
            lambda n: mode(n) == 0o600,
        ),
        "shadow": Change(one, lambda n: _write(f"{upper}/{n}", b"22"), one_byte, two_bytes),
        "whiteout": Change(one, lambda n: _write(f"{upper}/.wh.{n}", b""), one_byte, gone),
    }


KINDS = tuple(changes("", "", ""))


def wait_for(seen: Callable[[str], bool], name: str) -> int:
    """Look until it shows; returns when the look that showed it began (ns). Raises TimeoutError."""
    end = time.perf_counter_ns() + int(GIVE_UP * 1e9)
    while True:
        began = time.perf_counter_ns()
        if seen(name):
            return began
        if began > end:
            raise TimeoutError(f"{name}: not shown after {GIVE_UP:.0f} s")


def measure(change: Change, kind: str, count: int) -> list[float]:
    """Latencies in microseconds, sorted."""
    result = []
    for i in range(count):
        name = f"{kind}{i}"
        change.before(name)
        wait_for(change.seen_before, name)
        change.seen_before(name)  # once more: now the kernel has cached what it may cache
        change.act(name)
        returned = time.perf_counter_ns()
        result.append((wait_for(change.seen_after, name) - returned) / 1e3)
    return sorted(result)


def percentiles(values: list[float]) -> dict[str, float]:
    return {"p50": values[len(values) // 2], "p99": values[int(len(values) * 0.99)], "max": values[-1]}


def main(argv: list[str]) -> int:
    mnt, lower, upper, count = argv
    result = {kind: percentiles(measure(c, kind, int(count))) for kind, c in changes(mnt, lower, upper).items()}
    print(json.dumps(result))
    return 0


def figure_keys(storm: bool) -> list[str]:
    state = "storm" if storm else "idle"
    extra = [EVENT_PERIOD, OVERFLOWS] if storm else []
    return extra + [f"seen after {kind}, {state}, {part}" for kind in KINDS for part in ("p50", "p99", "max")]


EVENT_PERIOD = "time between two events, storm"
OVERFLOWS = "queue overflows, storm"


def _coherence(session: Session) -> dict[str, float]:
    """What the daemon says of its events."""
    mounts = json.loads(session.output(sys.executable, "-m", "udbad", "status", "--json"))["mounts"]
    found = next(mount for mount in mounts if mount["mount_point"] == str(session.root))
    return {key: found["process"]["coherence"][key] for key in ("events", "overflows")}


def _run(storm: bool) -> Callable[[Session], None]:
    """The lower branch belongs to the session alone."""
    state = "storm" if storm else "idle"

    def run(session: Session) -> None:
        lower, upper = session.place.lowers[0], session.place.upper
        shutil.rmtree(lower, ignore_errors=True)
        session.place.make()
        for branch in (lower, upper):
            for directory in ("quiet", "storm"):
                (branch / directory).mkdir(parents=True, exist_ok=True)
        session.mount()
        session.command("ls", session.root / "storm")  # the daemon has reason to watch it
        with contextlib.ExitStack() as stack:
            if storm:
                other = process.start(
                    [session.data.client, "changes", lower / "storm", str(STORM_RATE / STORM_CHANGES)]
                )
                stack.callback(other.wait)
                stack.callback(other.kill)
            paths = [branch / "quiet" for branch in (session.root, lower, upper)]
            count = str(session.scale.latency_samples)
            before, began = _coherence(session), time.monotonic()
            out = session.output(sys.executable, "-m", "tests.bench.latency", *paths, count)
            if storm:
                after = _coherence(session)
                events = after["events"] - before["events"]
                if events:  # udba=reval has none
                    session.record(EVENT_PERIOD, (time.monotonic() - began) / events * 1e6)
                session.record(OVERFLOWS, after["overflows"] - before["overflows"])
        for kind, values in json.loads(out).items():
            for part, value in values.items():
                session.record(f"seen after {kind}, {state}, {part}", value)

    return run


def _workload(storm: bool) -> Workload:
    keys = (Figure(key, "" if key == OVERFLOWS else "us", compare=False) for key in figure_keys(storm))
    return Workload(
        "latency-storm" if storm else "latency-idle",
        _run(storm),
        tuple(keys),
        systems=("udbad-reval", "udbad-notify"),
        once=True,
        lowers=lambda data, base, name: (base / f"lat-{name}",),
    )


def workloads() -> list[Workload]:
    """Those of this module, in the order of the table."""
    return [_workload(storm=False), _workload(storm=True)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
