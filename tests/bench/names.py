"""Workloads that ask for and change names and attributes; no data of files.

May not touch a mount point itself (clients do). Cold: freshly mounted, then drop_caches 2 (dentries and inodes; disk
blocks stay in memory, so the disk is not what is measured). Warm: the same once more.
"""

from collections.abc import Callable

from tests.bench.data import Scale
from tests.bench.session import Session
from tests.bench.workload import Workload, figures


def _stat(session: Session) -> None:
    names = session.data.lists["small"]
    shuffled = session.data.lists["small-shuffled"]
    session.mount(level=2)
    session.record("stat cold, shuffled", session.per_operation("stat", session.root, shuffled, "present"))
    session.mount(level=2)
    session.record("stat cold, in order", session.per_operation("stat", session.root, names, "present"))
    session.record("stat warm", session.per_operation("stat", session.root, names, "present"))


def _deep(session: Session) -> None:
    """By names of the deepest directory, which is open: what asking for one name costs, not for one on each level."""
    session.mount()
    argv = ("stat", session.root / session.data.deep, session.data.lists["deep"], "present")
    session.client(*argv)
    session.record(deep_key(session.scale), session.per_operation(*argv))


def deep_key(scale: Scale) -> str:
    return f"stat warm, {scale.levels} levels deep"


def _find(session: Session) -> None:
    session.mount(level=2)
    argv = ("find", session.root / "small", "-size", "+100000k")
    session.record("find cold", session.command(*argv) * 1e3)
    session.record("find warm", session.command(*argv) * 1e3)


def _readdir(session: Session) -> None:
    session.mount(level=2)
    argv = ("readdir", session.root / "listing", session.scale.listing)
    session.record("readdir cold", session.client(*argv)["seconds"] * 1e3)
    session.record("readdir warm", session.client(*argv)["seconds"] * 1e3)
    session.mount(level=2)
    seconds = session.command("find", session.root / "listing", "-name", "none")
    session.record("find -name cold, one directory", seconds * 1e3)


def _ls(session: Session) -> None:
    session.mount()
    argv = ("ls", "-l", "--color=never", session.root / "flat")
    session.command(*argv)
    session.record("ls -l warm", session.command(*argv) * 1e3)


def _mutate(session: Session) -> None:
    names = session.data.lists["mutations"]
    session.mount()
    session.command("mkdir", session.root / "w")
    session.record("create", session.per_operation("create", session.root, names, 0))
    session.record("rename", session.per_operation("rename", session.root, names))
    session.record("unlink", session.per_operation("unlink", session.root, names, ".r"))


def _chown(session: Session) -> None:
    session.mount()
    seconds = session.command("chown", "-R", "4242:4242", session.root / "owned")
    if session.system.kind != "native":
        session.check_copied_up("owned/d0000/f000000")
    session.record("chown -R of lower files", seconds * 1e3)


def _branches(count: int) -> Callable[[Session], None]:
    def run(session: Session) -> None:
        lists = session.data.lists
        for key in ("present", "missing"):
            session.mount(level=2)
            session.client("stat", session.root, lists["branch-prime"], "missing")  # the directory is known now
            value = session.per_operation("stat", session.root, lists[f"branch-{key}-{count}"], key)
            session.record(f"lookup {key}, {count} branches", value)

    return run


def _branch_workload(count: int, counts: tuple[int, ...]) -> Workload:
    keys = (f"lookup present, {count} branches", f"lookup missing, {count} branches")
    return Workload(
        f"branches-{count}",
        _branches(count),
        figures("us", *keys),
        kinds=("kernel", "peer", "udbad"),
        once=count not in (min(counts), max(counts)),
        lowers=lambda data, base, name: data.branch_set(count),
    )


def branch_workloads(scale: Scale) -> list[Workload]:
    """Lookups over many branches."""
    return [_branch_workload(count, scale.branch_counts) for count in scale.branch_counts]


def workloads(scale: Scale) -> list[Workload]:
    """The others of this module, in the order of the table."""
    listing = ("readdir cold", "readdir warm", "find -name cold, one directory")
    return [
        Workload("stat", _stat, figures("us", "stat cold, shuffled", "stat cold, in order", "stat warm")),
        Workload("deep", _deep, figures("us", deep_key(scale))),
        Workload("find", _find, figures("ms", "find cold", "find warm")),
        Workload("readdir", _readdir, figures("ms", *listing)),
        Workload("ls", _ls, figures("ms", "ls -l warm")),
        Workload("mutate", _mutate, figures("us", "create", "rename", "unlink")),
        Workload("chown", _chown, figures("ms", "chown -R of lower files"), copies=("owned",)),
    ]
