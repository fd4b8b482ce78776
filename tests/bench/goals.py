"""The goals of the project for these figures, as data. A report, not a test: a missed goal fails nothing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tests.bench.measure import Row

Base = Literal["peer", "peer that caches no listings", "native", "figure", "itself"]
"""What a figure is divided by: the best FUSE peer's or native's, another figure of the same system, nothing."""
CACHES_LISTINGS = ("mergerfs-cache",)


@dataclass(frozen=True)
class Goal:
    """A figure is to be at most limit times base. other: the figure that is the base. io: for the systems in this
    io mode only, not the default. modes: which of udbad's."""

    figure: str
    limit: float
    base: Base = "peer"
    other: str = ""
    io: str = ""
    modes: tuple[str, ...] = ("none", "notify")

    def text(self, unit: str) -> str:
        limit = f"{self.limit:g}"
        if self.base == "itself":
            return f"{limit} {unit}".rstrip()
        if self.base == "figure":
            return f"{limit} of {self.other}"
        return f"{limit} of native" if self.base == "native" else f"{limit} of best {self.base}"

    def systems(self) -> list[str]:
        return [f"udbad-{mode}-{self.io}" if self.io else f"udbad-{mode}" for mode in self.modes]


@dataclass(frozen=True)
class Check:
    """A goal and what the run says. value: in the goal's own terms. to_peer: the figure's ratio to the best FUSE peer,
    None where nothing can be compared."""

    goal: Goal
    system: str
    value: float
    to_peer: float | None

    @property
    def met(self) -> bool:
        return self.value <= self.goal.limit


def _value(goal: Goal, system: str, rows: Mapping[str, Row]) -> float | None:
    row = rows[goal.figure]
    match goal.base:
        case "itself":
            return row.median(system)
        case "native":
            return row.ratio(system, row.median("native"))
        case "peer":
            return row.ratio(system, row.best_peer())
        case "peer that caches no listings":
            return row.ratio(system, row.best_peer(but=CACHES_LISTINGS))
        case "figure":
            return row.ratio(system, rows[goal.other].median(system)) if goal.other in rows else None


def _all(figures: Iterable[str], goal: Goal) -> list[Goal]:
    return [replace(goal, figure=figure) for figure in figures]


def goals(rows: Iterable[Row]) -> list[Goal]:
    """Every goal; of first writes the largest of these rows has one."""
    known = [row.figure.key for row in rows]
    sizes = [int(key.split()[2]) for key in known if key.startswith("first write") and key.endswith("ext4")]
    size = max(sizes, default=1024)
    return [
        Goal("stat cold, shuffled", 0.85),
        Goal("stat cold, in order", 0.85),
        Goal("stat warm", 1.15, "native"),
        Goal("stat warm", 60, "itself", modes=("reval",)),
        *_all((key for key in known if key.endswith("levels deep")), Goal("", 200, "itself", modes=("reval",))),
        Goal("find cold", 0.8),
        Goal("find warm", 1.0, "peer that caches no listings"),
        Goal("readdir cold", 1.0),
        Goal("find -name cold, one directory", 1.0),
        Goal("ls -l warm", 0.8),
        *_all(("create", "rename", "unlink"), Goal("", 0.8)),
        Goal("chown -R of lower files", 0.8),
        Goal("lookup missing, 500 branches", 1.2, "figure", other="lookup missing, 2 branches"),
        Goal("read small cold", 0.9),
        Goal("read small warm", 1.3, "native", io="cached"),
        Goal("requests for a file, warm", 0.001, "itself", io="cached"),  # 0, but for a handful of one pass
        Goal("read small cold, tmpfs", 0.9),
        *_all((key for key in known if key.startswith("sequential")), Goal("", 1.1, "native", io="passthrough")),
        *_all(("random read 4K", "random write 4K"), Goal("", 1.15, "native", io="passthrough")),
        *_all((key for key in known if key.startswith("cp ")), Goal("", 20, "itself")),
        Goal(f"first write {size} MiB, ext4", 1.1, "native"),
        *_all((f"first write {size} MiB, xfs", f"first write {size} MiB, btrfs"), Goal("", 50, "itself")),
        Goal("16 clients, worst / median", 5, "itself"),
        Goal("p99 beside a copy-up / alone", 3, "itself"),
        *_all(("git checkout cold", "git checkout warm", "untar", "rm -rf"), Goal("", 0.9)),
        *(Goal(f"{request}, daemon CPU", 0.8) for request in ("LOOKUP", "readdir entry", "create+write", "chmod")),
        Goal("memory per cached inode", 350, "itself"),
        Goal("memory at start", 60, "itself"),
        Goal("stat warm, survive on / off", 1.02, "itself", modes=("notify",)),
        Goal("create, rename, unlink, survive on / off", 1.05, "itself", modes=("notify",)),
        Goal("mount to serving", 150, "itself"),
        Goal("udbad --help", 100, "itself"),
    ]


def checks(rows: Iterable[Row]) -> list[Check]:
    """What the run says of each goal, system by system; nothing where it has no figure to say it by."""
    rows = list(rows)
    known = {row.figure.key: row for row in rows}
    found = []
    for goal in goals(rows):
        for system in goal.systems():
            value = _value(goal, system, known) if goal.figure in known else None
            if value is not None:
                row = known[goal.figure]
                found.append(Check(goal, system, value, row.ratio(system, row.best_peer())))
    return found
