"""One endpoint for all mounts: what a mount that hangs, dies or is not there does to it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.t6_metrics.daemon import Daemon, daemon
from tests.t6_metrics.scrape import scrape, wait_for
from udbad.metrics import METRICS

pytestmark = pytest.mark.fuse


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Daemon]:
    """Mounts named one and two, over top and base and over single."""
    for name in ("top", "base", "single"):
        (tmp_path / name).mkdir()
    mounts = {
        "one": f'branches = ["{tmp_path}/top=rw", "{tmp_path}/base=ro"]\nudba = "notify"\nio = "requests"',
        "two": f'branches = ["{tmp_path}/single=rw"]',
    }
    with daemon(tmp_path, mounts) as running:
        yield running


def test_all_mounts_are_on_one_page(two: Daemon) -> None:
    for _ in range(3):
        os.listdir(two.path("one"))
    page = scrape(two.port)
    for name in ("one", "two"):
        assert page.one("udbad_mount_up", mount=name) == 1
        assert page.one("udbad_mount_restarts_total", mount=name) == 0
        assert page.one("udbad_config_last_reload_success", mount=name) == 1
        assert abs(page.one("udbad_config_last_reload_timestamp_seconds", mount=name) - time.time()) < 3600
        for metric in METRICS:
            if not metric.name.startswith(("udbad_copyup", "udbad_hosts")):  # those begin with the first
                sample = f"{metric.name}_count" if metric.type == "histogram" else metric.name
                assert page.all(sample, mount=name), metric.name
    assert page.one("udbad_requests_total", mount="one", op="opendir", result="ok") >= 3
    assert page.one("udbad_requests_total", mount="two", op="opendir", result="ok") == 0
    assert len(page.all("udbad_branch_up", mount="one")) == 2
    assert page.one("udbad_mount_info", mount="two", mode="reval", mount_point=str(two.path("two"))) == 1
    assert {dict(labels).get("mount") for _, labels in page.series} == {"one", "two"}


def test_a_stopped_mount_process_is_down_and_the_scrape_is_quick(two: Daemon) -> None:
    pid = two.pid("one")
    os.kill(pid, signal.SIGSTOP)
    try:
        # Often enough to fill the queue of its socket, were nobody to close.
        for _ in range(20):
            start = time.monotonic()
            page = scrape(two.port)
            # The limit is one second; more is for a machine that is busy with other things.
            assert time.monotonic() - start < 3
            assert page.one("udbad_mount_up", mount="one") == 0
            assert page.one("udbad_mount_up", mount="two") == 1
            assert not page.all("udbad_inodes", mount="one")
        assert page.one("process_resident_memory_bytes", mount="one") > 0
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(two.port, lambda page: page.one("udbad_mount_up", mount="one") == 1)


def test_a_restart_is_counted(two: Daemon) -> None:
    os.kill(two.pid("two"), signal.SIGKILL)
    page = wait_for(
        two.port,
        lambda page: (
            page.one("udbad_mount_restarts_total", mount="two") == 1 and page.one("udbad_mount_up", mount="two") == 1
        ),
    )
    assert page.one("udbad_mount_restarts_total", mount="one") == 0


def test_a_reload_that_fails_is_seen_and_so_is_the_next_that_does_not(two: Daemon) -> None:
    good = two.config.read_text()
    before = scrape(two.port).one("udbad_config_last_reload_timestamp_seconds", mount="one")
    two.config.write_text(good + "no_such_key = 1\n")
    two.reload()
    wait_for(two.port, lambda page: page.all("udbad_config_last_reload_success") == [0, 0])
    two.config.write_text(good)
    two.reload()
    page = wait_for(two.port, lambda page: page.all("udbad_config_last_reload_success") == [1, 1])
    assert page.one("udbad_config_last_reload_timestamp_seconds", mount="one") > before


def test_a_mount_that_leaves_the_configuration_leaves_the_page(two: Daemon) -> None:
    good = two.config.read_text()
    two.config.write_text(good[: good.index("[mounts.two]")])
    two.reload()
    page = wait_for(two.port, lambda page: len(page.all("udbad_mount_up")) == 1)
    assert {dict(labels)["mount"] for _, labels in page.series} == {"one"}


def test_without_an_endpoint_mounts_serve_all_the_same(two: Daemon, tmp_path: Path) -> None:
    """Another supervisor wants the same port: its mounts come up, and its log says what is missing."""
    other = tmp_path / "other"
    (other / "branch").mkdir(parents=True)
    mounts = {"three": f'branches = ["{other}/branch=rw"]'}
    with daemon(other, mounts, listen=f"127.0.0.1:{two.port}") as running:
        running.wait_for_log("WARNING.*no metrics are served: .*Address already in use")
        (running.path("three") / "file").touch()
        assert (other / "branch" / "file").exists()


def test_the_endpoint_can_be_off(tmp_path: Path) -> None:
    (tmp_path / "branch").mkdir()
    with daemon(tmp_path, {"m": f'branches = ["{tmp_path}/branch=rw"]'}, listen="off") as running:
        assert "metrics" not in running.log()
