"""What a workload is. Which there are: workloads.py; what they do: names.py, contents.py, programs.py, daemon.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.data import Data
from tests.bench.session import Figure, Session
from tests.bench.systems import Kind, System

ALL: tuple[Kind, ...] = ("native", "kernel", "peer", "udbad")
FUSE: tuple[Kind, ...] = ("peer", "udbad")


@dataclass(frozen=True)
class Workload:
    """kinds: the systems it makes sense for, or systems: their names. io: the io modes of udbad that are not the
    default take part, too. lowers: the branches, given the data, the base directory and the system's name; base: where
    a session's own directories go. copies: directories it writes into that native gets as a copy. once: no repetitions,
    for many samples are taken in one, all would be the same, or the figures only lie between those of others."""

    name: str
    run: Callable[[Session], None]
    figures: tuple[Figure, ...]
    deadline: float = 120.0  # seconds, for each client run
    kinds: tuple[Kind, ...] = ALL
    systems: tuple[str, ...] | None = None
    io: bool = False
    once: bool = False
    copies: tuple[str, ...] = ()
    lowers: Callable[[Data, Path, str], tuple[Path, ...]] = lambda data, base, name: (data.lower,)
    file_system: str | None = None  # another one than the scratch directory's: xfs, btrfs (loop devices), tmpfs

    def applies(self, system: System) -> bool:
        """Does this workload make sense for this system?"""
        if system.io and not self.io:
            return False
        if self.systems is not None:
            return system.name in self.systems
        return system.kind in self.kinds


def figures(unit: str, *keys: str, compare: bool = True) -> tuple[Figure, ...]:
    return tuple(Figure(key, unit, compare) for key in keys)


def lower_beside(data: Data, base: Path, name: str) -> tuple[Path, ...]:
    """The lower branch of a workload on a file system of its own: on the same one as the writable branch."""
    return (base / "lower",)
