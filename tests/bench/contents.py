"""Workloads that read and write the data of files.

May not touch a mount point itself (clients do). "From the disk": the pages of the files read are not in memory
(Data.evict) and the mount is new; nothing else is thrown out of memory, programs least of all.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.bench import fusetrace
from tests.bench.data import MIB, Scale
from tests.bench.session import Figure, Session
from tests.bench.workload import Workload, figures, lower_beside

RANDOM_SECONDS = 1
"""How long fio reads or writes at random."""


def _small_read(session: Session) -> None:
    names = session.data.lists["small"]
    session.data.evict(session.place.lowers[-1], names)
    session.mount(level=2)
    session.record("read small cold", session.per_operation("read", session.root, names))
    if session.mounted is None or session.mounted.minor is None:
        session.record("read small warm", session.per_operation("read", session.root, names))
        return
    with fusetrace.requests(session.mounted.minor) as sent:
        session.record("read small warm", session.per_operation("read", session.root, names))
        if sent is not None:
            session.record("requests for a file, warm", sent() / session.scale.small)


def _small_read_tmpfs(session: Session) -> None:
    """No pages to drop: that is where the data is."""
    session.mount(level=2)
    value = session.per_operation("read", session.root, session.data.lists["small"])
    session.record("read small cold, tmpfs", value)


def _sequential_write(session: Session) -> None:
    session.mount()
    for key in ("sequential write, new file", "sequential write, over it"):
        session.record(key, session.client("seqwrite", session.root / "written", session.scale.big)["seconds"] * 1e3)


def _sequential_read(session: Session) -> None:
    data = session.data
    data.evict(data.own.parent, data.lists["own"])
    session.place.make()
    os.link(data.own, session.place.upper / "own")  # not a copy: that would not be on the disk yet
    session.mount(level=2)
    for key in ("sequential read cold", "sequential read warm"):
        session.record(key, session.client("seqread", session.root / "own")["seconds"] * 1e3)


def _fio(session: Session, path: Path, mode: str) -> float:
    """Microseconds for one 4 KiB operation; fio where it is installed, else the client's own loop."""
    if shutil.which("fio") is None:
        return session.per_operation("random", path, session.scale.random_ios, mode)
    out = session.output(
        "fio",
        "--name=bench",
        f"--filename={path}",
        f"--rw=rand{mode}",
        "--bs=4k",
        "--ioengine=psync",
        "--invalidate=0",  # whether pages are in memory is the workload's business, the same for all
        "--norandommap",
        "--allow_file_create=0",
        # So long, not so many: of accesses that take a microsecond there have to be many, of a hundred there need not.
        "--time_based",
        f"--runtime={RANDOM_SECONDS}",
        "--output-format=json",
    )
    job = json.loads(out[out.index("{") :])["jobs"][0]
    return float(job[mode]["lat_ns"]["mean"]) / 1e3


def _random(session: Session) -> None:
    name = f"big/{session.scale.random_file // MIB}M"
    session.place.make()
    shutil.copyfile(session.data.lower / name, session.place.upper / "random")
    session.mount(level=2)
    # Pages of the branch's file are in memory, the mount has none: the cost of asking, not of the disk.
    session.record("random read 4K", _fio(session, session.root / "random", "read"))
    session.record("random write 4K", _fio(session, session.root / "random", "write"))


def _first_write_key(file_system: str, mib: int) -> str:
    return f"first write {mib} MiB, {file_system}"


def _first_write(file_system: str) -> Callable[[Session], None]:
    def run(session: Session) -> None:
        lower = session.place.lowers[-1]
        session.mount()
        for mib in session.scale.first_writes:
            session.data.read(lower / f"big/{mib}M")  # source in memory
            if session.system.kind == "native":  # what a person would do instead: cp, then write
                copy = session.place.upper / f"copy{mib}"
                seconds = session.command("cp", lower / f"big/{mib}M", copy)
                seconds += session.client("firstwrite", copy)["seconds"]
            else:
                seconds = session.client("firstwrite", session.root / f"big/{mib}M")["seconds"]
                session.check_copied_up(f"big/{mib}M")
            session.record(_first_write_key(file_system, mib), seconds * 1e3)

    return run


def _copy(session: Session) -> None:
    """cp of a lower file to a new name, both in the mount, on a file system that can share extents."""
    mib = max(session.scale.first_writes)
    session.data.read(session.place.lowers[-1] / f"big/{mib}M")
    session.mount()
    seconds = session.command("cp", session.root / f"big/{mib}M", session.root / "copy")
    session.record(copy_key(session.scale), seconds * 1e3)


def copy_key(scale: Scale) -> str:
    return f"cp {max(scale.first_writes)} MiB inside, btrfs"


def _clients(count: int) -> Callable[[Session], None]:
    def run(session: Session) -> None:
        session.mount()
        names = session.data.lists["small"]
        got = session.client("storm", session.root, names, count, session.scale.storm_seconds)
        session.record(f"{count} clients, per operation", got["seconds"] / got["count"] * 1e6)
        session.record(f"{count} clients, p99 of the slowest / median", got["slowest_p99"] / got["p50"])
        session.record(f"{count} clients, p99.9 / median", got["p99_9"] / got["p50"])
        session.record(f"{count} clients, worst / median", got["worst"] / got["p50"])

    return run


def _beside(session: Session) -> None:
    session.mount()
    storm = ("storm", session.root, session.data.lists["small"], 4, session.scale.storm_seconds)
    mib = max(session.scale.first_writes)
    name = f"big/{mib}M"
    session.data.read(session.data.lower / name)
    alone = session.client(*storm)["p99"]
    session.record("4 clients, p99", alone)
    if session.system.kind == "native":
        copy: tuple[str | Path, ...] = ("cp", session.data.lower / name, session.place.upper / "copy")
    else:
        copy = (session.data.client, "firstwrite", session.root / name)
    beside = session.client(*storm, *copy)["p99"]
    if session.system.kind != "native":
        session.check_copied_up(name)
    session.record("p99 beside a copy-up / alone", beside / alone)


def _first_write_workload(kind: str, scale: Scale) -> Workload:
    keys = figures("ms", *(_first_write_key(kind, mib) for mib in scale.first_writes))
    if kind == "ext4":
        return Workload("firstwrite-ext4", _first_write(kind), keys)
    return Workload(f"firstwrite-{kind}", _first_write(kind), keys, lowers=lower_beside, file_system=kind)


def _clients_workload(count: int) -> Workload:
    keys = (
        *figures("us", f"{count} clients, per operation"),
        *figures("x", f"{count} clients, p99 of the slowest / median", compare=False),
        *figures("x", f"{count} clients, p99.9 / median", compare=False),
        *figures("x", f"{count} clients, worst / median", compare=False),
    )
    return Workload(f"clients-{count}", _clients(count), keys, io=count > 4, once=count <= 4)


def workloads(scale: Scale) -> list[Workload]:
    """Those of this module, in the order of the table."""
    small = (*figures("us", "read small cold", "read small warm"), Figure("requests for a file, warm", "", False))
    written = ("sequential write, new file", "sequential write, over it")
    return [
        Workload("smallread", _small_read, small, io=True),
        Workload(
            "smallread-tmpfs",
            _small_read_tmpfs,
            figures("us", "read small cold, tmpfs"),
            io=True,
            lowers=lower_beside,
            file_system="tmpfs",
        ),
        Workload("seqwrite", _sequential_write, figures("ms", *written), io=True),
        Workload("seqread", _sequential_read, figures("ms", "sequential read cold", "sequential read warm"), io=True),
        Workload("random", _random, figures("us", "random read 4K", "random write 4K"), io=True),
        Workload("copy", _copy, figures("ms", copy_key(scale)), lowers=lower_beside, file_system="btrfs"),
        *(_first_write_workload(kind, scale) for kind in ("ext4", "xfs", "btrfs")),
        *(_clients_workload(count) for count in (1, 4, 16)),
        Workload(
            "beside",
            _beside,
            (*figures("us", "4 clients, p99"), *figures("x", "p99 beside a copy-up / alone", compare=False)),
        ),
    ]
