"""`udbad watch`, `udbad subscribe` and [hosts], as somebody uses them; what they are right about is in t4_coherence."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bus import Server, sshfs
from tests.helpers.network import hosts
from tests.t5_daemon.daemon import COMMAND, DEADLINE, Daemon, toml, until
from udbad.control import registry
from udbad.control.protocol import ask

pytestmark = pytest.mark.fuse

PASSWORD = "not-for-others"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server("nats", tmp_path_factory.mktemp("bus"), ["--user", "u", "--pass", PASSWORD])
    yield server
    server.kill()


class Site:
    """A configuration that has nothing but [hosts]."""

    def __init__(self, directory: Path, url: str) -> None:
        self.secret = directory / "secret"
        self.config = directory / "hosts.toml"
        self.write_secret(PASSWORD, 0o600)
        self.table: dict[str, object] = {
            "urls": [url], "credentials": str(self.secret), "bound": 1.0, "settle": 0.0, "name": "here"
        }  # fmt: skip
        self.config.write_text("[hosts]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in self.table.items()))

    def write_secret(self, password: str, mode: int) -> None:
        self.secret.write_text(f"u:{password}\n")
        self.secret.chmod(mode)


@pytest.fixture
def site(server: Server, tmp_path: Path) -> Site:
    return Site(tmp_path, server.url)


def start(daemon: Daemon, *words: str | Path, enter: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A command that has said its first line. enter: what its command line begins with."""
    command = subprocess.Popen(
        [*enter, *COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=daemon.environment, cwd="/",
    )  # fmt: skip
    assert command.stdout is not None
    assert command.stdout.readline().startswith(("watching 2 directories", "listening for "))
    return command


def end(command: subprocess.Popen[str]) -> None:
    command.terminate()
    assert command.wait(60) == 0
    assert command.stdout is not None
    command.stdout.close()


def test_a_change_on_the_server(daemon: Daemon, site: Site, tmp_path: Path) -> None:
    export = tmp_path / "export"
    (export / "d").mkdir(parents=True)
    point = daemon.add("a", udba="notify")
    with sshfs(export, daemon.branch("a", "base")) as branch:
        daemon.start()
        listening = start(daemon, "subscribe", "-c", site.config, "a", f"share={branch}")
        watching = start(daemon, "watch", "-c", site.config, f"share={export}")
        until(lambda: is_believed(daemon, branch), "lease")
        assert not (point / "d/new").exists()
        (export / "d/new").touch()
        until((point / "d/new").exists, "change")
        check_flush(daemon, watching, export / "d/flushed", point / "d/flushed")
        assert PASSWORD not in "".join(
            Path(f"/proc/{command.pid}/cmdline").read_text() for command in (watching, listening)
        )
        end(watching)
        until(lambda: not is_believed(daemon, branch), "end of the lease, as the publisher has said goodbye")
        code, said = flush(daemon)
        # The others after twice the bound.
        reasons = ("here has ended", "no publisher answers", "no publisher has answered yet")
        assert code == 1
        assert said in [f"udbad: a: not heard within 1 s: share: {reason}\n" for reason in reasons]
        listening.kill()
        listening.communicate()
        code, said = flush(daemon)
        assert (code, said) == (1, f"udbad: a: not heard within 1 s: {branch}: `udbad subscribe` does not answer\n")
        listening = start(daemon, "subscribe", "-c", site.config, "a", f"share={branch}")
        end(listening)
        assert flush(daemon) == (1, "udbad: a: hears of no other host (udbad subscribe)\n")
        daemon.stop()


def flush(daemon: Daemon, seconds: float = 1.0, mount: str = "a") -> tuple[int, str]:
    done = subprocess.run(
        [*COMMAND, "flush", "--all-hosts", "--timeout", str(seconds), mount], capture_output=True, text=True,
        env=daemon.environment, cwd="/", check=False, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stderr


def check_flush(daemon: Daemon, watching: subprocess.Popen[str], far: Path, seen: Path) -> None:
    """Whoever asks whether all hosts were heard is told so, or which was not."""
    assert not seen.exists()
    far.touch()
    assert flush(daemon, 30.0) == (0, "")
    assert seen.exists()
    watching.send_signal(signal.SIGSTOP)
    assert flush(daemon) == (1, "udbad: a: not heard within 1 s: share: here\n")
    watching.send_signal(signal.SIGCONT)
    assert flush(daemon, 30.0) == (0, "")


def metrics(daemon: Daemon, mount: str = "a") -> dict[str, Any]:
    (entry,) = (entry for entry in registry.entries(daemon.run_dir) if entry.name == mount)
    found: dict[str, Any] = ask(entry.control, {"op": "metrics"}, DEADLINE)["metrics"]
    return found


def is_believed(daemon: Daemon, branch: Path, mount: str = "a") -> bool:
    states = {tuple(labels): value for labels, value in metrics(daemon, mount)["udbad_coherence_state"]}
    return bool(states[str(branch), "healthy"] == 1)


def subscribers(daemon: Daemon) -> list[int]:
    """The pids of the daemon's own."""
    assert daemon.process is not None
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if is_subscriber(int(pid))]


def is_subscriber(pid: int) -> bool:
    """A process that has ended has no command line, whether or not somebody has waited for it."""
    try:
        return b"subscriber" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False


def another(daemon: Daemon, pid: int) -> int:
    """The pid of the only subscriber, when it is none that is on its way out."""
    found = until(lambda: [one for one in [subscribers(daemon)] if len(one) == 1 and one != [pid]], "another process")
    return int(found[0][0])


def test_the_daemon_listens(daemon: Daemon, site: Site, tmp_path: Path) -> None:
    """For a mount that says so, with what [hosts] says at the moment, and again when its process was killed."""
    export = tmp_path / "export"
    (export / "d").mkdir(parents=True)
    point = daemon.add("a", udba="notify")
    with sshfs(export, daemon.branch("a", "base")) as branch:
        daemon.start()
        assert subscribers(daemon) == []
        watching = start(daemon, "watch", "-c", site.config, f"share={export}")
        daemon.hosts = site.table
        daemon.mounts["a"]["published"] = {"share": f"{branch}/."}
        daemon.write()
        daemon.command("reload")
        until(lambda: is_believed(daemon, branch), "lease")
        assert not (point / "d/new").exists()
        (export / "d/new").touch()
        until((point / "d/new").exists, "change")
        (pid,) = subscribers(daemon)
        until(lambda: sum(count for _, count in metrics(daemon)["udbad_hosts_hints_total"]), "reading")
        (((path, host), lag),) = metrics(daemon)["udbad_hosts_lag_seconds"]
        assert (path, host) == (str(branch), "here")
        assert 0 <= lag < DEADLINE
        daemon.command("reload")
        assert subscribers(daemon) == [pid]
        os.kill(pid, signal.SIGKILL)
        second = another(daemon, pid)
        daemon.hosts["bound"] = 2.0
        daemon.write()
        daemon.command("reload")
        another(daemon, second)
        until(lambda: is_believed(daemon, branch), "lease")
        daemon.command("umount", str(point))
        until(lambda: not subscribers(daemon), "end of the process with its mount")
        daemon.command("restart", "a")
        daemon.wait_for("a")
        until(lambda: is_believed(daemon, branch), "lease")
        del daemon.mounts["a"]["published"]
        daemon.write()
        daemon.command("reload")
        until(lambda: not subscribers(daemon) and not is_believed(daemon, branch), "end of the lease")
        assert metrics(daemon)["udbad_hosts_believed"] == []
        daemon.mounts["a"]["published"] = {"share": str(branch)}
        daemon.write()
        daemon.command("reload")
        until(lambda: is_believed(daemon, branch), "lease")
        (last,) = subscribers(daemon)
        daemon.kill()
        until(lambda: not is_subscriber(last), "end of the process with the daemon")
        daemon.start()
        until(lambda: is_believed(daemon, branch), "lease")
        end(watching)
        daemon.stop()
        assert "the process that hears of other hosts has ended with -9" in daemon.log()
        assert "Traceback" not in daemon.log()


def test_a_mount_tells_of_its_own_changes(daemon: Daemon, site: Site, tmp_path: Path) -> None:
    """Nobody watches the files. What the mount process had not told when it was killed may be anything."""
    far = daemon.add("a", ["share=rw"], udba="notify", io="requests", publish=True, survive=True)
    near = daemon.add("b", udba="notify")
    export = daemon.branch("a", "share")
    (export / "d").mkdir()
    with sshfs(export, daemon.branch("b", "base")) as branch:
        daemon.hosts = {**site.table, "publishers": ["here/a"]}
        daemon.mounts["a"]["published"] = {"share": str(export)}
        daemon.mounts["b"]["published"] = {"share": str(branch)}
        daemon.start()
        until(lambda: is_believed(daemon, branch, "b"), "lease")
        assert not (near / "d/new").exists()
        (far / "d/new").touch()
        assert flush(daemon, 30.0, "b") == (0, "")
        assert is_believed(daemon, branch, "b")
        assert (near / "d/new").exists()
        listening = subscribers(daemon)
        for pid in listening:
            os.kill(pid, signal.SIGSTOP)
        assert not (near / "d/lost").exists()
        (far / "d/lost").touch()
        before = daemon.state("a")["pid"]
        os.kill(before, signal.SIGKILL)
        until(lambda: (far / "d/lost").exists() and daemon.state("a")["pid"] != before, "another mount process")
        for pid in listening:
            os.kill(pid, signal.SIGCONT)
        assert flush(daemon, 30.0, "b") == (0, "")
        assert (near / "d/lost").exists()
        until(lambda: is_believed(daemon, branch, "b"), "lease")
        daemon.stop()


def test_a_client_is_cut_off_or_stopped(daemon: Daemon, tmp_path: Path) -> None:
    """Two clients on one branch, and a network between them and the server: what is wrong with the first is no matter
    to the second, and its mount believes nothing old for longer than the bound."""
    export = tmp_path / "export"
    (export / "d").mkdir(parents=True)
    first, second = (daemon.add(name, udba="notify") / "d" for name in "ab")
    with ExitStack() as stack:
        branch = stack.enter_context(sshfs(export, daemon.branch("a", "base")))
        daemon.mounts["b"]["branches"] = [f"{daemon.branch('b', 'top')}=rw", f"{branch}=ro"]
        daemon.start()
        there, here = stack.enter_context(hosts(1))
        words = ["-a", there.address, "-p", "4222", "-js", "-sd", str(tmp_path / "bus")]
        bus = stack.enter_context(
            subprocess.Popen(
                [*there.enter, "nats-server", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )
        stack.callback(bus.kill)
        config = tmp_path / "network.toml"
        config.write_text(
            f'[hosts]\nurls = ["nats://{there.address}:4222"]\nbound = 1.0\nsettle = 0.0\nname = "there"\n'
        )
        # The second client is on the server: nothing cuts it off.
        watching = start(daemon, "watch", "-c", config, f"share={export}", enter=there.enter)
        listening = start(daemon, "subscribe", "-c", config, "a", f"share={branch}", enter=here.enter)
        other = start(daemon, "subscribe", "-c", config, "b", f"share={branch}", enter=there.enter)

        def check_both(name: str) -> None:
            """A change is seen by both, which believe the branch."""
            for mount in "ab":
                until(partial(is_believed, daemon, branch, mount), "lease")
            assert not (first / name).exists()
            assert not (second / name).exists()
            (export / "d" / name).touch()
            assert flush(daemon, 30.0, "a") == (0, "")
            assert flush(daemon, 30.0, "b") == (0, "")
            assert (first / name).exists()
            assert (second / name).exists()

        def check_alone(name: str) -> None:
            """The first hears of nothing, and so looks; the second believes what it hears."""
            assert not (first / name).exists()
            until(lambda: not is_believed(daemon, branch), "end of the lease")
            daemon.command("flush", "a")  # the kernel has forgotten what it was told before
            (export / "d" / name).touch()
            assert (first / name).exists()
            assert flush(daemon, 30.0, "b") == (0, "")
            assert is_believed(daemon, branch, "b")
            assert (second / name).exists()

        check_both("before")
        here.cut()
        (export / "d/short").touch()
        time.sleep(0.2)  # of the bound, which is a second
        here.mend()
        assert flush(daemon, 30.0) == (0, "")
        assert (first / "short").exists()
        here.cut()
        check_alone("cut")
        assert flush(daemon, 0.2)[0] == 1
        here.mend()
        check_both("mended")
        listening.send_signal(signal.SIGSTOP)
        check_alone("stopped")
        listening.send_signal(signal.SIGCONT)
        check_both("continued")
        for command in (listening, other, watching):
            end(command)
        daemon.stop()


def check(daemon: Daemon, site: Site) -> str:
    done = subprocess.run(
        [*COMMAND, "check-config", "-c", site.config], capture_output=True, text=True, env=daemon.environment,
        cwd="/", check=False, timeout=60,
    )  # fmt: skip
    assert PASSWORD not in done.stderr
    assert (done.returncode == 0) == (not done.stderr)
    return done.stderr


def test_the_configuration_is_checked(daemon: Daemon, site: Site, server: Server) -> None:
    assert check(daemon, site) == ""
    site.write_secret("wrong", 0o600)
    assert "Authorization" in check(daemon, site)
    site.write_secret(PASSWORD, 0o644)
    assert "others may read it" in check(daemon, site)
    site.config.write_text('[hosts]\nurls = ["nats://u:x@localhost:1"]\n')
    said = check(daemon, site)
    assert "without a password" in said
    assert "x@" not in said
    site.config.write_text('[hosts]\nurls = ["redis://127.0.0.1:1"]\n')
    assert "hosts: redis://127.0.0.1:1: " in check(daemon, site)
