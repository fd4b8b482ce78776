"""A real Prometheus (Debian's package) on loopback with the shipped configuration, and its HTTP API."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tests.helpers.mount import REPOSITORY
from tests.t6_metrics.scrape import DEADLINE

T = TypeVar("T")
SHIPPED = REPOSITORY / "grafana" / "prometheus"


class Prometheus:
    """Scrapes and evaluates every second."""

    def __init__(self, base: Path, target: int) -> None:
        """base: an empty directory for it. target: port of the metrics endpoint."""
        text = (SHIPPED / "prometheus.yml").read_text()
        for shipped, here in (("127.0.0.1:9723", f"127.0.0.1:{target}"), ("15s", "1s"), ("timeout: 5s", "timeout: 1s")):
            assert shipped in text
            text = text.replace(shipped, here)
        (base / "prometheus.yml").write_text(text)
        shutil.copytree(SHIPPED / "rules", base / "rules")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._log = base / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["prometheus", f"--config.file={base}/prometheus.yml", f"--storage.tsdb.path={base}/data",
                 f"--web.listen-address=127.0.0.1:{self.port}", "--query.lookback-delta=1m"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=base,
            )  # fmt: skip

    def api(self, path: str, **words: str) -> Any:
        """The data of one GET below /api/v1/; None while the server is not ready."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(words)}"
        try:
            with urllib.request.urlopen(url, timeout=DEADLINE) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 503:  # not ready yet
                    raise AssertionError(f"{words}: {error.read().decode()}") from error
            return None
        except (urllib.error.URLError, ConnectionError):
            assert self._process.poll() is None, self._log.read_text()
            return None
        assert answer["status"] == "success"
        return answer["data"]

    def query(self, expression: str) -> list[float]:
        """Values of an instant query now, those that are numbers."""
        data = self.api("query", query=expression)
        if data is None:
            return []
        found = [data["result"]] if data["resultType"] == "scalar" else [one["value"] for one in data["result"]]
        return [value for _, text in found if not math.isnan(value := float(text))]

    def wait_for(self, look: Callable[[], T], what: object) -> T:
        """Repeat until `look` gives something; what: for the message."""
        end = time.monotonic() + DEADLINE
        while not (seen := look()):
            assert time.monotonic() < end, f"never: {what}\n{self._log.read_text()}"
            time.sleep(0.2)
        return seen

    def wait_for_data(self, expression: str) -> list[float]:
        return self.wait_for(lambda: self.query(expression), expression)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(DEADLINE)
        finally:
            self._process.kill()
            self._process.wait(DEADLINE)


@contextmanager
def prometheus(base: Path, target: int) -> Iterator[Prometheus]:
    """A Prometheus that has scraped the target at least once; base: where it may put a directory."""
    home = base / "prometheus"
    home.mkdir()
    server = Prometheus(home, target)
    try:
        server.wait_for_data('up{job="udbad"} == 1')
        yield server
    finally:
        server.stop()
