"""The control sockets under abuse: junk, too much, the wrong user, clients that hang, a thousand of them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.t5_daemon.daemon import DEADLINE, Daemon
from udbad.control import protocol
from udbad.control.protocol import MAX_LINE, Message, bind

pytestmark = pytest.mark.fuse

JUNK = [
    (b"\n", "not a request: not JSON"),
    (b"nonsense\n", "not a request: not JSON"),
    (b"[" * 5000 + b"\n", "not a request: not JSON"),
    (b'"op"\n', 'not a request: must be an object with "op"'),
    (b'{"op": 3}\n', 'not a request: must be an object with "op"'),
    (b'{"op": "ping", "version": 99}\n', "version 99 of the protocol is not known, this is 1"),
    (b'{"op": "format"}\n', "unknown operation 'format'"),
    (b'{"op": "\xff"}\n', "not a request: not JSON"),
    (b"x" * (MAX_LINE + 10) + b"\n", "request too long"),
]


def talk(path: str, data: bytes) -> Message:
    """Send bytes, return the one answer."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE)
        client.connect(path)
        try:
            client.sendall(data)
        except BrokenPipeError:
            pass  # it had enough of it
        with client.makefile("rb") as stream:
            answer: Message = json.loads(stream.readline())
    return answer


@pytest.fixture
def sockets(daemon: Daemon) -> Iterator[list[str]]:
    """The supervisor's socket and that of a mount process, both of a running daemon."""
    daemon.add("a")
    daemon.start()
    process = next(Path(daemon.run_dir).glob("si_*")) / "control"
    yield [f"{daemon.run_dir}/udbad.sock", str(process)]
    daemon.stop()
    assert "Traceback" not in daemon.log()


def test_junk_is_answered_and_harms_nobody(sockets: list[str]) -> None:
    for path in sockets:
        for data, error in JUNK:
            answer = talk(path, data)
            assert not answer["ok"]
            assert answer["error"].startswith(error), (path, data[:40], answer)
        assert talk(path, b'{"op": "ping"}\n')["ok"]


OPERATIONS = [
    {
        *("ping", "status", "reload", "restart", "change", "mount", "log-level"),
    },
    {
        *("ping", "status", "stats", "metrics", "flush", "udba", "where", "why", "invalidate", "busy", "branches"),
        *("reconfigure", "configured", "remount", "log-level", "mvdown", "sync", "sync-status", "sync-stop"),
        *("write-state", "renew", "feed", "lease", "heard", "subscribers", "published"),
    },
]  # all but "stop", of the supervisor and of a mount process
FIELDS = {
    *("mount", "force", "request", "mount_point", "options", "level", "keep_mounts", "mode", "path", "branch", "edits"),
    *(
        "configured",
        "overwrite_lower",
        "keep_upper",
        "source",
        "target",
        "reads",
        "command",
        "hints",
        "until",
        "anew",
        "hosts",
        "gaps",
        "told",
        "last",
        "by",
        "branches",
        "wait",
    ),
}
NONSENSE: list[object] = [
    *(None, True, 3, -1.5, 10**400, "", "/", "..", "\0", "a\0b", "\ud800", "/\udfff/x", "\udcff", "x" * 3000),
    *([], [3], [None], [[]], [["add", 3]], [["del", "a\0"]], [["mod", "\ud800=ro"]], [["append", "x" * 9000]]),
    *({}, {"op": None}, {"op": []}, {"op": "udba"}, {"op": "udba", "mode": "\ud800"}, {"op": "branches", "edits": 3}),
]


def test_no_value_of_a_field_is_an_internal_error(sockets: list[str], daemon: Daemon) -> None:
    """NUL, surrogates that no path has, wrong types, and fields that are not there."""
    before = [daemon.state("a")["process"][key] for key in ("udba", "branches")]
    for path, operations in zip(sockets, OPERATIONS, strict=True):
        known = talk(path, b'{"op": "?"}\n')["error"].partition("known are ")[2].split(", ")
        ends = {"stop", "retire"} & set(known)  # the first is tried below, the other looks at no field
        assert {*operations} == set(known) - ends, "an operation that is not tried here"
        for operation in sorted(operations):
            requests: list[dict[str, object]] = [{"op": operation, field: "work"} for field in FIELDS]
            requests += [{"op": operation, "mount": "a", field: "x" * 60000} for field in FIELDS]
            for value in NONSENSE:
                everywhere = dict.fromkeys(FIELDS, value)
                requests += [{"op": operation, **everywhere}, {"op": operation, **everywhere, "mount": "a"}]
            for request in requests:
                answer = talk(path, json.dumps(request).encode() + b"\n")
                assert "internal error" not in str(answer.get("error")), (request, answer)
    for path in sockets:
        for force in (value for value in NONSENSE if value is not True):
            answer = talk(path, json.dumps({"op": "stop", "force": force, "keep_mounts": force}).encode() + b"\n")
            assert not answer["ok"], answer
    assert [daemon.state("a")["process"][key] for key in ("udba", "branches")] == before


def test_a_line_without_end_and_a_connection_without_a_word(sockets: list[str]) -> None:
    for path in sockets:
        for data in (b"", b'{"op": "ping"', b"x" * 1000):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(DEADLINE)
                client.connect(path)
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                assert client.recv(100) == b""


def test_a_thousand_clients_that_hang_keep_nobody_out(sockets: list[str]) -> None:
    for path in sockets:
        with ExitStack() as stack:
            for number in range(1000):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.connect(path)
                if number % 2:
                    client.sendall(b'{"op": ')
            assert talk(path, b'{"op": "ping"}\n')["ok"]
            assert talk(path, b'{"op": "status"}\n')["ok"]


def test_another_user_is_refused(sockets: list[str], daemon: Daemon) -> None:
    """Mode 0600 keeps him from connecting; should it be changed, he is asked who he is."""
    os.chmod(daemon.run_dir, 0o755)
    for path in sockets:
        assert as_nobody(path) == b"PermissionError"
        os.chmod(path, 0o666)
        assert json.loads(as_nobody(path))["error"] == "not permitted"


def as_nobody(path: str) -> bytes:
    """What a process of another user gets. Forked: he may not be able to start this interpreter."""
    answer, answer_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os.write(answer_end, json.dumps(talk(path, b'{"op": "status"}\n')).encode())
        except BaseException as error:
            os.write(answer_end, type(error).__name__.encode())
        os._exit(0)
    os.close(answer_end)
    with os.fdopen(answer, "rb") as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    return said


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = os.path.relpath(tmp_path / "s")
    first = bind(path)
    with pytest.raises(OSError, match="another process answers"):
        bind(path)
    first.close()
    second = bind(path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    second.close()
    (tmp_path / "f").write_text("mine")
    with pytest.raises(OSError, match="is not a socket"):
        bind(os.path.relpath(tmp_path / "f"))
    assert protocol.VERSION == 1
