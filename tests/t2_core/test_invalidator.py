"""The invalidator with a fake write(2) that can be held: coalescing, order, the barrier, states, the limit.

No test waits for time to pass: what must not happen is made impossible by a held write, and what must
happen is waited for.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

import pytest

from tests.t2_core.fake_notifier import DEADLINE, HeldWrite, Message
from udbad.kernel import invalidator as module
from udbad.kernel.invalidator import Invalidator, State


@contextmanager
def running(write: HeldWrite, epochs: bool = True) -> Iterator[Invalidator]:
    """An invalidator that is stopped at the end, with no thread left."""
    invalidator = Invalidator(write.tell, epochs)
    try:
        yield invalidator
    finally:
        write.release()
        assert invalidator.stop()


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def finish(thread: threading.Thread) -> None:
    thread.join(DEADLINE)
    assert not thread.is_alive(), "still waiting"


def entry(number: int, node: int = 1) -> Message:
    return Message("entry", node, b"n%d" % number)


def put(invalidator: Invalidator, message: Message) -> None:
    if message.kind == "entry":
        invalidator.entry(message.node, message.name)
    elif message.kind == "expire":
        invalidator.expire(message.node, message.name)
    elif message.kind == "attributes":
        invalidator.attributes(message.node)
    elif message.kind == "data":
        invalidator.data(message.node)
    else:
        assert invalidator.everything()


ONE_OF_EACH = [
    Message("entry", 5, "é\n".encode()),
    Message("expire", 5, "é\n".encode()),
    Message("attributes", 6),
    Message("data", 7),
    Message("epoch"),
]


def test_every_kind_reaches_the_kernel_and_is_counted() -> None:
    write = HeldWrite()
    with running(write) as invalidator:
        for message in ONE_OF_EACH:
            put(invalidator, message)
        invalidator.flush()
        assert sorted(write.left) == sorted(ONE_OF_EACH)
        statistics = invalidator.statistics()
    assert statistics.sent == {"entry": 1, "expire": 1, "attributes": 1, "data": 1, "epoch": 1}
    assert (statistics.pending, statistics.missed, statistics.failed) == (0, 0, 0)


def test_without_epochs_everything_says_so_and_sends_nothing() -> None:
    write = HeldWrite()
    with running(write, epochs=False) as invalidator:
        assert not invalidator.everything()
        invalidator.flush()
    assert write.entered == []


def test_the_same_thing_twice_while_it_waits_is_sent_once() -> None:
    write = HeldWrite()
    write.hold()
    with running(write) as invalidator:
        first = entry(0)
        put(invalidator, first)
        write.wait_entered(first)
        waiting = [entry(1), Message("attributes", 1), Message("data", 1)]
        for _ in range(1000):
            for message in waiting:
                put(invalidator, message)
        assert invalidator.statistics().pending == len(waiting)
        write.release()
        invalidator.flush()
        assert write.left == [first, *waiting]


def test_what_is_being_sent_is_sent_again_when_it_changes_again() -> None:
    """The write under way may have been too early for the second change."""
    write = HeldWrite()
    write.hold()
    with running(write) as invalidator:
        message = entry(0)
        put(invalidator, message)
        write.wait_entered(message)
        put(invalidator, message)
        write.release()
        invalidator.flush()
        assert write.left == [message, message]


def test_order_of_one_node_is_kept() -> None:
    write = HeldWrite()
    write.hold()
    messages = [entry(n) for n in range(500)]
    with running(write) as invalidator:
        for message in messages:
            put(invalidator, message)
        write.release()
        invalidator.flush()
    assert write.left == messages


def test_flush_waits_for_the_one_in_flight_but_not_for_later_ones() -> None:
    write = HeldWrite()
    write.hold()
    early, late = entry(0), entry(1)
    with running(write) as invalidator:
        put(invalidator, early)
        write.wait_entered(early)
        started = threading.Event()

        def flush() -> None:
            started.set()
            invalidator.flush()

        flushing = in_thread(flush)
        assert started.wait(DEADLINE)
        assert flushing.is_alive()  # nothing but the release below can let it end
        write.hold(lambda message: message == late)
        put(invalidator, late)
        finish(flushing)
        write.wait_entered(late)
        assert write.left == [early]


def test_flush_waits_for_what_is_queued_in_every_thread() -> None:
    write = HeldWrite()
    with running(write) as invalidator:
        for turn in range(200):
            messages = [Message("attributes", node) for node in range(8)] + [entry(turn, node) for node in range(8)]
            write.left.clear()
            for message in messages:
                put(invalidator, message)
            invalidator.flush()
            assert sorted(write.left) == sorted(messages)


def test_flush_with_nothing_to_do_returns() -> None:
    with running(HeldWrite()) as invalidator:
        invalidator.flush()
        invalidator.flush()


def test_flush_under_a_stream_of_changes_returns() -> None:
    """Only what was put before counts: somebody who never pauses does not keep it up."""
    write = HeldWrite()
    with running(write) as invalidator:
        end = threading.Event()

        def stream() -> None:
            number = 0
            while not end.is_set():
                number += 1
                invalidator.entry(1, b"s%d" % number)
                if invalidator.statistics().pending > 100:
                    invalidator.flush()  # faster than the kernel takes them it would only pile up

        streaming = in_thread(stream)
        try:
            for number in range(20):
                marker = entry(number, 2)
                put(invalidator, marker)
                finish(in_thread(invalidator.flush))
                assert marker in write.left
        finally:
            end.set()
            finish(streaming)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.ENODEV])
def test_the_kernel_having_nothing_of_the_kind_is_success(number: int) -> None:
    write = HeldWrite()
    write.fail_with = number
    with running(write) as invalidator:
        for message in ONE_OF_EACH:
            put(invalidator, message)
        invalidator.flush()
        statistics = invalidator.statistics()
    assert statistics.failed == 0
    assert statistics.missed == (0 if number == errno.ENODEV else len(ONE_OF_EACH))


def test_a_refusal_is_counted_and_logged_and_the_thread_goes_on(expect_log: Callable[[str], None]) -> None:
    expect_log("kernel refused to forget entry of node 1: Invalid argument")
    write = HeldWrite()
    with running(write) as invalidator:
        write.fail_with = errno.EINVAL
        put(invalidator, entry(0))
        invalidator.flush()
        write.fail_with = 0
        put(invalidator, entry(1))
        invalidator.flush()
        assert invalidator.statistics().failed == 1
    assert write.left == [entry(0), entry(1)]


def test_one_blocked_directory_does_not_hold_up_others() -> None:
    write = HeldWrite()
    write.hold(lambda message: message.node == 4)
    with running(write) as invalidator:
        put(invalidator, entry(0, 4))
        write.wait_entered(entry(0, 4))
        for number in range(1, 1000):
            put(invalidator, entry(number, 4))
        for node in (1, 2, 3):  # ids come one after the other, and are spread over the threads
            put(invalidator, entry(0, node))
            write.wait_left(entry(0, node))
        assert entry(0, 4) not in write.left


def test_states_and_stop_joins_after_sending_what_waits() -> None:
    write = HeldWrite()
    write.hold()
    before = set(threading.enumerate())
    invalidator = Invalidator(write.tell, True)
    threads = set(threading.enumerate()) - before
    assert threads
    assert invalidator.statistics().state == State.ACCEPTING.value
    messages = [entry(n, n) for n in range(50)]
    for message in messages:
        put(invalidator, message)
    write.wait_entered(messages[0])
    stopped: list[bool] = []
    stopping = in_thread(lambda: stopped.append(invalidator.stop()))
    while invalidator.state is State.ACCEPTING:
        stopping.join(0.001)
    assert invalidator.statistics().state == State.DRAINING.value
    put(invalidator, entry(99, 1))  # too late
    write.release()
    finish(stopping)
    assert stopped == [True]
    assert invalidator.statistics().state == State.STOPPED.value
    assert sorted(write.left) == sorted(messages)
    assert not any(thread.is_alive() for thread in threads)
    invalidator.flush()  # returns though nobody works any more
    put(invalidator, entry(100, 1))
    assert invalidator.statistics().pending == 0


def test_stop_says_when_a_thread_is_stuck_in_the_kernel() -> None:
    write = HeldWrite()
    write.hold()
    invalidator = Invalidator(write.tell, True)
    put(invalidator, entry(0))
    write.wait_entered(entry(0))
    assert not invalidator.stop(0.01)
    write.release()
    assert invalidator.stop()


def test_flush_ends_when_the_invalidator_is_stopped_meanwhile() -> None:
    write = HeldWrite()
    write.hold()
    invalidator = Invalidator(write.tell, True)
    put(invalidator, entry(0))
    write.wait_entered(entry(0))
    flushing = in_thread(invalidator.flush)
    write.release()
    assert invalidator.stop()
    finish(flushing)


def test_many_at_once() -> None:
    """In portions, in a thread of their own where nobody is to wait behind them, or one by one."""
    nodes, names = range(1, 1000), [b"n%d" % number for number in range(1000)]
    told: list[tuple[str, list[tuple[int, bytes]]]] = []

    def tell_many(kind: str, ones: list[tuple[int, bytes]]) -> tuple[int, int]:
        told.append((kind, ones))
        return 1, 0

    write = HeldWrite()
    write.hold()
    invalidator = Invalidator(write.tell, True, tell_many=tell_many)
    put(invalidator, entry(0))
    write.wait_entered(entry(0))
    invalidator.data_all(nodes)
    invalidator.attributes_all(nodes)
    invalidator.expire_all(2, names)
    write.release()
    invalidator.flush()
    statistics = invalidator.statistics()
    assert invalidator.stop()
    for kind, expected in (
        ("data", [(node, b"") for node in nodes]),
        ("attributes", [(node, b"") for node in nodes]),
        ("expire", [(2, name) for name in names]),
    ):
        portions = [ones for told_kind, ones in told if told_kind == kind]
        assert [one for ones in portions for one in ones] == expected
        assert len(portions) == 4
        assert statistics.sent[kind] == len(expected)
    assert (statistics.missed, statistics.failed) == (12, 0)

    with running(HeldWrite()) as invalidator:
        invalidator.data_all([5, 6])
        invalidator.expire_all(7, [b"a", b"b"])
        invalidator.flush()
        sent = invalidator.statistics().sent
    assert (sent["data"], sent["expire"]) == (2, 2)


def test_many_that_the_kernel_refuses(expect_log: Callable[[str], None]) -> None:
    expect_log("kernel refused to forget some data: Input/output error")
    failure = errno.EIO
    invalidator = Invalidator(HeldWrite().tell, True, tell_many=lambda kind, ones: (0, failure))
    invalidator.data_all([5])
    invalidator.flush()
    assert invalidator.statistics().failed == 1
    failure = errno.ENODEV  # unmounted already
    invalidator.data_all([6])
    invalidator.flush()
    assert invalidator.statistics().failed == 1
    assert invalidator.stop()


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "_LIMIT", 10)
    return 10


def test_too_many_names_become_one_epoch(small_limit: int) -> None:
    write = HeldWrite()
    write.hold()
    with running(write) as invalidator:
        first = entry(0)
        put(invalidator, first)
        write.wait_entered(first)
        for number in range(1, 20 * small_limit):
            put(invalidator, entry(number))
        assert invalidator.statistics().pending <= small_limit + 1
        write.release()
        invalidator.flush()
        # Names put after the epoch was queued are covered by it: it is sent later than they were put.
        assert write.left[0] == first
        assert Message("epoch") in write.left
        assert len(write.left) <= small_limit + 2


def test_what_an_epoch_does_not_cover_survives_the_limit(small_limit: int) -> None:
    """An epoch has names asked again. Attributes and pages of what is open are not names."""
    write = HeldWrite()
    write.hold()
    others = [Message(kind, node) for node in range(4, 4 * 30, 4) for kind in ("attributes", "data")]
    with running(write) as invalidator:
        put(invalidator, entry(0, 4))
        write.wait_entered(entry(0, 4))
        for number, message in enumerate(others):
            put(invalidator, entry(number + 1, 4))
            put(invalidator, message)
        write.release()
        invalidator.flush()
    assert set(others) <= set(write.left)
    assert Message("epoch") in write.left


def test_flush_waits_for_everything_beyond_the_limit_too(small_limit: int) -> None:
    write = HeldWrite()
    write.hold()
    attributes = [Message("attributes", node) for node in range(4, 4 * 40, 4)]
    last = attributes[-1]
    with running(write) as invalidator:
        put(invalidator, entry(0, 4))
        write.wait_entered(entry(0, 4))
        for number in range(1, 2 * small_limit):
            put(invalidator, entry(number, 4))
        for number, message in enumerate(attributes):
            put(invalidator, message)
            put(invalidator, entry(1000 + number, 4))
        flushing = in_thread(invalidator.flush)
        write.hold(lambda message: message == last)
        write.wait_entered(last)
        assert flushing.is_alive()  # `last` was put before and is still held
        write.release()
        finish(flushing)
        assert last in write.left


def test_without_epochs_every_name_is_sent_whatever_the_number(small_limit: int) -> None:
    write = HeldWrite()
    write.hold()
    messages = [entry(n) for n in range(20 * small_limit)]
    with running(write, epochs=False) as invalidator:
        for message in messages:
            put(invalidator, message)
        write.release()
        invalidator.flush()
    assert write.left == messages


def test_latency_is_the_time_from_the_call_to_the_kernel() -> None:
    write = HeldWrite()
    write.hold()
    with running(write) as invalidator:
        before_put = monotonic()
        put(invalidator, entry(0))
        after_put = monotonic()
        write.wait_entered(entry(0))
        put(invalidator, entry(1))
        before_release = monotonic()
        write.release()
        invalidator.flush()
        after = monotonic()
        statistics = invalidator.statistics()
    # Two messages; the first waited all the time that it was held.
    assert before_release - after_put <= statistics.latency_max <= after - before_put
    assert statistics.latency_max <= statistics.latency_sum <= 2 * (after - before_put)


def test_what_may_be_told_soon_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come within the time it waits are one; whoever flushes need not wait that long."""
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 2 * DEADLINE)
    write = HeldWrite()
    write.release()
    with running(write) as invalidator:
        for node in (3, 3, 4, 3):
            invalidator.attributes_soon(node)
        invalidator.attributes(7)
        write.wait_left(Message("attributes", 7))
        assert Message("attributes", 3) not in write.left
        finish(in_thread(invalidator.flush))
        assert [message.node for message in write.left if message.node in (3, 4)] == [3, 4]
        invalidator.attributes_soon(3)
    assert write.left[-1] == Message("attributes", 3), "stopping does not wait either"
