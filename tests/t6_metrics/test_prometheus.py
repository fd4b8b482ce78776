"""A real Prometheus scrapes a running daemon under a mixed load; every panel and every rule has data there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.mount import REPOSITORY, UnionFactory
from tests.t6_metrics.daemon import Daemon, daemon, small_tmpfs
from tests.t6_metrics.prometheus import Prometheus, prometheus
from tests.t6_metrics.scrape import scrape, stir
from tests.t6_metrics.test_table import DASHBOARD, PANELS, expressions, units
from udbad.coherence import leases
from udbad.control import registry
from udbad.control.protocol import ask

pytestmark = pytest.mark.fuse


@dataclass
class Scene:
    daemon: Daemon
    server: Prometheus


@contextmanager
def under_load(mount: Path, lowest: Path) -> Iterator[None]:
    """load.py at work."""
    command = [sys.executable, "-m", "tests.t6_metrics.load", str(mount), str(lowest)]
    load = subprocess.Popen(command, cwd=REPOSITORY)
    try:
        yield
        assert load.poll() is None, "the load ended"
    finally:
        load.kill()
        load.wait()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, _open_base: Path) -> Iterator[Scene]:
    """One mount under load, and one whose process was killed and that failed to copy up, twice."""
    base = tmp_path_factory.mktemp("scene")
    base.chmod(0o755)
    for name in ("top", "middle", "base", "low"):
        (base / name).mkdir()
    (base / "base" / "deep").touch()
    (base / "base" / "known").touch()
    (base / "base" / "gone").touch()
    (base / "middle" / ".wh.gone").touch()
    (base / "low" / "big").write_bytes(os.urandom(3 * 2**20))
    with ExitStack() as stack:
        stack.enter_context(small_tmpfs(base / "small", "1m"))
        mounts = {
            "busy": f'branches = ["{base}/top=rw", "{base}/middle=ro+wh", "{base}/base=ro"]\nudba = "notify"\n'
            'io = "requests"',
            "full": f'branches = ["{base}/small=rw", "{base}/low=ro"]',
        }
        running = stack.enter_context(daemon(base, mounts))
        busy = next(one for one in registry.entries(str(running.scratch / "run")) if one.name == "busy")
        moment = leases.now()
        heard = {"gaps": 1, "told": 5, "last": moment, "hosts": {"server": moment}}
        ask(busy.control, {"op": "heard", "branch": str(base / "base"), **heard}, 60.0)
        server = stack.enter_context(prometheus(base, running.port))
        stack.enter_context(under_load(running.path("busy"), base / "base"))
        # rate() needs a scrape before: the series of the errno begins with the first failure.
        server.wait_for_data("udbad_mount_up == 1")
        os.kill(running.pid("full"), signal.SIGKILL)
        server.wait_for_data("increase(udbad_takeover_duration_seconds_count[1h]) > 0")
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                os.truncate(running.path("full") / "big", 3 * 2**20 - 1)
            count = scrape(running.port).one("udbad_copyup_failures_total", errno="ENOSPC")
            server.wait_for_data(f"udbad_copyup_failures_total == {count}")
        yield Scene(running, server)


def concrete(expression: str) -> str:
    """What Grafana would send with all mounts chosen."""
    return expression.replace("$mount", ".*").replace("$__rate_interval", "1m")


def plausible(unit: str, values: list[float]) -> bool:
    """Whether numbers can be in this unit: seconds are not milliseconds, a share is not a percentage."""
    highest, lowest = max(values), min(values)
    if unit == "dateTimeFromNow":
        return lowest > 1e12
    limits = {"s": 3600, "percentunit": 3, "reqps": 1e6, "ops": 1e6, "Bps": 1e10, "bytes": 1e16, "short": 1e7}
    return lowest >= 0 and highest <= limits[unit]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel_has_data(scene: Scene, panel: dict[str, Any]) -> None:
    for expression in expressions(panel):
        values = scene.server.wait_for_data(concrete(expression))
        unit = panel["fieldConfig"]["defaults"]["unit"]
        assert unit in units(expression)
        assert plausible(unit, values), f"{expression}: {values} is not in {unit}"
        if unit == "bytes":
            assert max(values) > (2**12 if "state_bytes" in expression else 2**20)


def test_rules_have_data(scene: Scene) -> None:
    """Of an alert what it compares: that it fires when it should is with promtool."""
    groups = scene.server.api("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 25
    for rule in rules:
        expression = rule["query"]
        if rule["type"] == "alerting":
            expression, count = re.subn(r" (==|>|<) [0-9.]+$", "", expression)
            assert count == 1, rule["query"]
        else:
            scene.server.wait_for_data(rule["name"])
        scene.server.wait_for_data(expression)
    for group in scene.server.api("rules")["groups"]:
        for rule in group["rules"]:
            assert rule["health"] == "ok", rule


def test_alert_of_the_failed_copyup_is_the_only_one(scene: Scene) -> None:
    def firing() -> list[dict[str, Any]]:
        return [alert for alert in scene.server.api("alerts")["alerts"] if alert["state"] == "firing"]

    fired = scene.server.wait_for(firing, "an alert")
    assert {(alert["labels"]["alertname"], alert["labels"]["mount"]) for alert in fired} == {
        ("UdbadCopyupFailing", "full")
    }
    assert fired[0]["labels"]["errno"] == "ENOSPC"


def test_prometheus_read_every_series(scene: Scene) -> None:
    """What it has is what the endpoint serves: no sample was dropped, and the types are known to it."""
    page = scrape(scene.daemon.port)
    names = {name for name, _ in page.series}
    known = set(scene.server.api("label/__name__/values"))
    assert names <= known
    metadata = scene.server.api("metadata")
    for family, kind in page.types.items():
        # Counters are called after their family in OpenMetrics, which is what Prometheus asks for.
        assert metadata[family][0]["type"] == kind
        assert metadata[family][0]["help"]
    assert scene.server.query("scrape_samples_scraped == scrape_samples_post_metric_relabeling")
    assert len(scene.server.api("series", **{"match[]": '{__name__=~"udbad_.*"}'})) < 4000


def test_annotation_has_data(scene: Scene) -> None:
    (annotation,) = DASHBOARD["annotations"]["list"]
    expression, comparison, _ = annotation["expr"].partition(" > ")
    assert comparison
    assert scene.server.query(concrete(expression))


def test_what_prometheus_has_is_what_was_done(union: UnionFactory, tmp_path: Path) -> None:
    """A standalone mount: 6 copy-ups of known sizes, lookups to each of 4 depths, counted by the server."""
    layers = {"b0": "rw", "b1": "ro", "b2": "ro", "b3": "ro"}
    sizes = (0, 1, 1000, 70_000, 200_000, 1_000_000)
    for index, name in enumerate(layers):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"in{index}").touch()
    for number, size in enumerate(sizes):
        (tmp_path / "b2" / f"low{number}").write_bytes(os.urandom(size))
    mount = union(layers, options="metrics=127.0.0.1:0")
    for number in range(len(sizes)):
        stir(tmp_path / "b3")
        with (mount.path / f"low{number}").open("ab") as file:
            file.write(b"more")
    for index in range(4):
        for _ in range(10 * (index + 1)):
            stir(tmp_path / "b3")
            os.stat(mount.path / f"in{index}")
    found = re.search(r"metrics on http://127\.0\.0\.1:(\d+)/", mount.log())
    assert found is not None
    with prometheus(tmp_path, int(found[1])) as server:
        expected = {
            'sum(udbad_copyup_duration_seconds_count{trigger="write"})': len(sizes),
            "sum(udbad_copyup_duration_seconds_count)": len(sizes),
            'udbad_copyup_duration_seconds_bucket{le="300.0", method="none"}': 1,  # the empty one
            "udbad_copyup_bytes_total": sum(sizes),
            'udbad_lookup_depth_bucket{outcome="found", le="0.0"}': 0,
            'udbad_lookup_depth_bucket{outcome="found", le="1.0"}': 10,
            'udbad_lookup_depth_bucket{outcome="found", le="2.0"}': 30,
            # The third branch also has the files that were opened, each looked up once, by open(2).
            'udbad_lookup_depth_bucket{outcome="found", le="3.0"}': 60 + len(sizes),
            'udbad_lookup_depth_bucket{outcome="found", le="4.0"}': 100 + len(sizes),
            'udbad_lookup_depth_count{outcome="found"}': 100 + len(sizes),
            'udbad_lookup_depth_sum{outcome="found"}': 10 + 40 + 90 + 160 + 3 * len(sizes),
            'udbad_requests_total{op="lookup", result="ok"}': 100 + len(sizes),
            'udbad_request_duration_seconds_count{op="lookup"}': 100 + len(sizes),
        }
        if server.query('udbad_copyup_duration_seconds_count{method="reflink"}'):
            del expected["udbad_copyup_bytes_total"]  # none are written then
        assert {expression: server.query(expression) for expression in expected} == {
            expression: [value] for expression, value in expected.items()
        }
