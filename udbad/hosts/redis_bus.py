"""The bus on Redis: a stream for each subject, and a key that says which streams these are.

What has been wiped, or was lost in a failover, shows by the publishers' own numbers; the key, which goes with it, shows
it at the next connection. Streams are cut when they get long: nobody reads what is old.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any, Final, Self

from redis.asyncio import Redis
from redis.asyncio.retry import Retry as Retries
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from udbad.errors import ExitCode, UserError
from udbad.hosts.bus import BusError, BusSettings, Delivery, Lost, Ready

_MOST: Final = 50_000
"""Messages in a stream, about."""
_AT_ONCE: Final = 100
_NO_POSITION: Final = "0-0"
"""Before all messages; none has it."""
_FAILED: Final = (RedisError, OSError, TimeoutError)


class RedisBus:
    """One connection for what is published, one for each reader."""

    def __init__(self, client: Redis, settings: BusSettings) -> None:
        self._client = client
        self._settings = settings
        self.identity = ""

    @classmethod
    async def connect(cls, settings: BusSettings) -> Self:
        """Raises BusError, UserError."""
        errors: list[str] = []
        for url in settings.urls:
            bus = cls(_client(url, settings), settings)
            try:
                await bus._identify()
            except _FAILED as error:
                await bus.close()
                errors.append(f"{url}: {error or type(error).__name__}")
                continue
            except BaseException:
                await bus.close()
                raise
            return bus
        raise BusError("; ".join(errors))

    async def _identify(self) -> None:
        key = f"{self._settings.prefix}.identity"
        found = await self._client.get(key)
        if found is None:
            await self._client.set(key, secrets.token_hex(16), nx=True)
            found = await self._client.get(key)
        self.identity = found.decode(errors="replace") if isinstance(found, bytes) else ""

    async def publish(self, subject: str, data: bytes) -> None:
        try:
            await self._client.xadd(subject, {b"m": data}, maxlen=_MOST, approximate=True)
        except _FAILED as error:
            raise BusError(f"{subject}: {error or type(error).__name__}") from None

    async def may_publish(self, subject: str) -> None:
        try:
            await self._client.xadd(subject, {b"m": b""}, id=_NO_POSITION)
        except NoPermissionError as error:
            raise BusError(f"{subject}: {error}") from None
        except ResponseError:
            return  # the command was permitted, and then refused for its position
        except _FAILED as error:
            raise BusError(f"{subject}: {error or type(error).__name__}") from None

    async def read(self, subject: str, after: str | None, ready: Ready | None = None) -> AsyncIterator[Delivery]:
        try:
            position = after or await self._last(subject)
            await self._client.xread({subject: position}, count=1)  # what is not permitted is refused before `ready`
            if ready is not None:
                ready()
            while True:
                found: Any = await self._client.xread(
                    {subject: position}, count=_AT_ONCE, block=int(self._settings.seconds * 500)
                )
                for _, messages in found or ():
                    for number, fields in messages:
                        position = number.decode()
                        if b"m" not in fields:
                            raise Lost(f"{subject}: something else is in the stream")
                        yield Delivery(position, fields[b"m"])
        except _FAILED as error:
            raise BusError(f"{subject}: {error or type(error).__name__}") from None

    async def _last(self, subject: str) -> str:
        found: Any = await self._client.xrevrange(subject, count=1)
        return found[0][0].decode() if found else _NO_POSITION

    async def close(self) -> None:
        try:
            await self._client.aclose()
        except _FAILED:
            pass


def _client(url: str, settings: BusSettings) -> Redis:
    words: dict[str, Any] = {}
    user = settings.user()
    if user is not None:
        words["username"], words["password"] = user
    if url.startswith("rediss"):
        settings.tls()  # raises for files that cannot be used
        words |= {
            "ssl_ca_certs": settings.ca, "ssl_certfile": settings.certificate, "ssl_keyfile": settings.key,
            "ssl_check_hostname": True,  # older versions do not by themselves
        }  # fmt: skip
    try:
        return Redis.from_url(
            url, socket_timeout=settings.seconds, socket_connect_timeout=settings.seconds,
            retry=Retries(NoBackoff(), 0), client_name="udbad", **words,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{url}: {error}", ExitCode.CONFIG) from None
