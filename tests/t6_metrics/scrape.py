"""Scraping and reading what comes back: the client's side of the metrics endpoint."""

from __future__ import annotations

import http.client
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

DEADLINE: Final = 60.0
"""Seconds until a test gives up waiting for a number; nothing is proved by how long it takes."""


class Page:
    """One scrape. series: (sample name, sorted labels) to value."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.types: dict[str, str] = {}
        self.series: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for family in text_string_to_metric_families(text):
            self.types[family.name] = family.type
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                assert key not in self.series, f"twice: {key}"
                self.series[key] = sample.value

    def all(self, name: str, **labels: str) -> list[float]:
        """Values of every series of a name with these labels among its own."""
        return [
            value
            for (found, pairs), value in self.series.items()
            if found == name and labels.items() <= dict(pairs).items()
        ]

    def sum(self, name: str, **labels: str) -> float:
        return sum(self.all(name, **labels))

    def one(self, name: str, **labels: str) -> float:
        """The value of the only series of a name with these labels among its own."""
        values = self.all(name, **labels)
        assert len(values) == 1, f"{name}{labels}: {values}"
        return values[0]

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """Cumulated buckets, summed over all series with these labels: upper bound to observations."""
        result: dict[float, float] = {}
        for (found, pairs), value in self.series.items():
            words = dict(pairs)
            if found == f"{name}_bucket" and labels.items() <= words.items():
                bound = math.inf if words["le"] == "+Inf" else float(words["le"])
                result[bound] = result.get(bound, 0) + value
        return result


def get(port: int, path: str = "/metrics", **headers: str) -> tuple[http.client.HTTPMessage, bytes]:
    """Headers and body of the answer to one GET on loopback, which must be 200."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        client.request("GET", path, headers=headers)
        response = client.getresponse()
        assert response.status == 200
        return response.headers, response.read()
    finally:
        client.close()


def scrape(port: int) -> Page:
    """Scrape the endpoint as text."""
    return Page(get(port)[1].decode())


def wait_for(port: int, wanted: Callable[[Page], bool]) -> Page:
    """Scrape until a page says what is wanted."""
    end = time.monotonic() + DEADLINE
    while True:
        page = scrape(port)
        if wanted(page):
            return page
        assert time.monotonic() < end, f"never seen; the last page:\n{page.text}"
        time.sleep(0.1)


def stir(branch: Path) -> None:
    """Change a branch directory, so that its names have to be asked for again, but none that a test knows."""
    with tempfile.NamedTemporaryFile(dir=branch):
        pass
