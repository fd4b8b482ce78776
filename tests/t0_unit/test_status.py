"""What `udbad status` prints of a mount whose mode is not kept everywhere."""

from __future__ import annotations

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
    mount = {
        "label": "pool", "state": "serving", "mount_point": "/mnt", "pid": 7, "since": 0.0, "restarts": 0,
        "process": process, "reason": "", "pending": [],
    }  # fmt: skip
    _print_status({"pid": 1, "udbad": "1", "mounts": [mount]})
    printed = capsys.readouterr().out
    assert [word for word in shown if word not in printed] == []
    assert [word for word in hidden if word in printed] == []
