"""What is asked of a message bus: little enough that more than one can be it.

A subject is a stream that keeps what is published, in one order, for some time, and lets a reader go on where he was.
Nothing is believed of it beyond that: what it loses is found by message.py, and how long it takes by marks.
Nothing here connects anew. Whatever fails is BusError, after a time that is bounded; the caller begins from the
beginning, with another bus.
"""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self
from urllib.parse import urlsplit

from udbad.errors import ExitCode, UserError

if TYPE_CHECKING:
    from udbad.settings.file import HostsSettings


class BusError(Exception):
    """The bus cannot be reached, has refused something, or has not answered; the message is for people."""


class Lost(BusError):
    """A reader cannot go on where he was: that is not kept any more, or is in another stream."""


@dataclass(frozen=True, slots=True)
class BusSettings:
    """Where the bus is. seconds: how long an answer may take. ca, certificate, key, credentials: paths of files."""

    urls: tuple[str, ...]
    prefix: str = "udbad"
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    credentials: str | None = None
    seconds: float = 5.0
    keep: float = 3600.0
    """Seconds for which messages are kept, where this is the first to use the stream."""

    @classmethod
    def of(cls, table: HostsSettings) -> Self:
        """From the configuration. Raises UserError when it has no bus."""
        if not table.urls:
            raise UserError("the configuration has no [hosts] with urls: there is nobody to tell", ExitCode.CONFIG)
        return cls(
            tuple(table.urls), table.prefix, table.ca_certificate, table.certificate, table.key, table.credentials,
            min(table.bound / 2, 5.0),
        )  # fmt: skip

    def tls(self) -> ssl.SSLContext | None:
        """None where it is not spoken. Raises UserError for a file that cannot be used."""
        secure = urlsplit(self.urls[0]).scheme in ("tls", "rediss")
        if not secure and self.ca is None and self.certificate is None:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise UserError(f"hosts: certificates cannot be used: {error}", ExitCode.CONFIG) from None
        return context

    def secret(self) -> str | None:
        """What is in the file of the credentials. Raises UserError when it cannot be read, or others can read it."""
        if self.credentials is None:
            return None
        try:
            with open(self.credentials, encoding="utf-8") as file:
                if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                    raise UserError(f"{self.credentials}: others may read it: chmod 600", ExitCode.CONFIG)
                return file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            text = error.strerror if isinstance(error, OSError) else "not text"
            raise UserError(f"{self.credentials}: {text}", ExitCode.CONFIG) from None

    def user(self) -> tuple[str, str] | None:
        """Name and password in the file of the credentials, `NAME:PASSWORD`."""
        secret = self.secret()
        if secret is None or secret.startswith("-----"):
            return None
        name, _, password = secret.partition(":")
        return name, password


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message of a subject. position: where it is, for `Bus.read`."""

    position: str
    data: bytes


class Bus(Protocol):
    """One connection."""

    @property
    def identity(self) -> str:
        """Of the stream, as it was when the connection was made: another one begins anew."""

    async def publish(self, subject: str, data: bytes) -> None:
        """Returns when the bus has it. Raises BusError."""

    async def may_publish(self, subject: str) -> None:
        """Raises BusError when it would not be taken. Nothing is published."""

    def read(self, subject: str, after: str | None, ready: Ready | None = None) -> AsyncIterator[Delivery]:
        """What was published after a position, and what will be; None: from now on.

        ready: called once everything from then on is going to be delivered. Raises BusError.
        """

    async def close(self) -> None:
        """Never fails."""


class Ready(Protocol):
    def __call__(self) -> None: ...


def subject(prefix: str, branch: str, what: str) -> str:
    """what: "changes" or "marks" (message.py)."""
    return f"{prefix}.{branch}.{what}"


async def connect(settings: BusSettings) -> Bus:
    """Raises BusError; UserError where it cannot be tried at all."""
    scheme = urlsplit(settings.urls[0]).scheme
    try:
        if scheme in ("redis", "rediss"):
            from udbad.hosts.redis_bus import RedisBus  # one library is enough

            return await RedisBus.connect(settings)
        from udbad.hosts.nats_bus import NatsBus

        return await NatsBus.connect(settings)
    except ModuleNotFoundError as error:
        extra = "redis" if scheme in ("redis", "rediss") else "nats"
        if error.name is None or error.name.partition(".")[0] not in (extra, "nkeys"):  # that of `.creds`
            raise
        text = f"{scheme}: needs the Python package of {extra}: pip install udbad[{extra}]"
        raise UserError(text, ExitCode.CONFIG) from None
