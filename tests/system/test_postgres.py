"""PostgreSQL lives in a union, loses its server to SIGKILL under load, and recovers.

The cluster belongs to the user postgres, who cannot get at the temporary directory of the tests.
So each program runs in a mount namespace of its own in which the union is also at /mnt (and in an IPC
namespace, with which the System V shared memory of a killed server goes away). The server
listens on no network address; its socket is in the union too.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.system.support import clean_env, each_mode, require, run, unchanged, wait_gone

pytestmark = [pytest.mark.system, pytest.mark.fuse]

CLIENTS = 4
TRANSACTIONS = 200
HERE = "/mnt"
DATA = f"{HERE}/pg/data"
SOCKETS = f"{HERE}/pg/run"
SHUTDOWN_SECONDS = 60

SETTINGS = f"""
listen_addresses = ''
unix_socket_directories = '{SOCKETS}'
shared_buffers = 16MB
max_connections = 20
# Shared memory in files of the data directory, mapped MAP_SHARED.
dynamic_shared_memory_type = mmap
# Checkpoints during the load, so that data files are written and not only the log.
checkpoint_timeout = 30s
max_wal_size = 32MB
wal_recycle = off
logging_collector = off
"""

IN_NAMESPACE = f"""
mount --bind "$1" {HERE}
shift
cd {HERE}
exec setpriv --reuid=postgres --regid=postgres --clear-groups -- "$@"
"""


def find_programs() -> Path:
    """The directory of the newest installed server; Debian keeps it out of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    assert found, "no PostgreSQL: install the packages in tests/system/packages.txt"
    return found[-1]


def command(root: Path, *argv: str) -> list[str]:
    """argv as user postgres with the union `root` at HERE; the process is the program itself, same pid."""
    namespace = ["unshare", "--mount", "--ipc", "--propagation", "private", "--"]
    return [*namespace, "sh", "-ec", IN_NAMESPACE, "sh", str(root), *argv]


class Cluster:
    """One database cluster in the union `root`; messages of the server go to `log` outside of it."""

    def __init__(self, root: Path, log: Path) -> None:
        self.root = root
        self.log = log
        self.programs = find_programs()
        self.env = clean_env(PGHOST=SOCKETS, PGUSER="postgres", PGDATABASE="postgres")

    def argv(self, program: str, *options: str) -> list[str]:
        return command(self.root, str(self.programs / program), *options)

    def run(self, program: str, *options: str, ok: tuple[int, ...] = (0,)) -> str:
        return run(*self.argv(program, *options), env=self.env, ok=ok)

    def query(self, sql: str) -> list[str]:
        return self.run("psql", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql).split()

    def initialise(self) -> None:
        (self.root / "pg/run").mkdir()
        shutil.chown(self.root / "pg", "postgres", "postgres")
        shutil.chown(self.root / "pg/run", "postgres", "postgres")
        self.run("initdb", "-D", DATA, "--auth=peer", "--data-checksums", "--locale=C", "--encoding=UTF8")
        with (self.root / "pg/data/postgresql.conf").open("a") as settings:
            settings.write(SETTINGS)

    @contextmanager
    def server(self) -> Iterator[subprocess.Popen[bytes]]:
        """A running server; at the end it is asked for a fast shutdown, unless it is dead already."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.argv("postgres", "-D", DATA), env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self.wait_ready(process)
            yield process
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                assert process.wait(SHUTDOWN_SECONDS) == 0, self.log.read_text()
        finally:
            if process.poll() is None:
                kill_server(process)

    def wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Ask until the server accepts connections; each question waits up to a second by itself."""
        for _ in range(600):
            assert process.poll() is None, f"the server ended with {process.returncode}:\n{self.log.read_text()}"
            if "accepting" in self.run("pg_isready", "-t", "1", ok=(0, 1, 2)).split():
                return
        raise AssertionError(f"the server is not ready:\n{self.log.read_text()}")


def kill_server(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the server and all its children, at one moment as far as they can tell."""
    process.send_signal(signal.SIGSTOP)  # so that it starts no more children
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(SHUTDOWN_SECONDS)
    wait_gone(children)


def check_consistency(cluster: Cluster) -> int:
    """pgbench moves the same amounts everywhere, so all sums are equal; returns the transactions done."""
    tables = {"pgbench_accounts": "abalance", "pgbench_branches": "bbalance", "pgbench_tellers": "tbalance"}
    sums = [f"(SELECT sum({column}) FROM {table})" for table, column in tables.items()]
    (row,) = cluster.query(f"SELECT {', '.join(sums)}, (SELECT coalesce(sum(delta), 0) FROM pgbench_history)")
    assert len(set(row.split("|"))) == 1, f"accounts, branches, tellers, history: {row}"
    # The same sum through the index, and every row of the table through it.
    through_index = "SET enable_seqscan = off; SELECT count(*) FROM pgbench_accounts WHERE aid BETWEEN 1 AND 100000"
    assert cluster.query(through_index)[-1] == "100000"
    return int(cluster.query("SELECT count(*) FROM pgbench_history")[0])


def killed_under_load(cluster: Cluster, acknowledged_logs: Path) -> int:
    """Kill the server in the middle of a run; returns how many transactions the clients saw committed."""
    with cluster.server() as server:
        # pgbench writes a line per finished transaction; HERE is the only path that postgres can write to.
        options = ["-n", "-c", str(CLIENTS), "-T", "60", "--log", f"--log-prefix={HERE}/pg/run/ack"]
        load = subprocess.Popen(
            cluster.argv("pgbench", *options), env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            while int(cluster.query("SELECT count(*) FROM pgbench_history")[0]) < CLIENTS * TRANSACTIONS + 100:
                assert load.poll() is None, f"pgbench ended before the kill: {load.communicate()[0]!r}"
            kill_server(server)
            load.communicate(timeout=60)
        finally:
            load.kill()
            load.communicate(timeout=60)
    return sum(len(path.read_text().splitlines()) for path in acknowledged_logs.glob("ack.*"))


def postgres_at_work(cluster: Cluster) -> None:
    """initdb, load, kill, recovery, clean shutdown, checksums."""
    cluster.initialise()
    with cluster.server():
        cluster.run("pgbench", "-q", "-i", "-s", "1")
        cluster.run("pgbench", "-n", "-c", str(CLIENTS), "-t", str(TRANSACTIONS))
        assert check_consistency(cluster) == CLIENTS * TRANSACTIONS
    before = cluster.log.stat().st_size
    acknowledged = killed_under_load(cluster, cluster.root / "pg/run")
    assert acknowledged > 0
    recover(cluster, before, CLIENTS * TRANSACTIONS + acknowledged)


def recover(cluster: Cluster, log_offset: int, transactions: int) -> None:
    """Start the killed cluster: it replays its log and has at least `transactions`."""
    with cluster.server():
        log = cluster.log.read_text()[log_offset:]
        assert "automatic recovery in progress" in log, log
        assert check_consistency(cluster) >= transactions
        cluster.run("pgbench", "-n", "-c", str(CLIENTS), "-t", "10")
        cluster.query("VACUUM FULL")
        check_consistency(cluster)
    output = cluster.run("pg_checksums", "--check", "-D", DATA)
    assert "Bad checksums:  0" in output, output
    assert "PANIC" not in cluster.log.read_text()


@each_mode
def test_initdb_pgbench_kill_recovery(union: UnionFactory, udba: str, tmp_path: Path) -> None:
    require("unshare", "setpriv")
    (tmp_path / "base/pg").mkdir(parents=True)
    mount = union({"top": "rw", "base": "ro"}, udba)
    with unchanged(mount["base"]):
        cluster = Cluster(mount.path, tmp_path / "server.log")
        postgres_at_work(cluster)
        mount.remount()
        with cluster.server():
            check_consistency(cluster)


@each_mode
def test_recovery_from_a_lower_layer(union: UnionFactory, udba: str, tmp_path: Path) -> None:
    """A killed server's files as read-only layer: recovery copies up what it changes."""
    cluster = Cluster(tmp_path / "base", tmp_path / "server.log")
    (tmp_path / "base/pg").mkdir(parents=True)
    cluster.initialise()
    with cluster.server():
        cluster.run("pgbench", "-q", "-i", "-s", "1")
        cluster.run("pgbench", "-n", "-c", str(CLIENTS), "-t", str(TRANSACTIONS))
    before = cluster.log.stat().st_size
    acknowledged = killed_under_load(cluster, cluster.root / "pg/run")
    mount = union({"top": "rw", "base": "ro"}, udba)
    cluster.root = mount.path
    with unchanged(mount["base"]):
        recover(cluster, before, CLIENTS * TRANSACTIONS + acknowledged)
