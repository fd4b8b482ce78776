"""The workloads: which there are, in the order of the table.

A workload is one function and one entry of its module's list: names.py (names and attributes), contents.py (data),
programs.py, daemon.py (its costs), latency.py (how long a direct change stays unseen).
"""

from tests.bench import contents, daemon, latency, names, programs
from tests.bench.data import Scale
from tests.bench.process import Failed
from tests.bench.workload import Workload


def all_workloads(scale: Scale) -> list[Workload]:
    """Every workload, in the order of the table."""
    return [
        *names.workloads(scale),
        *contents.workloads(scale),
        *programs.workloads(),
        *daemon.workloads(),
        *names.branch_workloads(scale),
        *latency.workloads(),
    ]


def check_name(name: str, known: list[str]) -> str:
    """A name of a workload or system given on the command line. Raises Failed."""
    if name not in known:
        raise Failed(f"{name}: not one of {', '.join(known)}")
    return name
