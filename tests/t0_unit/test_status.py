"""What `udbad status` prints of a mount whose mode is not kept everywhere, and of one that dies with its process."""

from __future__ import annotations

import time
from typing import Any

import pytest

from udbad.commands.daemon import _print_status


@pytest.mark.parametrize(
    ("coherence", "shown", "hidden"),
    [
        ({"state": "healthy", "degraded_directories": 0}, ["notify"], ["healthy", "reval"]),
        ({"state": "limited", "degraded_directories": 12}, ["notify", "limited", "12 as reval"], []),
        ({"state": "degraded", "degraded_directories": 3}, ["notify", "degraded", "3 as reval"], []),
        ({"state": "healthy", "degraded_directories": 1}, ["notify", "1 as reval"], ["healthy"]),
        ({}, ["notify"], ["reval"]),
    ],
)
def test_the_table_says_how_well_the_mode_is_kept(
    coherence: dict[str, Any], shown: list[str], hidden: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    process = {"udba": "notify", "branches": ["/a=rw"], "udbad": "1", "coherence": coherence}
    printed = status(process, capsys)
    assert [word for word in shown if word not in printed] == []
    assert [word for word in hidden if word in printed] == []


@pytest.mark.parametrize(
    ("mortal", "line"),
    [("", ""), ("survive=off", ""), ("the keeper has ended", "pool: ends with its process: the keeper has ended")],
)
def test_a_mount_that_ends_with_its_process_says_why(
    mortal: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = status({"udba": "none", "mortal": mortal}, capsys)
    assert [said for said in printed.splitlines() if "its process" in said] == ([line] if line else [])


def test_a_branch_that_does_not_answer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    printed = status({"udba": "none", "offline": {"/mnt/disk3": time.time() - 125}}, capsys)
    assert "pool: /mnt/disk3 has not answered for 2m05" in printed


def status(process: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed of one mount, whose process says this."""
    mount = {
        "label": "pool", "state": "serving", "mount_point": "/mnt", "pid": 7, "since": 0.0, "restarts": 0,
        "process": process, "reason": "", "pending": [],
    }  # fmt: skip
    _print_status({"pid": 1, "udbad": "1", "mounts": [mount]})
    return capsys.readouterr().out
