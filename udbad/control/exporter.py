"""The metrics endpoint: reads mount processes over their control sockets while somebody scrapes.

One endpoint serves any number of mounts: the supervisor's all of them, that of a standalone mount itself.
All are asked at once, and who has not answered when DEADLINE is over counts as down (udbad_mount_up 0), so
a hung mount delays nobody. Runs in the threads of the HTTP server; must not touch a mount point, and
never fails because of a mount process.
"""

from __future__ import annotations

import json
import logging
import selectors
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from time import monotonic
from typing import Final

from udbad import metrics
from udbad.control.protocol import MAX_ANSWER, VERSION, encode, peer
from udbad.errors import ExitCode, UserError
from udbad.metrics import Reading, Samples, Server

log = logging.getLogger(__name__)

DEADLINE: Final = 0.7
"""Seconds in which a mount process must have answered; the scrape is to take less than one."""

_REQUEST: Final = encode({"op": "metrics", "version": VERSION})

Targets = Callable[[], Mapping[str, str]]
"""Name of each mount that should be there to the path of its control socket; called from any thread."""
Keeper = Callable[[], Mapping[str, Samples]]
"""Name of each mount to what its keeper knows (metrics of origin keeper but udbad_mount_up); any thread."""


def parse_address(listen: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 HOST in []; the form was checked with the options."""
    host, _, port = listen.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def start(
    host: str,
    port: int,
    targets: Targets,
    keeper: Keeper = dict,
    *,
    certificate: str | None = None,
    key: str | None = None,
) -> Server:
    """Serve the metrics of all `targets` until closed; returns the running server.

    port: 0 takes a free one. certificate, key: paths of PEM files; with them it is https. Raises UserError.
    """
    tls = {"certfile": certificate, "keyfile": key} if certificate is not None and key is not None else None
    try:
        server = metrics.serve(host, port, lambda: read(targets(), keeper()), tls)
    except OSError as error:
        raise UserError(f"metrics on {host}:{port}: {error.strerror or error}", ExitCode.FAILURE) from error
    log.info(
        "metrics on %s://%s:%d/metrics", "https" if tls else "http", f"[{host}]" if ":" in host else host, server.port
    )
    return server


def read(paths: Mapping[str, str], kept: Mapping[str, Samples]) -> dict[str, Reading]:
    """Ask every mount process at once; takes DEADLINE seconds at most."""
    end = monotonic() + DEADLINE
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        pids: dict[str, int] = {}
        answers: dict[str, bytes] = {}
        for name, path in paths.items():
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
            # Non-blocking: a stopped process leaves its queue full, and connect would wait.
            sock.setblocking(False)
            try:
                sock.connect(path)
                pids[name] = peer(sock.getsockopt)[0]  # known even when it is stopped
                sock.send(_REQUEST)
            except OSError:
                continue
            answers[name] = b""
            selector.register(sock, selectors.EVENT_READ, name)
        while selector.get_map() and (left := end - monotonic()) > 0:
            for ready, _ in selector.select(left):
                data = _receive(ready.fileobj)
                answers[ready.data] += data
                if not data or data.endswith(b"\n") or len(answers[ready.data]) > MAX_ANSWER:
                    selector.unregister(ready.fileobj)
    return {
        name: Reading(_samples(answers.get(name, b"")), pids.get(name), dict(kept.get(name, {})))
        for name in {**paths, **kept}
    }


def _receive(sock: object) -> bytes:
    assert isinstance(sock, socket.socket)
    try:
        return sock.recv(1 << 18)
    except OSError:
        return b""


def _samples(line: bytes) -> Samples | None:
    if not line.endswith(b"\n"):
        return None
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    samples = answer.get("metrics") if isinstance(answer, dict) else None
    return samples if isinstance(samples, dict) else None
