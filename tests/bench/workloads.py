"""The workloads: what is done, in which state of the caches, and which figures come out.

A workload is one entry of all_workloads: adding one is a function and an entry. May not touch a mount point itself
(clients do). Cold metadata: freshly mounted, then drop_caches 2 (dentries and inodes; disk blocks stay in memory, so
the disk is not what is measured). Cold data: freshly mounted, then drop_caches 3. Warm: the same once more.
"""

import json
import shutil
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench import latency, process
from tests.bench.data import MIB, Data, Scale
from tests.bench.process import Failed
from tests.bench.session import Figure, Session
from tests.bench.systems import METERED, METRICS_ADDRESS, UNMETERED, Kind, System

ALL: tuple[Kind, ...] = ("native", "kernel", "peer", "udbad")
DAEMONS: tuple[Kind, ...] = ("peer", "udbad")


@dataclass(frozen=True)
class Workload:
    """kinds: the systems it makes sense for. lowers: the branches, given the data, the base directory and the system's
    name; base: where a session's own directories go. copies: directories it writes into that native gets as a copy."""

    name: str
    run: Callable[[Session], None]
    figures: tuple[Figure, ...]
    deadline: float = 120.0  # seconds, for each client run
    kinds: tuple[Kind, ...] = ALL
    systems: tuple[str, ...] | None = None
    copies: tuple[str, ...] = ()
    lowers: Callable[[Data, Path, str], tuple[Path, ...]] = lambda data, base, name: (data.lower,)
    file_system: str | None = None  # a loop device instead of the scratch directory


def _stat(session: Session) -> None:
    names = session.data.lists["small"]
    shuffled = session.data.lists["small-shuffled"]
    session.mount(level=2)
    session.record("stat cold, shuffled", session.per_operation("stat", session.root, shuffled, "present"))
    session.mount(level=2)
    session.record("stat cold, in order", session.per_operation("stat", session.root, names, "present"))
    session.record("stat warm", session.per_operation("stat", session.root, names, "present"))


def _find(session: Session) -> None:
    session.mount(level=2)
    argv = ("find", session.root / "small", "-size", "+100000k")
    session.record("find cold", session.command(*argv) * 1e3)
    session.record("find warm", session.command(*argv) * 1e3)


def _small_read(session: Session) -> None:
    names = session.data.lists["small"]
    session.mount(level=3)
    session.record("read small cold", session.per_operation("read", session.root, names))
    session.record("read small warm", session.per_operation("read", session.root, names))


def _mutate(session: Session) -> None:
    names = session.data.lists["mutations"]
    session.mount()
    session.command("mkdir", session.root / "w")
    session.record("create", session.per_operation("create", session.root, names, 0))
    session.record("rename", session.per_operation("rename", session.root, names))
    session.record("unlink", session.per_operation("unlink", session.root, names, ".r"))


def _sequential_write(session: Session) -> None:
    session.mount()
    for key in ("sequential write, new file", "sequential write, over it"):
        session.record(key, session.client("seqwrite", session.root / "written", session.scale.big)["seconds"] * 1e3)


def _sequential_read(session: Session) -> None:
    session.mount(level=3)
    path = session.root / f"big/{session.scale.big // MIB}M"
    for key in ("sequential read cold", "sequential read warm"):
        session.record(key, session.client("seqread", path)["seconds"] * 1e3)


def _fio(session: Session, path: Path, mode: str) -> float:
    """Microseconds for one 4 KiB operation; fio where it is installed, else the client's own loop."""
    count = session.scale.random_ios
    if shutil.which("fio") is None:
        return session.per_operation("random", path, count, mode)
    out = session.output(
        "fio",
        "--name=bench",
        f"--filename={path}",
        f"--rw=rand{mode}",
        "--bs=4k",
        "--ioengine=psync",
        "--invalidate=0",  # the cold side is made by drop_caches, the same for all
        "--norandommap",
        "--allow_file_create=0",
        f"--number_ios={count}",
        f"--io_size={count * 4096}",
        "--output-format=json",
    )
    job = json.loads(out[out.index("{") :])["jobs"][0]
    return float(job[mode]["lat_ns"]["mean"]) / 1e3


def _random(session: Session) -> None:
    name = f"big/{session.scale.big // MIB}M"
    session.place.make()
    shutil.copyfile(session.data.lower / name, session.place.upper / "random")
    session.mount(level=3)
    # Pages of the branch file in memory, none of the mount's own: the cost of asking, not of the disk.
    process.run([session.data.client, "seqread", session.data.lower / name], deadline=600)
    session.record("random read 4K", _fio(session, session.root / name, "read"))
    session.record("random write 4K", _fio(session, session.root / "random", "write"))


def _git(session: Session) -> None:
    session.place.make()
    process.run(["cp", "-a", session.data.repository, session.place.upper / "git"], deadline=600)
    session.mount()
    git = ("git", "-C", session.root / "git")
    session.command(*git, "status", "--short")  # fills the index with the inode numbers this system shows
    session.drop(2)
    session.record("git status cold", session.command(*git, "status", "--short") * 1e3)
    session.record("git status warm", session.command(*git, "status", "--short") * 1e3)
    session.drop(2)
    session.record("git checkout cold", session.command(*git, "checkout", "-q", "other") * 1e3)
    session.record("git checkout warm", session.command(*git, "checkout", "-q", "main") * 1e3)


def _untar(session: Session) -> None:
    session.mount()
    seconds = session.command("tar", "-xf", session.data.archive, "-C", session.root)
    session.record("untar", seconds * 1e3)


def _make(session: Session) -> None:
    session.mount(level=2)
    session.record("make -j2", session.command("make", "-s", "-j2", "-C", session.root / "proj") * 1e3)


def _first_write_key(file_system: str, mib: int) -> str:
    return f"first write {mib} MiB, {file_system}"


def _check_copied(session: Session, mib: int) -> None:
    """Raise Failed when a first write did not copy the file up (mergerfs writes into the lower branch, whatever its
    mode): its time would be compared with that of a copy."""
    if not (session.place.upper / f"big/{mib}M").exists():
        raise Failed("wrote into the lower branch, copied nothing up")


def _first_write(file_system: str) -> Callable[[Session], None]:
    def run(session: Session) -> None:
        lower = session.place.lowers[-1]
        for mib in session.scale.first_writes:
            session.mount()
            process.run([session.data.client, "seqread", lower / f"big/{mib}M"], deadline=600)  # source in memory
            if session.system.kind == "native":  # what a person would do instead: cp, then write
                copy = session.place.upper / "copy"
                seconds = session.command("cp", lower / f"big/{mib}M", copy)
                seconds += session.client("firstwrite", copy)["seconds"]
                copy.unlink()
            else:
                seconds = session.client("firstwrite", session.root / f"big/{mib}M")["seconds"]
                _check_copied(session, mib)
            session.record(_first_write_key(file_system, mib), seconds * 1e3)
            session.umount()
            session.place.wipe()  # before the kernel writes the copy to the disk

    return run


def _branches(count: int) -> Callable[[Session], None]:
    def run(session: Session) -> None:
        lists = session.data.lists
        for key in ("present", "missing"):
            session.mount(level=2)
            session.client("stat", session.root, lists["branch-prime"], "missing")  # the directory is known now
            value = session.per_operation("stat", session.root, lists[f"branch-{key}"], key)
            session.record(f"lookup {key}, {count} branches", value)

    return run


def _readdir(session: Session) -> None:
    session.mount(level=2)
    argv = ("readdir", session.root / "listing", session.scale.listing)
    session.record("readdir cold", session.client(*argv)["seconds"] * 1e3)
    session.record("readdir warm", session.client(*argv)["seconds"] * 1e3)


def _clients(count: int) -> Callable[[Session], None]:
    def run(session: Session) -> None:
        session.mount()
        names = session.data.lists["small"]
        got = session.client("storm", session.root, names, count, session.scale.storm_seconds)
        session.record(f"{count} clients, per operation", got["seconds"] / got["count"] * 1e6)
        session.record(f"{count} clients, p99 of the slowest / median", got["slowest_p99"] / got["p50"])
        session.record(f"{count} clients, worst / median", got["worst"] / got["p50"])

    return run


def _beside(session: Session) -> None:
    session.mount()
    storm = ("storm", session.root, session.data.lists["small"], 4, session.scale.storm_seconds)
    mib = max(session.scale.first_writes)
    name = f"big/{mib}M"
    process.run([session.data.client, "seqread", session.data.lower / name], deadline=600)
    alone = session.client(*storm)["p99"]
    session.record("4 clients, p99", alone)
    if session.system.kind == "native":
        copy: tuple[str | Path, ...] = ("cp", session.data.lower / name, session.place.upper / "copy")
    else:
        copy = (session.data.client, "firstwrite", session.root / name)
    beside = session.client(*storm, *copy)["p99"]
    if session.system.kind != "native":
        _check_copied(session, mib)
    session.record("p99 beside a copy-up / alone", beside / alone)


def _memory(session: Session) -> None:
    names = session.data.lists["inodes"]
    session.mount(level=2)
    session.command("stat", session.root)
    before = process.rss_bytes(session.daemon())
    session.record("RSS at start", before / MIB)
    session.client("stat", session.root, names, "present")
    nodes = session.scale.inodes + session.scale.inodes // 100
    session.record("memory per cached inode", max(0, process.rss_bytes(session.daemon()) - before) / nodes)


REQUESTS = ("LOOKUP", "GETATTR", "readdir entry", "open+close", "READ")


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
    }
    process.run([session.data.client, "seqread", big], deadline=600)
    for name, argv in steps.items():
        before = process.cpu_seconds(session.daemon())
        got = session.client(*argv)
        used = process.cpu_seconds(session.daemon()) - before
        session.record(f"{name}, time", got["seconds"] / got["count"] * 1e6)
        session.record(f"{name}, daemon CPU", used / got["count"] * 1e6)


METRICS_ROUNDS = 8


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


def _figures(unit: str, *keys: str) -> tuple[Figure, ...]:
    return tuple(Figure(key, unit) for key in keys)


def _first_write_workload(kind: str, scale: Scale) -> Workload:
    keys = [_first_write_key(kind, mib) for mib in scale.first_writes]
    if kind == "ext4":
        return Workload("firstwrite-ext4", _first_write(kind), _figures("ms", *keys))
    return Workload(
        f"firstwrite-{kind}",
        _first_write(kind),
        _figures("ms", *keys),
        lowers=lambda data, base, name: (base / "lower",),
        file_system=kind,
    )


def _branch_workload(count: int) -> Workload:
    keys = (f"lookup present, {count} branches", f"lookup missing, {count} branches")
    return Workload(
        f"branches-{count}",
        _branches(count),
        _figures("us", *keys),
        kinds=("kernel", "peer", "udbad"),
        lowers=lambda data, base, name: data.branch_set(count),
    )


def _clients_workload(count: int) -> Workload:
    figures = (
        Figure(f"{count} clients, per operation", "us"),
        Figure(f"{count} clients, p99 of the slowest / median", "x", compare=False),
        Figure(f"{count} clients, worst / median", "x", compare=False),
    )
    return Workload(f"clients-{count}", _clients(count), figures)


def _latency_workload(storm: bool) -> Workload:
    figures = (
        Figure(key, "" if key == latency.OVERFLOWS else "us", compare=False) for key in latency.figure_keys(storm)
    )
    return Workload(
        "latency-storm" if storm else "latency-idle",
        latency.workload(storm),
        tuple(figures),
        systems=("udbad-reval", "udbad-notify"),
        lowers=lambda data, base, name: (base / f"lat-{name}",),
    )


def all_workloads(scale: Scale) -> list[Workload]:
    """Every workload, in the order of the table."""
    requests = tuple(Figure(f"{name}, {what}", "us") for name in REQUESTS for what in ("time", "daemon CPU"))
    return [
        Workload("stat", _stat, _figures("us", "stat cold, shuffled", "stat cold, in order", "stat warm")),
        Workload("find", _find, _figures("ms", "find cold", "find warm")),
        Workload("smallread", _small_read, _figures("us", "read small cold", "read small warm")),
        Workload("mutate", _mutate, _figures("us", "create", "rename", "unlink")),
        Workload(
            "seqwrite", _sequential_write, _figures("ms", "sequential write, new file", "sequential write, over it")
        ),
        Workload("seqread", _sequential_read, _figures("ms", "sequential read cold", "sequential read warm")),
        Workload("random", _random, _figures("us", "random read 4K", "random write 4K")),
        Workload(
            "git",
            _git,
            _figures("ms", "git status cold", "git status warm", "git checkout cold", "git checkout warm"),
        ),
        Workload("untar", _untar, _figures("ms", "untar")),
        Workload("make", _make, _figures("ms", "make -j2"), copies=("proj",)),
        *(_first_write_workload(kind, scale) for kind in ("ext4", "xfs", "btrfs")),
        *(_branch_workload(count) for count in scale.branch_counts),
        Workload("readdir", _readdir, _figures("ms", "readdir cold", "readdir warm")),
        *(_clients_workload(count) for count in (1, 4, 16)),
        Workload(
            "beside",
            _beside,
            (Figure("4 clients, p99", "us"), Figure("p99 beside a copy-up / alone", "x", compare=False)),
        ),
        Workload(
            "memory",
            _memory,
            (Figure("RSS at start", "MiB"), Figure("memory per cached inode", "B")),
            kinds=DAEMONS,
        ),
        Workload("requests", _requests, requests, kinds=DAEMONS),
        Workload(
            "metrics",
            _metrics,
            (
                Figure("stat cold, metrics on / off", "x", compare=False),
                Figure("a scrape, daemon CPU", "ms", compare=False),
            ),
            systems=("udbad-notify",),
        ),
        _latency_workload(storm=False),
        _latency_workload(storm=True),
    ]


def check_name(name: str, known: list[str]) -> str:
    """A name of a workload or system given on the command line. Raises Failed."""
    if name not in known:
        raise Failed(f"{name}: not one of {', '.join(known)}")
    return name
