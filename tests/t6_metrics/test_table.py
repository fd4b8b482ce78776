"""The table of metrics, and that documentation, dashboard and rules say the same as it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.mount import REPOSITORY
from tests.t6_metrics.scrape import Page
from udbad.kernel.boundary import operations
from udbad.metrics import BY_NAME, METRICS, Counts, Metric, Reading, Samples, markdown_table, page

DOCS = REPOSITORY / "docs"
GRAFANA = REPOSITORY / "grafana"
RULES = GRAFANA / "prometheus" / "rules"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "udbad.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ISSUE = (
    "udbad_lookup_depth", "udbad_copyup_duration_seconds", "udbad_copyup_bytes_total", "udbad_copyups_in_flight",
    "udbad_copyup_failures_total", "udbad_requests_total", "udbad_request_duration_seconds",
    "udbad_coherence_events_total", "udbad_coherence_echoes_total", "udbad_invalidations_total",
    "udbad_invalidation_latency_seconds", "udbad_coherence_lag_seconds", "udbad_coherence_overflows_total",
    "udbad_coherence_state", "udbad_watches", "udbad_watch_limit", "udbad_inodes", "udbad_directory_views",
    "udbad_open_handles", "udbad_branch_free_bytes", "udbad_branch_size_bytes", "udbad_branch_up", "udbad_mount_up",
    "udbad_mount_restarts_total", "udbad_mount_info", "udbad_config_last_reload_success",
    "udbad_config_last_reload_timestamp_seconds", "udbad_build_info", "process_cpu_seconds_total",
    "process_resident_memory_bytes", "process_open_fds",
)  # fmt: skip
"""What was asked for; the table may have more."""


def expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def metric_names(text: str) -> set[str]:
    """Metrics an expression speaks of, as the table names them; names of recording rules are left out."""
    found = set()
    for name in re.findall(r"(?<![\w:])(?:udbad|process)_[a-z_]+(?![\w:])", text):
        plain = re.sub(r"_(bucket|sum|count)$", "", name)
        found.add(plain if plain in BY_NAME else name)
    return found


def rule_texts() -> Iterator[str]:
    """Expressions of all rules; the files are YAML, and promtool has parsed them."""
    for path in sorted(RULES.glob("*.yml")):
        for block in re.split(r"\n\s+- (?=alert:|record:)", path.read_text())[1:]:
            found = re.search(r"expr:\s*(?:>-\n)?(.*?)(?=\n\s*(?:for|labels|annotations|#|- )|\Z)", block, re.DOTALL)
            assert found is not None
            yield found[1]


def value_of(metric: Metric) -> Any:
    return Counts(metric.buckets).value() if metric.type == "histogram" else 1


def test_everything_that_was_asked_for_is_there() -> None:
    assert set(ISSUE) <= set(BY_NAME)
    assert len(BY_NAME) == len(METRICS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_conventions(metric: Metric) -> None:
    """https://prometheus.io/docs/practices/naming/ and what our own scheme adds."""
    assert (metric.type == "counter") == metric.name.endswith("_total")
    assert (metric.type == "histogram") == bool(metric.buckets)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert not re.search(r"_(milli|micro|nano)?(ms|us|ns|msec|kb|kib|mb)(_|$)", metric.name)
    assert metric.help.endswith(".")
    assert metric.why.endswith(".")
    assert "mount" not in metric.labels
    assert "|" not in metric.help + metric.why


def test_promtool_has_nothing_to_say_about_a_page_with_every_metric() -> None:
    """`promtool check metrics`: names, types, help, units."""
    samples: Samples = {m.name: [(["x"] * len(m.labels), value_of(m))] for m in METRICS}
    text = page(lambda: {"m": Reading(samples, None, {})})
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    seen = Page(text)
    for metric in METRICS:
        name = f"{metric.name}_count" if metric.type == "histogram" else metric.name
        assert len(seen.all(name, mount="m", **dict.fromkeys(metric.labels, "x"))) == 1


def test_every_operation_is_one_of_a_closed_set() -> None:
    assert len(operations()) < 40
    assert all(re.fullmatch("[a-z_]+", name) for name in operations())


def test_documentation_has_the_table() -> None:
    found = re.search(
        r"<!-- metrics:begin -->\n(.*?)<!-- metrics:end -->", (DOCS / "metrics.md").read_text(), re.DOTALL
    )
    assert found is not None
    assert found[1].strip() == markdown_table().strip()


def test_runbook_has_a_line_for_every_alert() -> None:
    page = (DOCS / "runbook.md").read_text()
    alerts = dict(re.findall(r'- alert: (\w+)\n.*?runbook: "(.*?)"\n', (RULES / "alerts.yml").read_text(), re.DOTALL))
    assert len(alerts) == (RULES / "alerts.yml").read_text().count("- alert:")
    for alert, runbook in alerts.items():
        assert f"| `{alert}` |" in page
        assert runbook in page


def test_dashboard_and_rules_know_only_metrics_that_exist() -> None:
    texts = [expression for panel in PANELS for expression in expressions(panel)] + list(rule_texts())
    assert len(texts) > 50
    assert {name for text in texts for name in metric_names(text)} <= set(BY_NAME)


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {name for panel in PANELS for expression in expressions(panel) for name in metric_names(expression)}
    # What the process may have of virtual memory says little; everything else is for looking at.
    assert set(BY_NAME) - shown == {"process_virtual_memory_bytes"}


def test_dashboard_rows_and_variables() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == [
        "Overview", "Operations", "Lookup depth", "Copy-up", "Coherence", "Branches and space", "Process", "Survival",
        "Many hosts",
    ]  # fmt: skip
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "mount"]
    assert next(panel for panel in PANELS if panel["type"] == "heatmap")["targets"][0]["format"] == "heatmap"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel(panel: dict[str, Any]) -> None:
    """Each follows both variables, does not lie on another, and has the unit of what it shows."""
    assert panel["datasource"]["uid"] == "${datasource}"
    assert panel["description"]
    position = panel["gridPos"]
    assert position["x"] + position["w"] <= 24
    for other in PANELS:
        place = other["gridPos"]
        apart = (
            position["x"] + position["w"] <= place["x"]
            or place["x"] + place["w"] <= position["x"]
            or position["y"] + position["h"] <= place["y"]
            or place["y"] + place["h"] <= position["y"]
        )
        assert apart or other is panel
    for expression in expressions(panel):
        assert 'mount=~"$mount"' in expression
        assert panel["fieldConfig"]["defaults"]["unit"] in units(expression)


def units(expression: str) -> tuple[str, ...]:
    """Grafana units that are right for an expression, by the base unit in the names."""
    if "last_reload_timestamp_seconds" in expression:
        return ("dateTimeFromNow",)  # milliseconds, hence * 1000
    if ("_bytes" in expression and "/" in expression) or "process_max_fds" in expression:
        return ("percentunit",)
    if "_bytes" in expression:
        return ("Bps",) if "rate(" in expression else ("bytes",)
    if "_seconds_sum" in expression or "cpu_seconds_total" in expression:
        return ("percentunit",)  # seconds a second
    if (
        "histogram_quantile" in expression
        or re.search("(lag|heartbeat)_seconds", expression)
        or "start_time_seconds" in expression
    ):
        return ("s",)
    if "depth_sum" in expression:
        return ("short",)
    if "increase(" not in expression and "rate(" in expression:
        return ("reqps", "ops")
    return ("short",)


@pytest.mark.parametrize(
    ("command", "files"),
    [
        (["check", "rules"], sorted(RULES.glob("*.yml"))),
        (["check", "config"], [GRAFANA / "prometheus" / "prometheus.yml"]),
        (["test", "rules"], sorted((GRAFANA / "prometheus" / "tests").glob("*.yml"))),
    ],
    ids=["check-rules", "check-config", "test-rules"],
)
def test_promtool(command: list[str], files: list[Path]) -> None:
    assert files
    done = subprocess.run(["promtool", *command, *map(str, files)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout + done.stderr


def test_every_alert_is_tested_by_promtool_both_ways() -> None:
    """Fires when it should, and is silent in the series where all is well."""
    alerts = re.findall(r"- alert: (\w+)", (RULES / "alerts.yml").read_text())
    tests = (GRAFANA / "prometheus" / "tests" / "alerts.test.yml").read_text()
    for alert in alerts:
        assert re.search(rf"alertname: {alert}\n\s+exp_alerts:\n\s+- exp_labels", tests), alert
        assert f"alertname: {alert}}}" in tests, alert


def test_recording_rules_are_tested_by_promtool() -> None:
    tests = (GRAFANA / "prometheus" / "tests" / "alerts.test.yml").read_text()
    for name in re.findall(r"- record: (\S+)", (RULES / "recording.yml").read_text()):
        assert f"- expr: {name}\n" in tests


def test_provisioning_fits_the_scrape_config() -> None:
    """Grafana derives $__rate_interval from timeInterval, which must be the interval of the scrapes."""
    interval = re.search(r"scrape_interval: (\w+)", (GRAFANA / "prometheus" / "prometheus.yml").read_text())
    source = (GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text()
    assert interval is not None
    assert f"timeInterval: {interval[1]}" in source
