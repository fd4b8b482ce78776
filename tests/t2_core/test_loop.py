"""The event loop of a mount (edge/loop.py) by itself; t3_fuse/test_loop.py has it under a mount."""

from __future__ import annotations

import os

import pytest

from udbad.edge.loop import Loop


def test_what_a_thread_posts_too_late_goes_nowhere() -> None:
    """One that trio had wait for its descriptors may come back after the end; by then the number is somebody else's."""
    loop = Loop()
    loop.close()
    called: list[int] = []
    others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]  # the first has the number of the loop's
    try:
        loop.post(lambda: called.append(1))
        loop.call_posted()
        assert called == []
        for fd in others:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(fd)
    finally:
        for fd in others:
            os.close(fd)
