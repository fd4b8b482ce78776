"""Certificates for the loopback interface, made with openssl(1)."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

_SECONDS: Final = 30.0
_KEY: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=_SECONDS)


class Authority:
    """Who signs. certificate: its own, a PEM file."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._key = directory / f"{name}.key"
        self.certificate = directory / f"{name}.pem"
        _openssl("req", "-x509", *_KEY, "-keyout", self._key, "-out", self.certificate, "-subj", f"/CN={name}")

    def sign(self, name: str, address: str = "127.0.0.1") -> tuple[Path, Path]:
        """A certificate for an address, and its key."""
        certificate, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        _openssl(
            "req", "-x509", *_KEY, "-CA", self.certificate, "-CAkey", self._key, "-keyout", key, "-out", certificate,
            "-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{address}", "-addext", "basicConstraints=CA:FALSE",
        )  # fmt: skip
        return certificate, key
