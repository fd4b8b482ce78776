"""The control server without a daemon, on both event loops: the same bytes get the same answers."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from tests.helpers.mount import DEADLINE
from udbad.control import server as server_module
from udbad.control import trioserver
from udbad.control.asyncserver import AsyncServer
from udbad.control.protocol import MAX_CLIENTS, Message, ask, bind
from udbad.control.server import Command
from udbad.errors import ExitCode, UserError

Serving = tuple[str, Callable[[], None]]
"""Path of the socket, and what ends the waiting of `later`."""

MAX_LINE = 64 * 1024
"""In these tests: what hypothesis can still show somebody."""


def commands(wait: Callable[[], Awaitable[object]]) -> dict[str, Command]:
    async def now(request: Message) -> Message:
        return {"echo": request.get("word")}

    async def later(request: Message) -> Message:
        await wait()
        return {}

    async def refuses(request: Message) -> Message:
        raise UserError("not today", ExitCode.REFUSED)

    async def cannot(request: Message) -> Message:
        raise OSError(errno.ENOSPC, "no room", "/somewhere")

    async def cannot_say(request: Message) -> Message:
        raise TimeoutError

    async def fails(request: Message) -> Message:
        raise RuntimeError("a bug")

    return {one.__name__: one for one in (now, later, refuses, cannot, cannot_say, fails)}


@contextmanager
def on_asyncio(path: str) -> Iterator[Serving]:
    loop = asyncio.SelectorEventLoop()  # new_event_loop() is another one as soon as somebody has imported trio_asyncio
    gate = asyncio.Event()
    server = AsyncServer(commands(gate.wait))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(bind(path)), loop).result(DEADLINE)
        yield path, lambda: (loop.call_soon_threadsafe(gate.set), None)[1]
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(DEADLINE)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def on_trio(path: str) -> Iterator[Serving]:
    started: queue.SimpleQueue[tuple[trio.lowlevel.TrioToken, trio.Event, trio.CancelScope]] = queue.SimpleQueue()

    async def main() -> None:
        gate = trio.Event()
        listener = bind(path)
        with trio.CancelScope() as scope, listener:
            started.put((trio.lowlevel.current_trio_token(), gate, scope))
            await trioserver.serve(listener, commands(gate.wait))

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    token, gate, scope = started.get(timeout=DEADLINE)
    try:
        yield path, lambda: token.run_sync_soon(gate.set)
    finally:
        token.run_sync_soon(scope.cancel)
        thread.join()


LOOPS: dict[str, Callable[[str], AbstractContextManager[Serving]]] = {"asyncio": on_asyncio, "trio": on_trio}


@pytest.fixture(params=LOOPS)
def serving(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Serving]:
    with LOOPS[request.param](os.path.relpath(tmp_path / "s")) as found:  # tmp_path may be too long for unix(7)
        yield found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The paths of two sockets, one on each event loop."""
    base = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(server_module, "MAX_LINE", MAX_LINE)
        yield [stack.enter_context(run(os.path.relpath(base / name)))[0] for name, run in LOOPS.items()]


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE)
    client.connect(path)
    return client


def exchange(path: str, pieces: list[bytes]) -> bytes:
    """Everything that comes back when these bytes are sent, one piece after the other, and no more."""
    received = b""
    with connect(path) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it had enough of it
        try:
            while data := client.recv(1 << 16):
                received += data
        except ConnectionResetError:
            pass  # it did not read all of it
    return received


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
REQUESTS = st.fixed_dictionaries(
    {"op": st.sampled_from(["now", "refuses", "cannot", "cannot_say", "format", ""]) | VALUES},
    optional={"version": st.sampled_from([1, 1.0, "1", 2]) | VALUES, "word": VALUES},
)
LINES = (
    st.binary(max_size=40)
    | VALUES.map(lambda value: json.dumps(value).encode())
    | REQUESTS.map(lambda value: json.dumps(value).encode())
    | st.integers(-3, 3).map(lambda more: b'{"op": "now", "word": "%s"}' % (b"x" * (MAX_LINE - 26 + more)))
)
NOW = b'{"op": "now"}'


@given(st.lists(LINES, max_size=4), st.booleans(), st.lists(st.integers(0, 2 * MAX_LINE), max_size=3))
@example([b"x" * MAX_LINE, NOW], True, [])
@example([b"x" * (MAX_LINE + 1), NOW], True, [])
@example([b"x" * (MAX_LINE - 100), NOW * 20, NOW], True, [])  # more than MAX_LINE has come, no line is that long
@example([NOW, b'{"op": '], False, [20])
def test_the_same_bytes_get_the_same_answers(both: list[str], lines: list[bytes], ended: bool, cuts: list[int]) -> None:
    """On either event loop, and in whatever pieces they come."""
    data = b"\n".join(lines) + b"\n" * ended
    ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    pieces = [data[start:end] for start, end in pairwise(ends)]
    first, second = (exchange(path, pieces) for path in both)
    assert first == second
    assert first == exchange(both[0], [data])
    complete = data.split(b"\n")[:-1]
    answers = [json.loads(line) for line in first.splitlines()]
    too_long = [position for position, line in enumerate(data.split(b"\n")) if len(line) > MAX_LINE]
    assert len(answers) == (too_long[0] + 1 if too_long else len(complete))
    assert all(answer["version"] == 1 and (answer["ok"] or answer["error"]) for answer in answers)


def test_what_a_command_raises_is_the_answer(serving: Serving) -> None:
    path, _ = serving
    refusals = {op: ask(path, {"op": op}, DEADLINE) for op in ("refuses", "cannot", "cannot_say")}
    assert {op: (answer["ok"], answer["error"], answer["code"]) for op, answer in refusals.items()} == {
        "refuses": (False, "not today", ExitCode.REFUSED),
        "cannot": (False, "[Errno 28] no room: '/somewhere'", ExitCode.FAILURE),
        "cannot_say": (False, "TimeoutError", ExitCode.FAILURE),
    }


def test_clients_are_served_side_by_side(serving: Serving) -> None:
    path, open_gate = serving
    with ExitStack() as stack:
        waiting = [stack.enter_context(connect(path)) for _ in range(MAX_CLIENTS - 1)]
        for client in waiting:
            client.sendall(b'{"op": "later"}\n')
        assert ask(path, {"op": "now", "word": "\udcff"}, DEADLINE)["echo"] == "\udcff"
        open_gate()
        for client in waiting:
            assert json.loads(client.recv(1000))["ok"]


def test_the_longest_silence_has_to_go(serving: Serving) -> None:
    path, _ = serving
    with ExitStack() as stack:
        silent = stack.enter_context(connect(path))
        for _ in range(MAX_CLIENTS):
            client = stack.enter_context(connect(path))
            client.sendall(b'{"op": "now"}\n')
            assert json.loads(client.recv(1000))["ok"]
        assert silent.recv(1000) == b""


def test_a_silent_client_and_one_that_takes_no_answer_are_dropped(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = serving
    monkeypatch.setattr(server_module, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(server_module, "SEND_SECONDS", 0.2)
    with connect(path) as client:
        assert client.recv(1000) == b""
    with connect(path) as client:
        line = json.dumps({"op": "now", "word": "x" * 60000}).encode() + b"\n"
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_for_ever(client, line, 0.0)


def send_for_ever(client: socket.socket, data: bytes, pause: float) -> None:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        client.sendall(data)
        time.sleep(pause)


def test_who_sends_a_byte_now_and_then_is_silent(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time runs from one request to the next, not from one byte to the next."""
    path, _ = serving
    monkeypatch.setattr(server_module, "IDLE_SECONDS", 0.3)
    with connect(path) as client, pytest.raises((BrokenPipeError, ConnectionResetError)):
        send_for_ever(client, b"x", 0.05)


def test_a_bug_is_an_answer(serving: Serving, expect_log: Callable[[str], None]) -> None:
    expect_log("control request 'fails' failed")
    path, _ = serving
    answer = ask(path, {"op": "fails"}, DEADLINE)
    assert (answer["ok"], answer["error"]) == (False, "internal error: RuntimeError")
    assert ask(path, {"op": "now"}, DEADLINE)["ok"]
