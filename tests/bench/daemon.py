"""Workloads that ask what a daemon costs: CPU time of a request, memory, start-up, metrics.

May not touch a mount point itself (clients do).
"""

import time
import urllib.request

from tests.bench import process
from tests.bench.data import MIB
from tests.bench.session import Session
from tests.bench.systems import METERED, METRICS_ADDRESS, MORTAL, SURVIVING, UDBAD, UNMETERED, System
from tests.bench.workload import FUSE, Workload, figures

REQUESTS = ("LOOKUP", "GETATTR", "readdir entry", "open+close", "READ", "create+write", "chmod")
METRICS_ROUNDS = 6
SURVIVE_ROUNDS = 5
WARM_PASSES = 24
LATER_SECONDS = 7.0
"""After which a mount process of udbad, and its guardian, have imported what they did not need at once."""


def _requests(session: Session) -> None:
    lists = session.data.lists
    session.mount(level=2)
    big = session.data.lower / f"big/{session.scale.big // MIB}M"
    steps: dict[str, tuple[object, ...]] = {
        "LOOKUP": ("stat", session.root, lists["small"], "present"),
        "GETATTR": ("getattr", session.root, lists["small"]),
        "readdir entry": ("readdir", session.root / "listing", session.scale.listing),
        "open+close": ("open", session.root, lists["small"]),
        "READ": ("random", session.root / "big" / big.name, session.scale.random_ios // 5, "read"),
        "create+write": ("create", session.root, lists["mutations"], 1024),
        "chmod": ("chmod", session.root, lists["mutations"], "600"),
    }
    session.data.read(big)
    session.command("mkdir", session.root / "w")
    for name, argv in steps.items():
        before = process.cpu_seconds(session.daemon())
        got = session.client(*argv)
        used = process.cpu_seconds(session.daemon()) - before
        session.record(f"{name}, time", got["seconds"] / got["count"] * 1e6)
        session.record(f"{name}, daemon CPU", used / got["count"] * 1e6)


def _memory(session: Session) -> None:
    names = session.data.lists["inodes"]
    session.mount(level=2)
    session.command("stat", session.root)
    if session.system.kind == "udbad":
        time.sleep(LATER_SECONDS)
    session.record("memory at start", process.pss_bytes(session.daemon()) / MIB)
    before = process.rss_bytes(session.daemon())
    session.client("stat", session.root, names, "present")
    nodes = session.scale.inodes + session.scale.inodes // 100
    session.record("memory per cached inode", max(0, process.rss_bytes(session.daemon()) - before) / nodes)


def _start(session: Session) -> None:
    """As people type it: the command is back when the mount serves."""
    session.record("mount to serving", session.mount_in_background() * 1e3)
    session.umount()
    if session.system.kind == "udbad":
        session.record("udbad --help", session.command(*UDBAD, "--help") * 1e3)


def _metrics(session: Session) -> None:
    """Cold lookups with and without counters, in turn; the endpoint is served but not asked meanwhile.

    The fastest of each: what others do on the machine only adds, and by more than is looked for here.
    """
    names = session.data.lists["small-shuffled"]
    taken: dict[System, list[float]] = {METERED: [], UNMETERED: []}
    for turn in range(METRICS_ROUNDS):
        for system in (METERED, UNMETERED) if turn % 2 else (UNMETERED, METERED):
            session.mount(level=2, variant=system)
            taken[system].append(session.per_operation("stat", session.root, names, "present"))
    session.record("stat cold, metrics on / off", min(taken[METERED]) / min(taken[UNMETERED]))
    session.mount(level=2, variant=METERED)
    session.client("stat", session.root, names, "present")
    url = f"http://{METRICS_ADDRESS}/metrics"
    before = process.cpu_seconds(session.daemon())
    for _ in range(METRICS_ROUNDS):
        with urllib.request.urlopen(url, timeout=10) as answer:
            answer.read()
    used = process.cpu_seconds(session.daemon()) - before
    session.record("a scrape, daemon CPU", used / METRICS_ROUNDS * 1e3)


def _survive(session: Session) -> None:
    """A mount that outlives its process, and the same without, in turn; the fastest of each, as above."""
    names = session.data.lists["mutations"]
    warm: dict[System, list[float]] = {SURVIVING: [], MORTAL: []}
    changed: dict[System, list[float]] = {SURVIVING: [], MORTAL: []}
    for turn in range(SURVIVE_ROUNDS):
        for system in (SURVIVING, MORTAL) if turn % 2 else (MORTAL, SURVIVING):
            session.mount(level=2, variant=system)
            session.command("mkdir", session.root / "w")
            taken = session.per_operation("create", session.root, names, 0)
            for _ in range(WARM_PASSES):
                warm[system].append(session.per_operation("stat", session.root, names, "present"))
            taken += session.per_operation("rename", session.root, names)
            taken += session.per_operation("unlink", session.root, names, ".r")
            changed[system].append(taken)
            session.command("rmdir", session.root / "w")
    session.record("stat warm, survive on / off", min(warm[SURVIVING]) / min(warm[MORTAL]))
    session.record("create, rename, unlink, survive on / off", min(changed[SURVIVING]) / min(changed[MORTAL]))


def workloads() -> list[Workload]:
    """Those of this module, in the order of the table."""
    requests = figures("us", *(f"{name}, {what}" for what in ("daemon CPU", "time") for name in REQUESTS))
    memory = (*figures("MiB", "memory at start"), *figures("B", "memory per cached inode"))
    metrics = (
        *figures("x", "stat cold, metrics on / off", compare=False),
        *figures("ms", "a scrape, daemon CPU", compare=False),
    )
    survive = figures("x", "stat warm, survive on / off", "create, rename, unlink, survive on / off", compare=False)
    return [
        Workload("requests", _requests, requests, kinds=FUSE),
        Workload("memory", _memory, memory, kinds=FUSE, once=True),
        Workload("start", _start, figures("ms", "mount to serving", "udbad --help"), kinds=("kernel", *FUSE)),
        Workload("metrics", _metrics, metrics, systems=("udbad-notify",), once=True),
        Workload("survive", _survive, survive, systems=("udbad-notify",), once=True),
    ]
