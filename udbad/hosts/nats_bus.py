"""The bus on NATS JetStream: one stream for all branches, subjects within it.

The stream is made by whoever comes first, unless an administrator has made it, with limits of his own. A reader has a
consumer of his own, which the server forgets some time after the connection; its numbers have no holes, or the client
has dropped something.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator
from typing import Any, Final, Self

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nkeys import ErrInvalidSeed, NkeysError, from_seed  # type: ignore[import-untyped]  # has no types

from udbad.errors import ExitCode, UserError
from udbad.hosts.bus import BusError, BusSettings, Delivery, Lost, Ready

_MAX_BYTES: Final = 256 << 20
"""Of a stream that we make."""
_ANOTHER_STREAM: Final = 10060
"""JSStreamNotMatchErr: what is published is for another one (Nats-Expected-Stream), and is thrown away."""
_CLOSING: Final = 1.0
"""Seconds until a connection is given up that does not end."""
_FAILED: Final = (nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError, asyncio.TimeoutError)


class _Said:
    """What the server has said last that is no answer: it gives none to what it does not permit."""

    def __init__(self) -> None:
        self._refusal = ""

    async def note(self, error: Exception) -> None:
        self._refusal = _text(error)

    def why(self, error: BaseException) -> str:
        """For people."""
        if isinstance(error, TimeoutError | nats.errors.TimeoutError) and self._refusal:
            return self._refusal
        return _text(error)


class NatsBus:
    """One connection, which is not made again when it is lost."""

    def __init__(self, client: Client, settings: BusSettings, said: _Said) -> None:
        self._client = client
        self._settings = settings
        self._said = said
        self._stream = re.sub("[^A-Za-z0-9_-]", "_", settings.prefix)
        self._js = client.jetstream(timeout=settings.seconds)
        self.identity = ""

    @classmethod
    async def connect(cls, settings: BusSettings) -> Self:
        """Raises BusError, UserError."""
        errors: list[str] = []
        for url in settings.urls:
            said = _Said()
            try:
                client = await cls._connect_to(url, settings, said)
            except _FAILED as error:
                errors.append(f"{url}: {_text(error)}")
                continue
            bus = cls(client, settings, said)
            try:
                await bus._find_stream()
            except BaseException:
                await bus.close()
                raise
            return bus
        raise BusError("; ".join(errors))

    @staticmethod
    async def _connect_to(url: str, settings: BusSettings, said: _Said) -> Client:
        words: dict[str, Any] = {}
        user = settings.user()
        if user is not None:
            words["user"], words["password"] = user
        elif settings.credentials is not None:
            words["user_credentials"] = _checked(settings.credentials, settings.secret() or "")
        context = settings.tls()
        if context is not None:
            words["tls"] = context
        client = Client()
        try:
            async with asyncio.timeout(settings.seconds):
                await client.connect(
                    [url], allow_reconnect=False, connect_timeout=max(int(settings.seconds), 1), name="udbad",
                    ping_interval=max(int(settings.seconds), 1), max_outstanding_pings=2, error_cb=said.note, **words,
                )  # fmt: skip
        except BaseException:
            await _close(client)
            raise
        return client

    async def _find_stream(self) -> None:
        try:
            found = await self._info()
            if found is None:
                await self._js.add_stream(
                    StreamConfig(
                        name=self._stream, subjects=[f"{self._settings.prefix}.>"], storage=StorageType.FILE,
                        retention=RetentionPolicy.LIMITS, discard=DiscardPolicy.OLD,
                        max_age=self._settings.keep, max_bytes=_MAX_BYTES,
                    )
                )  # fmt: skip
                found = await self._info()
        except _FAILED as error:
            raise BusError(f"JetStream: {self._said.why(error)}") from None
        if found is None:
            raise BusError(f"stream {self._stream} has gone")
        self.identity = found

    async def _info(self) -> str | None:
        """When the stream was made, which no other one of its name has; None: there is none."""
        # nats-py's own has no such field.
        answer = await self._client.request(f"$JS.API.STREAM.INFO.{self._stream}", b"", timeout=self._settings.seconds)
        told = json.loads(answer.data)
        if "error" in told:
            if told["error"].get("code") == 404:
                return None
            raise BusError(f"stream {self._stream}: {told['error'].get('description')}")
        return str(told["created"])

    async def publish(self, subject: str, data: bytes) -> None:
        try:
            await self._js.publish(subject, data, timeout=self._settings.seconds, stream=self._stream)
        except _FAILED as error:
            raise BusError(f"{subject}: {self._said.why(error)}") from None

    async def may_publish(self, subject: str) -> None:
        try:
            await self._js.publish(subject, b"", timeout=self._settings.seconds, stream=f"{self._stream}-none")
        except nats.js.errors.APIError as error:
            if error.err_code != _ANOTHER_STREAM:
                raise BusError(f"{subject}: {_text(error)}") from None
        except _FAILED as error:
            raise BusError(f"{subject}: {self._said.why(error)}") from None

    async def read(self, subject: str, after: str | None, ready: Ready | None = None) -> AsyncIterator[Delivery]:
        # With a name, it is asked for by a subject that ends with the one that is read: each can be permitted alone.
        where = ConsumerConfig(
            name=secrets.token_hex(8),
            ack_policy=AckPolicy.NONE,
            deliver_policy=DeliverPolicy.NEW if after is None else DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=None if after is None else int(after) + 1,
            inactive_threshold=60.0,
        )
        try:
            reading = await self._js.subscribe(subject, stream=self._stream, config=where, manual_ack=True)
            if ready is not None:
                ready()
            number = 0
            async for message in reading.messages:
                sequence = message.metadata.sequence
                number += 1
                if sequence.consumer != number:
                    raise BusError(f"{subject}: messages were dropped on the way")
                yield Delivery(str(sequence.stream), message.data)
        except nats.js.errors.NotFoundError:
            raise Lost(f"{subject}: the stream has gone") from None
        except _FAILED as error:
            raise BusError(f"{subject}: {self._said.why(error)}") from None
        raise BusError(f"{subject}: the connection was lost")

    async def close(self) -> None:
        await _close(self._client)


async def _close(client: Client) -> None:
    """Never fails, nor waits for long: after a handshake of TLS that has failed, asyncio waits for its end for ever."""
    try:
        async with asyncio.timeout(_CLOSING):
            await client.close()
    except _FAILED:
        pass


def _checked(path: str, text: str) -> str:
    """path. Raises UserError when what is in the file cannot be used, which the library does in ways of its own."""
    seed = re.search(r"-BEGIN USER NKEY SEED-+\s+(\S+)\s", text)
    try:
        if seed is None or "-BEGIN NATS USER JWT-" not in text:
            raise ErrInvalidSeed
        from_seed(bytearray(seed[1].encode())).wipe()
    except (NkeysError, ValueError):
        raise UserError(f"{path}: no credentials of NATS", ExitCode.CONFIG) from None
    return path


def _text(error: BaseException) -> str:
    return str(error).removeprefix("nats: ") or type(error).__name__
