"""The endpoint over mount processes that are played: silent, slow, wrong, many; formats, TLS, leaks."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from tests.helpers.profile import scaled
from tests.t6_metrics.scrape import Page, get, scrape
from udbad.control import exporter
from udbad.errors import UserError
from udbad.metrics import DEPTH_BUCKETS, Counts, Samples

SAMPLES: Samples = {
    "udbad_requests_total": [(["lookup", "ok"], 12), (["lookup", "error"], 3)],
    "udbad_inodes": [([], 5)],
}


class FakeMount:
    """The control socket of a mount process. answer: what it sends to each request; None: nothing, ever."""

    def __init__(self, path: Path, answer: bytes | None) -> None:
        self.path = str(path)
        self.answer = answer
        self.requests: list[Any] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)
        if answer is not None:
            self._thread.start()

    def _serve(self) -> None:
        assert self.answer is not None
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                self.requests.append(json.loads(client.recv(4096)))
                client.sendall(self.answer)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        if self.answer is not None:
            self._thread.join()
        self._listener.close()


class Fakes:
    """Fake mounts and one endpoint over all of them."""

    def __init__(self) -> None:
        # Not in tmp_path: the path of a unix socket has at most 107 bytes, unix(7).
        self._scratch = Path(tempfile.mkdtemp(prefix="udbad-"))
        self.targets: dict[str, str] = {}
        self.kept: dict[str, Samples] = {}
        self.mounts: dict[str, FakeMount] = {}
        self.server = exporter.start("127.0.0.1", 0, lambda: self.targets, lambda: self.kept)

    def add(self, name: str, answer: bytes | None) -> FakeMount:
        mount = self.mounts[name] = FakeMount(self._scratch / name, answer)
        self.targets[name] = mount.path
        return mount

    def close(self) -> None:
        self.server.close()
        for mount in self.mounts.values():
            mount.close()
        shutil.rmtree(self._scratch)


@pytest.fixture
def fakes() -> Iterator[Fakes]:
    with closing(Fakes()) as made:
        yield made


def answer(samples: Any) -> bytes:
    return json.dumps({"ok": True, "version": 1, "metrics": samples}).encode() + b"\n"


def test_samples_of_all_mounts_get_the_label_mount(fakes: Fakes) -> None:
    mount = fakes.add("one", answer(SAMPLES))
    fakes.add("two", answer({"udbad_inodes": [[[], 7]]}))
    fakes.kept = {"one": {"udbad_mount_restarts_total": [((), 2)]}}
    page = scrape(fakes.server.port)
    assert mount.requests == [{"op": "metrics", "version": 1}]
    assert page.one("udbad_requests_total", mount="one", op="lookup", result="ok") == 12
    assert page.one("udbad_inodes", mount="two") == 7
    assert page.one("udbad_mount_restarts_total", mount="one") == 2
    assert page.all("udbad_mount_up") == [1, 1]
    assert page.one("process_open_fds", mount="one") > 0  # of whoever listens there: this process
    assert all(dict(labels)["mount"] in ("one", "two") for _, labels in page.series)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        b"",
        b"\n",
        b"{}\n",
        b"[1]\n",
        b'{"ok": false, "error": "not a request"}\n',
        b'{"ok": true, "metrics": 1}\n',
        b'{"ok": true, "metrics": {}}',
    ],
    ids=["silent", "hangs-up", "empty", "no-metrics", "list", "refused", "number", "half-a-line"],
)
def test_who_does_not_answer_is_down_and_delays_nobody(fakes: Fakes, wrong: bytes | None) -> None:
    fakes.add("bad", wrong)
    fakes.add("good", answer(SAMPLES))
    start = time.monotonic()
    page = scrape(fakes.server.port)
    assert time.monotonic() - start < 3  # the deadline is below one second; the machine may be busy
    assert page.one("udbad_mount_up", mount="bad") == 0
    assert page.one("udbad_mount_up", mount="good") == 1
    assert page.one("udbad_inodes", mount="good") == 5
    assert not page.all("udbad_inodes", mount="bad")


def test_a_full_queue_of_a_stopped_process_delays_nobody(fakes: Fakes) -> None:
    """connect(2) to a unix socket waits when the queue is full; here it must not."""
    mount = fakes.add("bad", None)
    fakes.add("good", answer(SAMPLES))
    with closing(socket.socket(socket.AF_UNIX)) as first, closing(socket.socket(socket.AF_UNIX)) as second:
        for client in (first, second):
            client.setblocking(False)
            client.connect(mount.path)
        page = scrape(fakes.server.port)
    assert page.one("udbad_mount_up", mount="bad") == 0
    assert page.one("udbad_mount_up", mount="good") == 1


def test_no_socket_and_no_targets(fakes: Fakes) -> None:
    assert scrape(fakes.server.port).series == {}
    fakes.targets["gone"] = "/nowhere/socket"
    fakes.targets["starting"] = ""
    page = scrape(fakes.server.port)
    assert page.all("udbad_mount_up") == [0, 0]
    assert len(page.series) == 2


def test_fifty_silent_mounts_take_one_deadline_together(fakes: Fakes) -> None:
    for number in range(50):
        fakes.add(f"silent{number}", None)
    fakes.add("good", answer(SAMPLES))
    start = time.monotonic()
    page = scrape(fakes.server.port)
    assert time.monotonic() - start < 5  # one after the other they would take 35
    assert page.sum("udbad_mount_up") == 1
    assert len(page.all("udbad_mount_up")) == 51


def test_a_process_with_another_table_is_understood_as_far_as_it_goes(fakes: Fakes) -> None:
    """After an upgrade the supervisor may be newer than mount processes that still serve."""
    depth = Counts(DEPTH_BUCKETS)
    depth.observe(3, 4)
    fakes.add(
        "old",
        answer(
            {
                "udbad_no_such_metric": [[[], 1]],
                "udbad_inodes": [[["label", "too", "many"], 1]],
                "udbad_watches": [[[], [1, 2]]],
                "udbad_invalidation_latency_seconds": [[[], [1, 2, 3]]],
                "udbad_request_duration_seconds": [[["lookup"], 1]],
                "udbad_lookup_depth": [[["found"], depth.value()]],
            }
        ),
    )
    page = scrape(fakes.server.port)
    assert page.one("udbad_mount_up", mount="old") == 1
    assert page.one("udbad_lookup_depth_count", outcome="found") == 4
    assert page.one("udbad_lookup_depth_sum", outcome="found") == 12
    assert {name for name, _ in page.series if name.startswith("udbad_")} == {
        "udbad_mount_up", "udbad_lookup_depth_bucket", "udbad_lookup_depth_count", "udbad_lookup_depth_sum",
    }  # fmt: skip


def test_odd_names_survive(fakes: Fakes) -> None:
    odd = 'a "quoted" \\ name\nwith a line\u2028 and é'
    fakes.add("m", answer({"udbad_branch_up": [[[odd], 1]]}))
    assert scrape(fakes.server.port).one("udbad_branch_up", branch=odd) == 1


def test_openmetrics_gzip_and_a_choice_of_names(fakes: Fakes) -> None:
    fakes.add("m", answer(SAMPLES))
    headers, body = get(fakes.server.port, Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    parsed = parse_openmetrics(body.decode())  # type: ignore[no-untyped-call]  # the library has no types there
    families = {family.name: family for family in parsed}
    assert families["udbad_requests"].type == "counter"
    headers, packed = get(fakes.server.port, **{"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip"
    assert Page(gzip.decompress(packed).decode()).one("udbad_inodes") == 5
    chosen = Page(get(fakes.server.port, "/metrics?name[]=udbad_inodes")[1].decode())
    assert [name for name, _ in chosen.series] == ["udbad_inodes"]


def test_the_port_is_taken(fakes: Fakes) -> None:
    with pytest.raises(UserError, match=rf"metrics on 127\.0\.0\.1:{fakes.server.port}: Address already in use"):
        exporter.start("127.0.0.1", fakes.server.port, dict)


@pytest.mark.parametrize(
    ("listen", "address"),
    [("127.0.0.1:9723", ("127.0.0.1", 9723)), ("[::1]:0", ("::1", 0)), ("localhost:1", ("localhost", 1))],
)
def test_addresses(listen: str, address: tuple[str, int]) -> None:
    assert exporter.parse_address(listen) == address


def test_ipv6() -> None:
    server = exporter.start("::1", 0, dict)
    with closing(server), urllib.request.urlopen(f"http://[::1]:{server.port}/metrics", timeout=30) as response:
        assert response.status == 200


@pytest.mark.parametrize("path", ["/", "/metric", "/metrics/", "/favicon.ico", "/%00"])
def test_other_paths_are_not_found(fakes: Fakes, path: str) -> None:
    """And nobody is asked for them. With a query it is the same page."""
    fakes.add("m", answer(SAMPLES))
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{fakes.server.port}{path}", timeout=30)
    with caught.value as response:
        assert (response.code, response.read()) == (404, b"metrics are at /metrics\n")
    assert fakes.mounts["m"].requests == []


def test_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    with closing(exporter.start("127.0.0.1", 0, dict, certificate=str(certificate), key=str(key))) as server:
        trust = ssl.create_default_context(cafile=str(certificate))
        url = f"https://127.0.0.1:{server.port}/metrics"
        # Somebody who never begins the handshake must not keep others out.
        with (
            socket.create_connection(("127.0.0.1", server.port), timeout=30),
            urllib.request.urlopen(url, timeout=30, context=trust) as response,
        ):
            assert response.status == 200
    with pytest.raises(UserError, match="metrics on"):
        exporter.start("127.0.0.1", 0, dict, certificate=str(key), key=str(certificate))


def test_a_client_that_says_nothing_is_dropped(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udbad.metrics.CLIENT_SECONDS", 0.2)
    server = exporter.start("127.0.0.1", 0, dict)
    with closing(server), socket.create_connection(("127.0.0.1", server.port), timeout=30) as silent:
        assert silent.recv(1) == b""


def test_thousands_of_scrapes_leak_nothing(fakes: Fakes) -> None:
    """Descriptors, threads and memory, before a thousand and after; with a mount that answers and one that has gone."""
    fakes.add("m", answer(SAMPLES))
    fakes.targets["gone"] = "/nowhere/socket"
    fakes.mounts["m"].requests = []

    def scraped(times: int) -> tuple[int, int, int]:
        for _ in range(times):
            get(fakes.server.port)
        fakes.mounts["m"].requests.clear()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/fd")), threading.active_count(), pages * os.sysconf("SC_PAGESIZE")

    scraped(200)  # until what grows once has grown
    first = scraped(scaled(200, 1000))
    for _ in range(scaled(1, 8)):
        last = scraped(1000)
    # A thread that has answered may not have ended yet.
    assert last[0] <= first[0] + 2
    assert last[1] <= first[1] + 2
    assert last[2] < first[2] + 2 * 2**20
