"""The mount process is killed at random under real programs: none of them notices, and their own checks find nothing.

UDBAD_STORM_SEED repeats the times of the kills of a run; UDBAD_KILLS: how many there are in each mode.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers.killing import Kills, killing
from tests.helpers.mount import UnionFactory
from tests.helpers.profile import SOAK, scaled
from tests.stress.storm import ALLOWED_LOG
from tests.stress.test_storm import SEED
from tests.system import test_archives, test_build, test_git, test_postgres, test_sqlite
from tests.system.support import require, run
from udbad.mount import keeper

pytestmark = [
    pytest.mark.system,
    pytest.mark.fuse,
    pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not())),
]

KILLS = int(os.environ.get("UDBAD_KILLS", scaled("6", "500")))
ALLOWED = f"{ALLOWED_LOG}|another one takes over"
COMBINATIONS = (("notify", "requests"), ("reval", "passthrough"), ("none", "cached"))
BAD = re.compile("PANIC|ERROR|FATAL:  (?!the database system is starting up)")
"""In the log of PostgreSQL."""
SQLITE_TRANSACTIONS = int(scaled("40", "400"))

Round = Callable[[Path, Path], None]
"""One round of a program: where it is to work, a new directory of the mount, and one outside of it."""


def fio(here: Path, outside: Path) -> None:
    """Whatever is read back is what was written, by system calls, by mappings, and by several at a time."""
    for engine, options in (("psync", ["--fsync=16"]), ("mmap", []), ("io_uring", ["--iodepth=8"])):
        run(
            "fio", "--name=verify", f"--directory={here}", f"--ioengine={engine}", "--rw=randrw", "--bsrange=1k-64k",
            "--bs_unaligned=0", "--size=8m", "--numjobs=2", "--verify=crc32c", "--verify_backlog=64",
            "--verify_fatal=1", "--do_verify=1", *options, cwd=outside, timeout=600,
        )  # fmt: skip


def sqlite(journal: str) -> Round:
    def work(here: Path, outside: Path) -> None:
        path = here / "data" / "bank.db"
        test_sqlite.make_database(path)
        with closing(sqlite3.connect(path, timeout=60)) as db:
            assert db.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal,)
        with (
            test_sqlite.writer(path, 0, SQLITE_TRANSACTIONS) as one,
            test_sqlite.writer(path, 1, SQLITE_TRANSACTIONS) as two,
        ):
            for process in (one, two):
                output, _ = process.communicate(timeout=600)
                assert process.returncode == 0
                assert len(output.splitlines()) == SQLITE_TRANSACTIONS
        with closing(sqlite3.connect(path)) as db:
            test_sqlite.check(db, {})
            done = db.execute("SELECT count(*) FROM done").fetchone()
            assert done == (2 * SQLITE_TRANSACTIONS,)

    return work


def postgres(here: Path, outside: Path) -> None:
    cluster = test_postgres.Cluster(here, outside / "server.log")
    (here / "pg").mkdir()
    cluster.initialise()
    with cluster.server():
        cluster.run("pgbench", "-q", "-i", "-s", "1")
        cluster.run("pgbench", "-n", "-c", "4", "-t", "300")
        assert test_postgres.check_consistency(cluster) == 1200
        cluster.query("VACUUM FULL")
        assert test_postgres.check_consistency(cluster) == 1200
    assert "Bad checksums:  0" in cluster.run("pg_checksums", "--check", "-D", test_postgres.DATA)
    bad = [line for line in cluster.log.read_text().splitlines() if BAD.search(line)]
    assert not bad, bad


def git(here: Path, outside: Path) -> None:
    test_git.make_origin(here / "origin.git")
    test_git.git_at_work(here)


def archives(here: Path, outside: Path) -> None:
    for tree in ("a", "b"):
        test_archives.make_tree(here / "tree" / tree, tree.encode())
    # rsync compares times by whole seconds (--modify-window=0), and would leave a copy of this second as it is.
    os.utime(here / "tree", ns=(test_archives.OLD_NS, test_archives.OLD_NS))
    test_archives.archives_at_work(here, outside)


def build(here: Path, outside: Path) -> None:
    project = here / "project"
    test_build.generate_project(project)
    (project / "src/broken.c").unlink()
    (project / "include/common.h").write_text("#pragma once\n#define SCALE 5\n")
    test_build.build_at_work(project)


PROGRAMS: dict[str, Round] = {
    "fio": fio,
    "sqlite-wal": sqlite("wal"),
    "sqlite-rollback": sqlite("delete"),
    "postgres": postgres,
    "git": git,
    "archives": archives,
    "build": build,
}


class Runner(threading.Thread):
    """Does rounds of a program until there have been enough kills, at least one."""

    def __init__(self, name: str, mount: Path, outside: Path, kills: Kills, most: int) -> None:
        super().__init__(name=name)
        self._mount, self._outside, self._kills, self._most = mount, outside, kills, most
        self.rounds = 0
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.rounds or self._kills.count < self._most:
                here, outside = (above / f"{self.name} {self.rounds}" for above in (self._mount, self._outside))
                here.mkdir()
                outside.mkdir()
                PROGRAMS[self.name](here, outside)
                shutil.rmtree(here)
                shutil.rmtree(outside)
                self.rounds += 1
        except BaseException as error:
            self.problem = error


GROUPS = ("fio", "sqlite-wal", "git"), ("archives", "build"), ("postgres", "sqlite-rollback")
"""What runs at the same time, when soaking: in each combination."""
FEW = {
    ("notify", "requests"): ("fio", "sqlite-wal"),
    ("reval", "passthrough"): ("archives",),
    ("none", "cached"): ("sqlite-rollback",),
}
"""Else; the other programs take minutes of CPU time."""


@pytest.mark.parametrize(
    ("udba", "io", "names"),
    [(udba, io, names) for udba, io in COMBINATIONS for names in (GROUPS if SOAK else (FEW[udba, io],))],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else value,
)
def test_no_program_notices(union: UnionFactory, tmp_path: Path, udba: str, io: str, names: tuple[str, ...]) -> None:
    require("fio", "git", "make", "cc", "rsync", "tar", "setfacl", "unshare", "setpriv")
    print(f"UDBAD_STORM_SEED={SEED}")
    (tmp_path / "outside").mkdir()
    mount = union(udba=udba, options=f"survive=on,io={io}", allow_log=ALLOWED, watchdog=7200)
    mount.path.chmod(0o755)
    with killing(mount, SEED) as kills:
        runners = [Runner(name, mount.path, tmp_path / "outside", kills, KILLS) for name in names]
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join()
    print(f"udba={udba},io={io}: {kills}; rounds: {', '.join(f'{one.name} {one.rounds}' for one in runners)}")
    for runner in runners:
        if runner.problem is not None:
            raise runner.problem
    mount.remount()
