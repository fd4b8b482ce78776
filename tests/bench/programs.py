"""Workloads that are programs people run: git, tar, rm, make. May not touch a mount point itself (clients do)."""

from tests.bench import process
from tests.bench.session import Session
from tests.bench.workload import Workload, figures


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
    session.record("rm -rf", session.command("rm", "-rf", session.root / "untar") * 1e3)


def _make(session: Session) -> None:
    session.mount(level=2)
    session.record("make -j2", session.command("make", "-s", "-j2", "-C", session.root / "proj") * 1e3)


def workloads() -> list[Workload]:
    """Those of this module, in the order of the table."""
    steps = ("git status cold", "git status warm", "git checkout cold", "git checkout warm")
    return [
        Workload("git", _git, figures("ms", *steps)),
        Workload("untar", _untar, figures("ms", "untar", "rm -rf")),
        Workload("make", _make, figures("ms", "make -j2"), copies=("proj",)),
    ]
