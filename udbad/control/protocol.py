"""The control protocol, version 1, seen from both ends: JSON objects, one a line, over a unix socket.

A request has "op", may have "version", and whatever the operation needs; an answer has "ok" and either
the result or "error" (and "code", an ExitCode, where there is a fitting one). Lines have at most MAX_LINE
bytes. server.py answers, here are the lines themselves and the clients.
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from udbad.errors import ExitCode, UserError

VERSION: Final = 1
MAX_LINE: Final = 512 * 1024
"""Bytes of a request. Some hundred branches with long paths, twice, are in one that reconfigures a mount."""
MAX_ANSWER: Final = 16 * 1024 * 1024
"""Bytes of an answer that a client takes."""
MAX_CLIENTS: Final = 64
"""Clients served at a time; one more ends the one that has been silent for longest."""
BACKLOG: Final = 1024
"""Clients that may wait to be accepted; accepting is quick, so this is for a crowd or a busy moment."""
IDLE_SECONDS: Final = 60.0
SEND_SECONDS: Final = 10.0

NOT_ANSWERING: Final = "not answering"
"""State of a mount whose process is there and gives no answer: stopped, or its event loop hangs."""

Message = dict[str, Any]


def bind(path: str) -> socket.socket:
    """A listening socket; a stale one of an earlier process is replaced.

    Mode 0600. Raises OSError: EADDRINUSE when a living process answers there, EEXIST when something else has the name.
    """
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.settimeout(5.0)
        probe.connect(path)
    except FileNotFoundError:
        pass
    except (ConnectionRefusedError, ConnectionResetError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "exists and is not a socket", path) from None
        os.unlink(path)
    else:
        raise OSError(errno.EADDRINUSE, f"another process answers on {path}")
    finally:
        probe.close()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(previous)
    return sock


def go_on(fd: int) -> socket.socket:
    """A socket that another process has listened on; fd: owned from here on. Raises OSError."""
    sock = socket.socket(fileno=fd)
    sock.listen(BACKLOG)  # whoever connects is told that it is us, SO_PEERCRED
    return sock


def may_ask(getsockopt: Callable[[int, int, int], bytes]) -> bool:
    """Whether the process at the other end (unix(7), SO_PEERCRED) is root's or of our own user."""
    return peer(getsockopt)[1] in (0, os.getuid())


def peer(getsockopt: Callable[[int, int, int], bytes]) -> tuple[int, int, int]:
    """pid, uid and gid at the other end, in our own namespaces; pid 0 for a process that ours does not show."""
    pid, uid, gid = struct.unpack("3i", getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid, gid


def server_pid(path: str) -> int:
    """Who listens on a socket, as the kernel has it: that process need not answer, and may be in another pid namespace.

    0 when ours does not show it. Raises OSError when nobody listens.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as client:
        client.connect(path)
        return peer(client.getsockopt)[0]


def encode(message: Message) -> bytes:
    """One line. Undecodable bytes of paths travel as the surrogates of os.fsdecode()."""
    return json.dumps(message).encode() + b"\n"


def refusal(text: str, code: ExitCode = ExitCode.FAILURE) -> Message:
    return {"ok": False, "version": VERSION, "error": text, "code": int(code)}


def decode_request(line: bytes, operations: object) -> Message:
    """Raises UserError, whose message is the answer, unless the line is a request for one of `operations`."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError("not a request: not JSON") from None
    if not isinstance(request, dict) or not isinstance(request.get("op"), str):
        raise UserError('not a request: must be an object with "op"')
    if request.get("version", VERSION) != VERSION:
        raise UserError(f"version {request['version']!r} of the protocol is not known, this is {VERSION}")
    known = operations if isinstance(operations, dict) else {}
    if request["op"] not in known:
        raise UserError(f"unknown operation {request['op']!r}; known are {', '.join(sorted(known))}")
    return request


def text_of(request: Message, key: str, default: str | None = None) -> str:
    """The string `key` of a request, fit for a path: without NUL, and os.fsencode() takes it.

    default: when the request has no such key, None: it must have. Raises UserError (OPTION).
    """
    return checked_text(request.get(key, default), key)


def path_of(request: Message) -> Sequence[bytes]:
    """The names of the path in the mount that a request is about. Raises UserError."""
    parts = os.fsencode(text_of(request, "path", "")).split(b"/")
    parts = [part for part in parts if part not in (b"", b".")]
    if b".." in parts:
        raise UserError("a path with '..' is not looked up here", ExitCode.OPTION)
    return parts


def checked_text(value: object, key: str) -> str:
    """`text_of` for a value that is not a field itself, such as an element of a list."""
    if not isinstance(value, str):
        raise UserError(f"{key} must be a string", ExitCode.OPTION)
    try:
        if b"\0" not in os.fsencode(value):
            return value
    except UnicodeEncodeError:  # a surrogate that os.fsdecode() does not make
        pass
    raise UserError(f"{key} has characters that no path can have", ExitCode.OPTION)


def flag_of(request: Message, key: str) -> bool:
    """The boolean `key` of a request, false when it has none. Raises UserError (OPTION)."""
    value = request.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{key} must be true or false", ExitCode.OPTION)
    return value


def number_of(request: Message, key: str) -> float:
    """The finite number `key` of a request. Raises UserError (OPTION)."""
    value = request.get(key)
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise UserError(f"{key} must be a number", ExitCode.OPTION)


def edits_of(request: Message) -> list[tuple[str, str]]:
    """The (option, value) pairs in "edits" of a request, none when it has no such key. Raises UserError (OPTION)."""
    edits = request.get("edits", [])
    if not isinstance(edits, list) or not all(isinstance(edit, list) and len(edit) == 2 for edit in edits):
        raise UserError("edits must be a list of [option, value]", ExitCode.OPTION)
    return [(checked_text(key, "edits"), checked_text(value, "edits")) for key, value in edits]


def hints_of(request: Message) -> list[tuple[str, str]]:
    """The (path, kind) pairs in "hints" of a request: [path, kind] each. Raises UserError (OPTION)."""
    hints = request.get("hints")
    if not isinstance(hints, list) or not all(isinstance(hint, list) and len(hint) == 2 for hint in hints):
        raise UserError("hints must be a list of [path, kind]", ExitCode.OPTION)
    return [(checked_text(path, "hints"), checked_text(kind, "hints")) for path, kind in hints]


def decode_answer(line: bytes, path: str) -> Message:
    """What a server at `path` has said. Raises ConnectionError unless it is one whole line of JSON."""
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not line.endswith(b"\n") or not isinstance(answer, dict):
        raise ConnectionError(f"{path}: no whole answer")
    return answer


def ask(path: str, request: Message, timeout: float) -> Message:
    """One request, one answer; for clients. Raises OSError (TimeoutError: no answer after `timeout` seconds)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
        # For connect, which with a timeout of Python's would fail at once (EAGAIN) while the queue is full.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(timeout), 0))
        try:
            client.connect(path)
        except BlockingIOError:
            raise TimeoutError from None
        client.settimeout(timeout)
        client.sendall(encode({"version": VERSION, **request}))
        with client.makefile("rb") as stream:
            return decode_answer(stream.readline(MAX_ANSWER), path)
