"""SQLite in WAL mode: locks, a shared mapped -shm file, fsync, and a database copied up while in use."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.system.support import clean_env, each_mode, unchanged

pytestmark = [pytest.mark.system, pytest.mark.fuse]

ACCOUNTS = 1000
TRANSACTIONS = 150
DEADLINE = 90.0
"""Seconds for one writer."""

# Each transaction moves money, keeps the sum, and is reported on stdout after its commit returned.
WRITER = """
import random, sqlite3, sys
path, writer, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random_ = random.Random(writer)
db = sqlite3.connect(path, timeout=60, isolation_level=None)
db.execute("PRAGMA synchronous=FULL")
for n in range(count):
    source, target = random_.sample(range(1000), 2)
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE account SET balance = balance - 1 WHERE id = ?", (source,))
    db.execute("UPDATE account SET balance = balance + 1 WHERE id = ?", (target,))
    db.execute("INSERT INTO done VALUES (?, ?, randomblob(200))", (writer, n))
    db.execute("COMMIT")
    print(n, flush=True)
db.close()
"""


def make_database(path: Path) -> None:
    """A database in WAL mode with ACCOUNTS accounts and some megabytes of other data, closed cleanly."""
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
        with db:
            db.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER)")
            db.execute("CREATE TABLE done (writer INTEGER, n INTEGER, pad BLOB, PRIMARY KEY (writer, n))")
            db.execute("CREATE TABLE ballast (pad BLOB)")
            db.executemany("INSERT INTO account VALUES (?, 100)", ((n,) for n in range(ACCOUNTS)))
            db.executemany("INSERT INTO ballast VALUES (randomblob(4000))", (() for _ in range(1000)))
    assert not path.with_name(path.name + "-wal").exists()


@contextmanager
def writer(path: Path, number: int, count: int) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", WRITER, str(path), str(number), str(count)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=clean_env())
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)


def check(db: sqlite3.Connection, acknowledged: dict[int, int]) -> None:
    """Intact, the sum kept, and at least the first `acknowledged[w]` transactions of each writer there."""
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("SELECT count(*), sum(balance) FROM account").fetchone() == (ACCOUNTS, ACCOUNTS * 100)
    for number, count in acknowledged.items():
        rows = [n for (n,) in db.execute("SELECT n FROM done WHERE writer = ? ORDER BY n", (number,))]
        assert rows == list(range(len(rows)))
        assert len(rows) in (count, count + 1), "one more than acknowledged may have been committed"


def finished(process: subprocess.Popen[str]) -> int:
    """Wait for a writer that must do all its transactions; returns how many it reported."""
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert len(output.splitlines()) == TRANSACTIONS
    return TRANSACTIONS


def sqlite_at_work(path: Path) -> dict[int, int]:
    """Three concurrent writers, one of them killed, then a fourth; returns the acknowledged transactions of each."""
    acknowledged: dict[int, int] = {}
    with closing(sqlite3.connect(path, timeout=60)) as reader:
        # Opened, locked and read before the first write, so it holds descriptors of the lower file.
        check(reader, {})
        with (
            writer(path, 0, 100_000) as victim,
            writer(path, 1, TRANSACTIONS) as one,
            writer(path, 2, TRANSACTIONS) as two,
        ):
            assert victim.stdout is not None
            for _ in range(TRANSACTIONS // 2):
                assert victim.stdout.readline(), "the writer to be killed ended by itself"
            check(reader, {})
            victim.kill()
            rest, _ = victim.communicate(timeout=DEADLINE)
            acknowledged[0] = TRANSACTIONS // 2 + len(rest.splitlines())
            acknowledged[1], acknowledged[2] = finished(one), finished(two)
        # One that finds what the killed writer left in the log and the shared memory.
        with writer(path, 3, TRANSACTIONS) as late:
            acknowledged[3] = finished(late)
        check(reader, acknowledged)
        assert reader.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        check(reader, acknowledged)
    return acknowledged


@each_mode
def test_wal_writers_and_a_killed_one(union: UnionFactory, udba: str, tmp_path: Path) -> None:
    make_database(tmp_path / "base/data/bank.db")
    mount = union({"top": "rw", "base": "ro"}, udba)
    with unchanged(mount["base"]):
        acknowledged = sqlite_at_work(mount.path / "data/bank.db")
        mount.remount()
        with closing(sqlite3.connect(mount.path / "data/bank.db")) as db:
            check(db, acknowledged)
    with closing(sqlite3.connect(mount["top"] / "data/bank.db")) as db:
        check(db, acknowledged)
