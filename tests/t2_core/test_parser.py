"""Requests that make no sense: an error to the kernel, and nothing read that is not of the request (edge/table.py)."""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.helpers.inprocess import notify_union
from tests.t2_core.test_native import Kernel
from udbad.edge.table import OLD_SETXATTR, TABLE, Row
from udbad.kernel import wire
from udbad.kernel.boundary import Malformed
from udbad.kernel.received import Received, take_header
from udbad.types import ROOT_ID, Perm
from udbad.union.fs import SetAttr

ROWS: dict[str, Row] = {f"{opcode} {row.name}": row for opcode, row in TABLE.items()} | {"old setxattr": OLD_SETXATTR}
HEAD = struct.Struct("<IIQQIIIHH")
STALE = 0x5A
"""What the buffer holds behind the request, as of an earlier one."""

# Numbers that lengths and counts are confused by, names with and without an end, and noise.
_WORDS = st.sampled_from([0, 1, 7, 40, 1 << 20, (1 << 20) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
_BODIES = st.lists(
    st.one_of(
        st.binary(max_size=24),
        _WORDS.map(lambda word: struct.pack("<I", word)),
        st.sampled_from([b"name\0", b"\0", b"name", bytes(8), bytes(40), b"\xff" * 8]),
    ),
    max_size=12,
).map(b"".join)


def parse(row: Row, body: bytes) -> tuple[Any, ...]:
    size = HEAD.size + len(body)
    request = Received(1 << 12)
    request.buffer[:] = bytes([STALE]) * (1 << 12)
    request.buffer[:size] = HEAD.pack(size, 0, 7, 5, 1000, 1000, 77, 0, 0) + body
    take_header(request, size)
    if size < row.least:
        raise Malformed("too short")
    return row.parse(request)


def values(arguments: tuple[Any, ...]) -> list[object]:
    """What can be compared of them."""
    return [
        bytes(each) if isinstance(each, memoryview)
        else (each.mode, each.uid, each.gid, each.size, each.atime_ns, each.mtime_ns) if isinstance(each, SetAttr)
        else each
        for each in arguments
    ]  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@given(body=_BODIES)
@example(b"")
@example(bytes(8) + b"no end")
@example(struct.pack("<II", (1 << 32) - 1, 0) + bytes(8) + b"user.a\0value")
@example(struct.pack("<II", 5, 0) + bytes(8) + b"user.avalue")
@settings(max_examples=60)
def test_what_is_taken_is_of_the_request(name: str, body: bytes) -> None:
    try:
        arguments = parse(ROWS[name], body)
    except Malformed:
        return
    for each in arguments:
        if isinstance(each, bytes | memoryview):
            assert bytes(each) in body
            assert isinstance(each, memoryview) or b"\0" not in each or "setxattr" in name
    # Whatever lies behind the request makes no difference.
    global STALE
    STALE ^= 0xFF
    try:
        assert values(parse(ROWS[name], body)) == values(arguments)
    finally:
        STALE ^= 0xFF


@pytest.fixture
def kernel(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Kernel]:
    (tmp_path / "top").mkdir()
    with notify_union([(tmp_path / "top", Perm.RW)], tmp_path / "mnt") as union:
        made = Kernel(union)
        # No operation is performed: names from here may lead anywhere.
        made.native._rows = {
            opcode: (row.parse, _nothing, _empty, row.least, made.native._rows[opcode][4], row, None)
            for opcode, row in ((opcode, row._replace(undo=None)) for opcode, row in TABLE.items())
        }
        logging.getLogger("udbad").setLevel(logging.CRITICAL)
        try:
            yield made
        finally:
            logging.getLogger("udbad").setLevel(logging.NOTSET)
            made.close()


def _nothing(*arguments: object) -> None:
    pass


def _empty(result: object) -> bytes:
    return b""


_NOT_ANSWERED = (wire.FORGET, wire.BATCH_FORGET, wire.INTERRUPT)


@given(
    opcode=st.one_of(st.sampled_from([*TABLE, *_NOT_ANSWERED, wire.DESTROY]), st.integers(0, (1 << 32) - 1)),
    body=_BODIES,
    wrong=st.sampled_from([0, 0, 0, 0, 1, -1, 1 << 20]),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_comes_is_answered(kernel: Kernel, opcode: int, body: bytes, wrong: int) -> None:
    """Once, with an error where it makes no sense; `wrong`: by how much the length in the header is."""
    size = HEAD.size + len(body)
    kernel.device.send(HEAD.pack(size + wrong, opcode, 7, 2, 0, 0, 1, 0, 0) + body)
    kernel.native.take()
    answers = kernel.answers()
    if opcode in _NOT_ANSWERED[:2] or (opcode == wire.INTERRUPT and len(body) >= 8 and not wrong):
        assert answers == {}
        return
    number, data = answers.pop(7)
    assert (answers, data) == ({}, b"")
    if wrong:
        assert number == errno.EINVAL
    elif opcode in TABLE:
        assert number in (0, errno.EINVAL)
    elif opcode == wire.INTERRUPT:
        assert number == errno.EINVAL
    else:
        assert number == (0 if opcode == wire.DESTROY else errno.ENOSYS)


@pytest.mark.parametrize("size", [0, 1, 15, 39])
def test_less_than_a_header(kernel: Kernel, size: int) -> None:
    """There is nobody to answer."""
    kernel.device.send(HEAD.pack(size, wire.LOOKUP, 7, ROOT_ID, 0, 0, 1, 0, 0)[:size] or b"\0")
    kernel.native.take()
    assert kernel.answers() == {}


def test_it_is_said(tmp_path: Path, expect_log: Any) -> None:
    expect_log("malformed request, lookup of node 1: a name without an end")
    (tmp_path / "top").mkdir()
    with notify_union([(tmp_path / "top", Perm.RW)], tmp_path / "mnt") as union:
        kernel = Kernel(union)
        kernel.ask(wire.LOOKUP, ROOT_ID, b"unterminated")
        assert kernel.answer() == (errno.EINVAL, b"")
        kernel.close()
