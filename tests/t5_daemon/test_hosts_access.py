"""Who may use the message bus: TLS, passwords, credentials of NATS, and what each user of it may do.

`udbad check-config` says what is wrong before anybody relies on it; and what docs/hosts.md says that users need is
enough, and no more than that.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.bus import SECONDS, Server, bus_server, free_port, is_believed, sshfs
from tests.helpers.certificates import Authority
from tests.helpers.mount import REPOSITORY, mounted
from tests.helpers.nkeys import write_credentials
from tests.t5_daemon.daemon import COMMAND
from udbad.errors import ExitCode
from udbad.hosts.bus import BusSettings
from udbad.hosts.link import MountLink
from udbad.hosts.serving import Watched
from udbad.hosts.subscriber import Following, Subscriber
from udbad.settings.file import load
from udbad.supervisor import check

PASSWORD = "not-for-others"
LOOKING_AT_STREAMS = "$JS.API.STREAM.INFO.udbad"
READING = "$JS.API.CONSUMER.CREATE.udbad.*.udbad.share"
MAY = {
    "client": (LOOKING_AT_STREAMS, f"{READING}.changes", "udbad.share.marks"),
    "server": (LOOKING_AT_STREAMS, f"{READING}.marks", "udbad.share.changes"),
    "mute": (LOOKING_AT_STREAMS, f"{READING}.changes"),
    "deaf": (LOOKING_AT_STREAMS, "udbad.share.marks"),
    "stranger": ("other",),
    "all": (">",),
}
"""Subjects of NATS to which each user may publish."""
COMMANDS = "+ping +client +hello"
ACL = {
    "client": f"{COMMANDS} %R~udbad.identity %W~udbad.share.marks %R~udbad.share.changes +get +xadd +xread +xrevrange",
    "server": f"{COMMANDS} %R~udbad.identity %W~udbad.share.changes %R~udbad.share.marks +get +xadd +xread +xrevrange",
    "mute": f"{COMMANDS} %R~udbad.identity %R~udbad.share.changes +get +xread +xrevrange",
    "deaf": f"{COMMANDS} %R~udbad.identity %W~udbad.share.marks +get +xadd +xread +xrevrange",
    "stranger": COMMANDS,
    "all": "~* +@all",
}
"""The same for Redis."""


@dataclass
class Site:
    """A bus that wants TLS, certificates and passwords."""

    server: Server
    root: Path
    authority: Authority
    certificate: tuple[Path, Path]

    @property
    def url(self) -> str:
        return f"{'tls' if self.server.kind == 'nats' else 'rediss'}://127.0.0.1:{self.server.port}"

    def secret(self, user: str, password: str = PASSWORD) -> Path:
        path = self.root / f"{user}.secret"
        path.write_text(f"{user}:{password}\n")
        path.chmod(0o600)
        return path

    def settings(self, user: str) -> BusSettings:
        certificate, key = map(str, self.certificate)
        authority, secret = str(self.authority.certificate), str(self.secret(user))
        return BusSettings((self.url,), "udbad", authority, certificate, key, secret, 2.0)

    def table(self, user: str = "client", **replaced: object) -> dict[str, object]:
        """[hosts]."""
        certificate, key = self.certificate
        return {
            "urls": [self.url], "ca_certificate": self.authority.certificate, "certificate": certificate, "key": key,
            "credentials": self.secret(user), "bound": 2.0, **replaced,
        }  # fmt: skip

    def problems(self, user: str = "client", publish: bool = False, **replaced: object) -> list[str]:
        """What check-config says of a mount that hears of others, and perhaps tells them."""
        return problems(self.root, self.table(user, **replaced), publish)


def problems(root: Path, table: dict[str, object], publish: bool = False) -> list[str]:
    return [problem.text for problem in check.problems(load(write(root, table, publish)))]


def write(root: Path, table: dict[str, object], publish: bool = False) -> Path:
    """A configuration. table: [hosts]; a key that is None is left out."""
    lines = [f"{key} = {_toml(value)}" for key, value in table.items() if value is not None]
    config = root / "udbad.toml"
    config.write_text(
        "[hosts]\n" + "\n".join(lines) + '\n[mounts.m]\nenabled = false\nudba = "notify"\n'
        f'mount_point = "{root}"\nbranches = ["{root}=rw"]\npublished = {{ share = "{root}" }}\n'
        f"publish = {str(publish).lower()}\n"
    )
    return config


def _toml(value: object) -> str:
    return (
        str(value)
        if isinstance(value, float)
        else str(list(map(str, value)))
        if isinstance(value, list)
        else f"'{value}'"
    )


def words_of(kind: str, root: Path, port: int, files: Sequence[Path]) -> list[str]:
    """files: the certificate of the server, its key, and whose certificates clients may have."""
    certificate, key, authority = files
    if kind == "redis":
        users = root / "users.acl"
        lines = [f"user {user} on >{PASSWORD} {rules}" for user, rules in ACL.items()]
        users.write_text("\n".join(["user default off", *lines, ""]))
        return [
            "--port", "0", "--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key),
            "--tls-ca-cert-file", str(authority), "--tls-auth-clients", "yes", "--aclfile", str(users),
        ]  # fmt: skip
    permitted = [
        f'{{ user: {user}, password: "{PASSWORD}", permissions: {{ publish: {_quoted(subjects)}, '
        f'subscribe: "_INBOX.>" }} }}'
        for user, subjects in MAY.items()
    ]
    config = root / "nats.conf"
    config.write_text(
        f'tls {{ cert_file: "{certificate}", key_file: "{key}", ca_file: "{authority}", verify: true }}\n'
        f"authorization {{ users: [ {', '.join(permitted)} ] }}\n"
    )
    return ["-c", str(config)]


def _quoted(subjects: Sequence[str]) -> str:
    return str(list(subjects)).replace("'", '"')


@pytest.fixture(scope="module", params=["nats", "redis"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("access")
    authority = Authority(root, "authority")
    port = free_port()
    words = words_of(request.param, root, port, (*authority.sign("bus"), authority.certificate))
    with bus_server(request.param, root / "bus", words, port) as server:
        site = Site(server, root, authority, authority.sign("host"))
        assert site.problems("all") == []  # makes the stream
        yield site


def test_what_is_needed_is_enough(site: Site) -> None:
    assert site.problems("client") == []


def test_whose_certificate_it_is(site: Site) -> None:
    """Another authority's, none for ourselves, one that another authority has signed, and a file that is none."""
    other = Authority(site.root, "other")
    (said,) = site.problems(ca_certificate=other.certificate)
    assert "certificate verify failed" in said.lower()
    (said,) = site.problems(certificate=None, key=None)
    assert site.url in said
    certificate, key = other.sign("impostor")
    (said,) = site.problems(certificate=certificate, key=key)
    assert site.url in said
    (said,) = site.problems(ca_certificate=site.secret("client"))
    assert "certificates cannot be used" in said


def test_for_which_address(site: Site) -> None:
    """One of the same authority, but of another machine."""
    port = free_port()
    words = words_of(
        site.server.kind, site.root, port, (*site.authority.sign("elsewhere", "192.0.2.1"), site.authority.certificate)
    )
    with bus_server(site.server.kind, site.root / "elsewhere", words, port):
        (said,) = site.problems(urls=[site.url.replace(str(site.server.port), str(port))])
    assert "127.0.0.1" in said
    assert "not valid for" in said


def test_who_it_is(site: Site) -> None:
    """As the command says it; in a process of its own, as redis-py does not wait for the end of what was refused."""
    for secret in (site.secret("nobody"), None):
        config = write(site.root, site.table(credentials=secret))
        done = subprocess.run(
            [*COMMAND, "check-config", "-c", config], env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == ExitCode.CONFIG
        assert any(text in done.stderr for text in ("uthorization", "invalid username-password pair", "authenticated"))
        assert PASSWORD not in done.stderr


@pytest.mark.parametrize(
    ("user", "publish", "refused"),
    [
        ("mute", False, ["udbad.share.marks"]),
        ("deaf", False, ["udbad.share.changes"]),
        ("client", True, ["udbad.share.marks", "udbad.share.changes"]),
        ("server", False, ["udbad.share.changes", "udbad.share.marks"]),
        ("server", True, ["udbad.share.changes", "udbad.share.marks"]),
        ("all", True, []),
    ],
)
def test_what_may_not_be_done(site: Site, user: str, publish: bool, refused: list[str]) -> None:
    """One line for each subject that this host cannot read, or publish to, as it has to."""
    said = site.problems(user, publish)
    assert [line.partition(":")[0] for line in said] == refused
    for line in said:
        assert "ermission" in line


def test_nothing_may_be_done(site: Site) -> None:
    (said,) = site.problems("stranger")
    assert "ermission" in said


def test_credentials_of_nats(tmp_path: Path) -> None:
    """What nsc makes for a user: a token, and the key that proves whose it is."""
    credentials, other = tmp_path / "user.creds", tmp_path / "other.creds"
    config = tmp_path / "nats.conf"
    config.write_text(write_credentials(credentials, ["$JS.API.>", "udbad.share.marks"]))
    write_credentials(other, [">"])
    with bus_server("nats", tmp_path / "bus", ["-c", str(config)]) as server:
        table: dict[str, object] = {"urls": [server.url], "bound": 2.0, "credentials": credentials}
        assert problems(tmp_path, table) == []
        assert [line.partition(":")[0] for line in problems(tmp_path, table, True)] == ["udbad.share.changes"]
        (said,) = problems(tmp_path, {**table, "credentials": other})
        assert "uthorization" in said
        for text in ("-----BEGIN NATS USER JWT-----\nnonsense\n", other.read_text().replace("\nSU", "\nXX")):
            other.write_text(text)
            (said,) = problems(tmp_path, {**table, "credentials": other})
            assert said == f"{other}: no credentials of NATS"


@pytest.mark.fuse
@pytest.mark.asyncio
async def test_changes_are_told_by_who_may_do_no_more(site: Site, tmp_path: Path) -> None:
    (tmp_path / "export/d").mkdir(parents=True)
    (tmp_path / "export/d/old").touch()
    (tmp_path / "top").mkdir()
    with (
        sshfs(tmp_path / "export", tmp_path / "far") as far,
        mounted(
            [f"{tmp_path / 'top'}=rw", f"{far}=ro"], tmp_path / "mnt", "notify", allow_log="nobody vouches"
        ) as mount,
    ):
        link = MountLink("", "m", str(far), str(mount.control_path))
        subscriber = Subscriber(site.settings("client"), Following("share", str(far), 5.0, 0.0), link)
        watched = Watched(site.settings("server"), "share", "server", str(tmp_path / "export"), "inotify")
        tasks = [asyncio.create_task(watched.run()), asyncio.create_task(subscriber.run())]
        try:
            assert await subscriber.catch_up(SECONDS) == []
            assert is_believed(mount)
            assert not (mount.path / "d/new").exists()
            (tmp_path / "export/d/new").touch()
            assert await subscriber.catch_up(SECONDS) == []
            assert (mount.path / "d/new").exists()
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            watched.close()
