"""The goals of the project for these figures, as data. A report, not a test: a missed goal fails nothing."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.measure import Row

Rows = dict[str, Row]
Value = Callable[[Rows], float | None]


@dataclass(frozen=True)
class Goal:
    """value gives what is to stay at or below limit; None when the run has no such figure."""

    text: str
    limit: float
    value: Value


def _native(key: str, system: str) -> Value:
    return lambda rows: rows[key].ratio(system, rows[key].median("native")) if key in rows else None


def _peer(key: str, system: str) -> Value:
    return lambda rows: rows[key].ratio(system, rows[key].best_peer()) if key in rows else None


def _plain(key: str, system: str) -> Value:
    return lambda rows: rows[key].median(system) if key in rows else None


def _quotient(upper: str, lower: str, system: str) -> Value:
    def value(rows: Rows) -> float | None:
        a, b = (rows[key].median(system) if key in rows else None for key in (upper, lower))
        return a / b if a is not None and b else None

    return value


def _uncached_peer(key: str, system: str) -> Value:
    """Against the best peer that does not have the kernel cache its listings."""

    def value(rows: Rows) -> float | None:
        if key not in rows:
            return None
        medians = [rows[key].median(name) for name in ("fuse-overlayfs", "mergerfs", "unionfs-fuse")]
        return rows[key].ratio(system, min((m for m in medians if m is not None), default=None))

    return value


def goals(rows: Rows) -> list[Goal]:
    """Every goal; first writes are taken at the largest size the run has."""
    sizes = [int(key.split()[2]) for key in rows if key.startswith("first write") and key.endswith("ext4")]
    size = max(sizes, default=1024)
    found = []
    for system in ("udbad-none", "udbad-notify"):
        found += [
            Goal(f"{system}: warm stat / native", 1.15, _native("stat warm", system)),
            Goal(f"{system}: warm find / best peer without a readdir cache", 1.0, _uncached_peer("find warm", system)),
        ]
    for system in ("udbad-none", "udbad-reval", "udbad-notify"):
        found += [
            Goal(f"{system}: cold find / best peer", 1.0, _peer("find cold", system)),
            Goal(f"{system}: cold stat, shuffled / best peer", 1.5, _peer("stat cold, shuffled", system)),
            Goal(f"{system}: cold stat, in order / best peer", 1.0, _peer("stat cold, in order", system)),
            Goal(
                f"{system}: missing names, 500 branches / 2 branches",
                1.2,
                _quotient("lookup missing, 500 branches", "lookup missing, 2 branches", system),
            ),
            Goal(f"{system}: warm read of small files / best peer", 1.6, _peer("read small warm", system)),
            *(Goal(f"{system}: {key} / best peer", 1.5, _peer(key, system)) for key in ("create", "unlink", "rename")),
            *(
                Goal(f"{system}: {key} / best peer", 1.2, _peer(key, system))
                for key in (
                    "sequential read cold",
                    "sequential read warm",
                    "sequential write, new file",
                    "sequential write, over it",
                )
            ),
            *(
                Goal(
                    f"{system}: first write {size} MiB, {kind}, ms",
                    50,
                    _plain(f"first write {size} MiB, {kind}", system),
                )
                for kind in ("xfs", "btrfs")
            ),
            Goal(f"{system}: first write {size} MiB, ext4 / cp", 1.1, _native(f"first write {size} MiB, ext4", system)),
            Goal(f"{system}: memory per cached inode, B", 1024, _plain("memory per cached inode", system)),
            Goal(f"{system}: RSS at start, MiB", 60, _plain("RSS at start", system)),
            Goal(f"{system}: 16 clients, worst / median", 10, _plain("16 clients, worst / median", system)),
            Goal(f"{system}: p99 beside a copy-up / alone", 3, _plain("p99 beside a copy-up / alone", system)),
        ]
    return found
