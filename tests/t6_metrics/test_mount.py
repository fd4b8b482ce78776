"""The numbers of a real mount: each says what the test has done, and no more series than there should be."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory
from tests.helpers.profile import scaled
from tests.t2_core.fake_notifier import HeldWrite, Message
from tests.t6_metrics.daemon import small_tmpfs
from tests.t6_metrics.scrape import DEADLINE, Page, scrape, stir, wait_for
from udbad.coherence import leases
from udbad.kernel.invalidator import Invalidator
from udbad.metrics import METRICS

pytestmark = pytest.mark.fuse

METRICS_ON = "metrics=127.0.0.1:0"
COPYUPS: tuple[Callable[[Path], object], ...] = (
    lambda low: low.write_bytes(b"y"),
    lambda low: low.chmod(0o600),
    lambda low: os.truncate(low, 0),
    lambda low: os.setxattr(low, "user.k", b"v"),
    lambda low: low.rename(low.with_suffix(".moved")),
    lambda low: os.link(low, low.with_suffix(".link")),
)
"""A way to make each kind of copy-up necessary."""


def port(mount: Mount) -> int:
    found = re.findall(r"metrics on http://127\.0\.0\.1:(\d+)/metrics", mount.log())
    assert found, mount.log()
    return int(found[-1])


def fails(number: int, call: Callable[..., object], *args: object) -> None:
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        call(*args)
    assert caught.value.errno == number


def check_consistent(page: Page) -> None:
    """What holds at any time, whatever was done."""
    for (name, labels), _ in page.series.items():
        assert "mount" in dict(labels), name
    for metric in METRICS:
        if metric.type == "histogram":
            buckets = page.buckets(metric.name)
            assert list(buckets) == sorted(buckets)
            assert list(buckets.values()) == sorted(buckets.values())
            assert buckets.get(float("inf"), 0) == page.sum(f"{metric.name}_count")
    named = {dict(labels)["op"] for name, labels in page.series if name == "udbad_requests_total"}
    assert {"lookup", "getattr", "read"} <= named
    for operation in named:
        answered = page.one("udbad_request_duration_seconds_count", op=operation)
        assert page.sum("udbad_requests_total", op=operation) == answered
    assert page.sum("udbad_requests_total", result="bug") == 0


def test_every_metric_is_there_with_its_labels(union: UnionFactory, tmp_path: Path) -> None:
    """But for those that begin with the first event of their kind, which are filled here."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "file").write_bytes(b"x" * 100)
    mount = union(udba="notify", options=METRICS_ON)
    with (mount.path / "file").open("ab") as file:
        file.write(b"y")
    told = {"op": "heard", "branch": str(mount["base"])}
    moment = leases.now()
    heard = {"gaps": 2, "told": 7, "last": moment, "hosts": {"server": moment - 30, "a\ud800": moment}}
    assert mount.control({**told, **heard})["ok"]
    page = scrape(port(mount))
    for metric in METRICS:
        name = f"{metric.name}_count" if metric.type == "histogram" else metric.name
        if metric.name == "udbad_copyup_failures_total":
            continue  # in a test of its own
        found = [dict(labels) for sample, labels in page.series if sample == name]
        assert found, metric.name
        for labels in found:
            assert set(labels) == {"mount", *metric.labels}
            assert labels["mount"] == str(mount.path)
    check_consistent(page)
    assert page.one("udbad_mount_up") == 1
    assert page.one("udbad_mount_info", mode="notify", mount_point=str(mount.path), create="tdp", copyup="tdp") == 1
    assert page.one("udbad_branch_size_bytes", branch=str(mount["top"])) > page.one(
        "udbad_branch_free_bytes", branch=str(mount["top"])
    )
    assert page.one("udbad_branch_writable", branch=str(mount["top"])) == 1
    assert page.one("udbad_branch_writable", branch=str(mount["base"])) == 0
    assert page.one("udbad_watches") == 2
    assert page.one("udbad_hosts_gaps_total", branch=str(mount["base"])) == 2
    assert page.one("udbad_hosts_hints_total") == 7
    assert 30 <= page.one("udbad_hosts_lag_seconds", host="server") < 30 + DEADLINE
    assert 0 <= page.one("udbad_hosts_heartbeat_seconds") < DEADLINE
    assert page.one("udbad_hosts_believed") == 1
    many = {f"host{number}": 1.0 for number in range(1000)}
    assert mount.control({**told, **heard, "hosts": many})["ok"]
    assert len(scrape(port(mount)).all("udbad_hosts_lag_seconds")) == 64
    assert mount.control(told)["ok"]
    assert "udbad_hosts" not in {name[:11] for name, _ in scrape(port(mount)).series}
    # The scrape itself has a few.
    assert 0 <= page.one("process_open_fds") - len(os.listdir(f"/proc/{mount.process.pid}/fd")) < 10


def test_lookups_are_counted_by_the_branches_they_asked(union: UnionFactory, tmp_path: Path) -> None:
    """Five branches, reval: the kernel asks each time, and nothing is remembered of a directory that changes."""
    layers = {"b0": "rw", "b1": "ro+wh", "b2": "ro", "b3": "ro+wh", "b4": "ro"}
    for index, name in enumerate(layers):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"in{index}").touch()
    for index in (0, 1, 3):
        (tmp_path / "b4" / f"gone{index}").touch()
        (tmp_path / f"b{index}" / f".wh.gone{index}").touch()
    for index in (1, 4):
        (tmp_path / f"b{index}" / "dir").mkdir()
    mount = union(layers, options=METRICS_ON)
    before = scrape(port(mount))
    for index in range(5):
        for _ in range(index + 2):
            stir(tmp_path / "b4")
            os.stat(mount.path / f"in{index}")
    for _ in range(7):
        stir(tmp_path / "b4")
        fails(errno.ENOENT, os.stat, mount.path / "nowhere")
    for index, times in ((0, 1), (1, 2), (3, 3)):
        for _ in range(times):
            stir(tmp_path / "b4")
            fails(errno.ENOENT, os.stat, mount.path / f"gone{index}")
    stir(tmp_path / "b4")
    for _ in range(4):
        os.stat(mount.path / "dir")
    after = scrape(port(mount))
    check_consistent(after)

    def grown(outcome: str) -> dict[int, int]:
        """Depth to lookups; all depths here have a bucket of their own."""
        old, new = (page.buckets("udbad_lookup_depth", outcome=outcome) for page in (before, after))
        result = {}
        below = 0.0
        for bound in new:
            count = new[bound] - old[bound]
            if count > below:
                result[int(bound)] = int(count - below)
            below = count
        return result

    # A directory is merged from all branches down to the last; it is in the second and the fifth. From the second
    # time on only these two are asked, whether they are as they were.
    assert grown("found") == {1: 2, 2: 3 + 3, 3: 4, 4: 5, 5: 6 + 1}
    assert grown("negative") == {5: 7}
    assert grown("whiteout") == {1: 1, 2: 2, 4: 3}
    assert after.one("udbad_lookup_depth_sum", outcome="whiteout") == 1 + 2 * 2 + 3 * 4
    assert after.sum("udbad_lookup_depth_count") - before.sum("udbad_lookup_depth_count") == 20 + 7 + 6 + 4
    for result, count in (("ok", 24), ("error", 13)):
        assert (
            after.one("udbad_requests_total", op="lookup", result=result)
            - before.one("udbad_requests_total", op="lookup", result=result)
            == count
        )


def test_a_view_answers_without_asking_a_branch(union: UnionFactory) -> None:
    mount = union(udba="none", options=METRICS_ON)
    names = [f"missing{number}" for number in range(100)]
    os.listdir(mount.path)
    for name in names:
        fails(errno.ENOENT, os.stat, mount.path / name)
    page = scrape(port(mount))
    depths = page.buckets("udbad_lookup_depth", outcome="negative")
    assert depths[0] >= 100 - 16  # before that a view is not worth it
    assert page.one("udbad_directory_views") == 1


def test_copyups_are_counted_by_cause_method_and_size(union: UnionFactory, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    sizes = {"write": (1, 5000, 3_000_000), "attr": (10, 20), "truncate": (4096,), "xattr": (33,), "rename": (44, 55)}
    for trigger, lengths in sizes.items():
        for number, length in enumerate(lengths):
            (base / f"{trigger}{number}").write_bytes(os.urandom(length))
    mount = union(options=METRICS_ON)
    for number in range(3):
        with (mount.path / f"write{number}").open("ab") as file:
            file.write(b"more")
    for number in range(2):
        (mount.path / f"attr{number}").chmod(0o600)
        (mount.path / f"rename{number}").rename(mount.path / f"renamed{number}")
    os.truncate(mount.path / "truncate0", 4000)
    os.setxattr(mount.path / "xattr0", "user.key", b"value")
    page = scrape(port(mount))
    check_consistent(page)
    for trigger, lengths in sizes.items():
        assert page.sum("udbad_copyup_duration_seconds_count", trigger=trigger) == len(lengths)
    assert page.sum("udbad_copyup_duration_seconds_count") == 9
    assert page.sum("udbad_copyup_duration_seconds_sum") > 0
    if not page.all("udbad_copyup_duration_seconds_count", method="reflink"):
        # A truncation copies what is left of the file.
        assert page.one("udbad_copyup_bytes_total") == sum(map(sum, sizes.values())) - 96
    assert page.one("udbad_copyups_in_flight") == 0
    assert not page.all("udbad_copyup_failures_total")


def test_a_copyup_that_fails_is_counted_by_its_errno(union: UnionFactory, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "big").write_bytes(os.urandom(3_000_000))
    with small_tmpfs(tmp_path / "top", "1m"):
        mount = union(options=METRICS_ON)
        for _ in range(2):
            fails(errno.ENOSPC, os.truncate, mount.path / "big", 2_900_000)
        page = scrape(port(mount))
        assert page.one("udbad_copyup_failures_total", errno="ENOSPC") == 2
        assert len(page.all("udbad_copyup_failures_total")) == 1
        assert page.sum("udbad_copyup_duration_seconds_count") == 0
        assert page.one("udbad_branch_size_bytes", branch=str(mount["top"])) == 2**20
        mount.unmount()


def test_direct_changes_are_counted_from_the_event_to_the_kernel(union: UnionFactory, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for number in range(10):
        (tmp_path / "base" / f"file{number}").write_bytes(b"old")
    mount = union(udba="notify", options=METRICS_ON)
    for number in range(10):
        assert (mount.path / f"file{number}").read_bytes() == b"old"
    mount.flush()
    before = scrape(port(mount))
    base = str(mount["base"])
    for number in range(10):
        (mount["base"] / f"file{number}").rename(mount["base"] / f"moved{number}")
    mount.flush()
    after = scrape(port(mount))
    check_consistent(after)
    grown = after.one("udbad_coherence_events_total", branch=base, kind="names") - before.one(
        "udbad_coherence_events_total", branch=base, kind="names"
    )
    assert grown == 20  # MOVED_FROM and MOVED_TO
    assert after.sum("udbad_coherence_events_total", branch=str(mount["top"])) == 0
    told = after.sum("udbad_invalidations_total") - before.sum("udbad_invalidations_total")
    assert told >= 20  # each old name and each new one
    assert after.one("udbad_invalidation_latency_seconds_count") == after.sum("udbad_invalidations_total")
    assert after.one("udbad_coherence_lag_seconds") == 0
    assert after.one("udbad_coherence_overflows_total") == 0
    for state, value in (("healthy", 1), ("silent", 0), ("limited", 0), ("degraded", 0)):
        assert after.one("udbad_coherence_state", branch=base, state=state) == value


def test_redirects_that_lead_nowhere_are_counted(union: UnionFactory, tmp_path: Path) -> None:
    for name in ("top/renamed", "top/damaged", "base/old"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "top/.wh..wh.redirects").touch()
    os.setxattr(tmp_path / "top/renamed", "trusted.overlay.redirect", b"/old")
    os.setxattr(tmp_path / "top/damaged", "trusted.overlay.redirect", b"../outside")
    mount = union(options=METRICS_ON, allow_log="redirect .* cannot be a path")
    assert os.listdir(mount.path / "renamed") == []
    assert scrape(port(mount)).one("udbad_redirects_unusable_total") == 0
    assert os.listdir(mount.path / "damaged") == []
    assert scrape(port(mount)).one("udbad_redirects_unusable_total") > 0


def test_own_changes_come_back_as_echoes(union: UnionFactory) -> None:
    mount = union(udba="notify", options=METRICS_ON)
    (mount.path / "file").write_bytes(b"content")
    assert (mount.path / "file").stat().st_size == 7
    mount.flush()
    os.utime(mount.path / "file")
    mount.flush()
    page = scrape(port(mount))
    assert page.one("udbad_coherence_echoes_total") > 0


def test_lag_is_the_age_of_what_the_kernel_was_not_told_of() -> None:
    """Deterministic, so without a mount: the write to the kernel is held."""
    write = HeldWrite()
    invalidator = Invalidator(write.tell, epochs=True)
    try:
        assert invalidator.statistics().oldest == 0
        write.hold()
        invalidator.since = 1000.0  # when the event was read, long before now
        invalidator.attributes(5)
        invalidator.since = None
        invalidator.attributes(6)
        write.wait_entered(Message("attributes", 5))
        write.wait_entered(Message("attributes", 6))
        oldest = invalidator.statistics().oldest
        write.release()
        invalidator.flush()
        statistics = invalidator.statistics()
    finally:
        write.release()
        assert invalidator.stop()
    assert oldest == pytest.approx(statistics.latency_max, abs=60)
    assert oldest > statistics.latency_sum - statistics.latency_max
    assert statistics.oldest == 0
    assert sum(statistics.latency_counts[:-1]) == 2
    assert statistics.latency_counts[-1] == statistics.latency_sum


def test_a_branch_that_is_gone_is_down(union: UnionFactory) -> None:
    mount = union(options=METRICS_ON)
    mount["base"].rmdir()
    page = scrape(port(mount))
    assert page.one("udbad_branch_up", branch=str(mount["base"])) == 0
    assert page.one("udbad_branch_up", branch=str(mount["top"])) == 1
    assert not page.all("udbad_branch_free_bytes", branch=str(mount["base"]))


def test_mode_and_state_follow_a_change_of_the_mode(union: UnionFactory) -> None:
    mount = union(udba="reval", options=METRICS_ON)
    assert scrape(port(mount)).one("udbad_mount_info", mode="reval") == 1
    mount.control({"op": "udba", "mode": "notify"})
    page = scrape(port(mount))
    assert page.one("udbad_mount_info", mode="notify") == 1
    assert len(page.all("udbad_mount_info")) == 1
    assert page.one("udbad_watches") == 2


def test_the_same_numbers_as_stats_has(union: UnionFactory) -> None:
    """`udbad top` and `udbad status` show "stats" and "status"; nothing happens between the two answers."""
    mount = union(udba="notify", options=METRICS_ON)
    (mount.path / "file").write_bytes(b"x")
    mount.flush()
    stats = mount.control({"op": "stats"})
    page = scrape(port(mount))
    for operation, count in stats["requests"].items():
        assert page.sum("udbad_requests_total", op=operation) == count
    assert page.one("udbad_inodes") == stats["table"]["nodes"]
    assert page.one("udbad_open_handles") == stats["open_handles"] == 0
    assert page.one("udbad_watches") == stats["coherence"]["watches"]
    assert page.one("udbad_coherence_echoes_total") == stats["coherence"]["echoes"]
    for kind, count in stats["invalidator"]["sent"].items():
        assert page.one("udbad_invalidations_total", kind=kind) == count


def test_cardinality_is_bounded(union: UnionFactory, tmp_path: Path) -> None:
    """Names, operations, errnos and events of every kind add no series but the few that start with their first use."""
    (tmp_path / "base").mkdir()
    for number in range(40):
        (tmp_path / "base" / f"low{number}").write_bytes(b"x")
    mount = union(udba="notify", options=METRICS_ON)
    at = mount.path
    before = scrape(port(mount))
    for number in range(200):
        odd = os.fsencode(at) + b"/" + f"n{number}".encode() + b'\xff\n{}"'
        os.mkdir(odd)
        Path(os.fsdecode(odd), "file").write_bytes(b"x")
        fails(errno.ENOENT, os.stat, at / f"missing{number}")
        (mount["top"] / f"direct{number}").touch()
    fails(errno.ENOTEMPTY, os.rmdir, odd)
    fails(errno.EEXIST, os.mkdir, odd)
    fails(errno.ENAMETOOLONG, os.mkdir, at / ("n" * 250))
    fails(errno.EPERM, os.mkdir, at / ".wh.x")
    fails(errno.ENODATA, os.getxattr, at / "low0", "user.none")
    for number in range(40):
        COPYUPS[number % len(COPYUPS)](at / f"low{number}")
    os.symlink("x", at / "symlink")
    os.mkfifo(at / "fifo")
    mount.flush()
    after = scrape(port(mount))
    check_consistent(after)
    new = {labels for name, labels in set(after.series) - set(before.series) if name.endswith("_count")}
    assert {dict(labels)["trigger"] for labels in new} <= {
        "write", "attr", "truncate", "xattr", "rename", "link", "open",
    }  # fmt: skip
    assert len(new) <= 2 * 7
    added = [name for name, _ in set(after.series) - set(before.series)]
    assert {name.rsplit("_", 1)[0] for name in added} == {"udbad_copyup_duration_seconds"}
    branches = len(mount.branches)
    # Operations, histograms and all; with every trigger, method and errno there is it stays below 2000.
    assert len(after.series) < 900 + 20 * branches + 24 * len(new)


def test_a_port_that_is_taken_costs_the_numbers_alone(union: UnionFactory) -> None:
    first = union(options=METRICS_ON)
    taken = f"metrics=127.0.0.1:{port(first)}"
    other = union({"top2": "rw"}, options=taken, mount_point="other", allow_log="Address already in use")
    (other.path / "file").touch()
    assert other.log().count("Address already in use") == 1


def test_thousands_of_snapshots_leak_nothing(union: UnionFactory) -> None:
    """What each scrape makes the mount process do, on a connection of its own; test_exporter.py has the other half."""
    mount = union(udba="notify", options=METRICS_ON)

    def thousand() -> tuple[int, int, int]:
        for _ in range(1000):
            assert mount.control({"op": "metrics"})["ok"]
        scrape(port(mount))
        # A connection is closed a little after the client has: look when all are.
        page = wait_for(port(mount), lambda page: page.one("process_open_fds") < 40)
        threads = len(os.listdir(f"/proc/{mount.process.pid}/task"))
        return int(page.one("process_open_fds")), threads, int(page.one("process_resident_memory_bytes"))

    thousand()
    first = thousand()
    for _ in range(scaled(1, 8)):
        last = thousand()
    assert last[0] <= first[0] + 2
    assert last[1] <= first[1] + 2
    assert last[2] < first[2] + 2 * 2**20
