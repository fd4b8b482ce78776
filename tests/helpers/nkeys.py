"""An operator of NATS, an account and a user of it, and the `.creds` of the user, as the tool nsc makes them."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any, Final

import nkeys  # type: ignore[import-untyped]  # has no types

_OPERATOR: Final = nkeys.PREFIX_BYTE_OPERATOR
_ACCOUNT: Final = nkeys.PREFIX_BYTE_ACCOUNT
_USER: Final = nkeys.PREFIX_BYTE_USER
_ANY: Final = -1


def _pair(prefix: int) -> Any:
    return nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), prefix)))


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _token(issuer: Any, subject: Any, name: str, what: dict[str, Any]) -> str:
    """A JSON web token as NATS has them (docs.nats.io, JWT)."""
    claims = {
        "jti": name, "iat": int(time.time()), "iss": issuer.public_key.decode(), "sub": subject.public_key.decode(),
        "name": name, "nats": {"version": 2, **what},
    }  # fmt: skip
    parts = [_text(json.dumps(one).encode()) for one in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims)]
    signed = ".".join(parts)
    return f"{signed}.{_text(issuer.sign(signed.encode()))}"


def _account(operator: Any, name: str, limits: dict[str, int]) -> tuple[Any, str]:
    """The pair of keys of a new one, and how the server's configuration names it."""
    pair = _pair(_ACCOUNT)
    usual = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), _ANY)
    token = _token(operator, pair, name, {"type": "account", "limits": {**usual, **limits, "wildcards": True}})
    return pair, f"{pair.public_key.decode()}: {token}"


def write_credentials(path: Path, publish: list[str]) -> str:
    """Those of a user who may publish to these subjects, and read all; what the server's configuration must have."""
    operator, user = _pair(_OPERATOR), _pair(_USER)
    storage = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), _ANY)
    account, named = _account(operator, "A", storage)
    system, also = _account(operator, "SYS", {})
    of_user = _token(
        account, user, "U",
        {"type": "user", "pub": {"allow": publish}, "sub": {}, "subs": _ANY, "data": _ANY, "payload": _ANY},
    )  # fmt: skip
    of_operator = _token(operator, operator, "O", {"type": "operator"})
    path.write_text(
        f"-----BEGIN NATS USER JWT-----\n{of_user}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
    )
    path.chmod(0o600)
    return (
        f"operator: {of_operator}\nsystem_account: {system.public_key.decode()}\nresolver: MEMORY\n"
        f"resolver_preload: {{ {named}, {also} }}\n"
    )
