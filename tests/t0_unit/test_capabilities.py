"""Where an ordinary user's state and configuration are, and which edge serves whom."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from udbad.branch import capabilities


def test_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert capabilities.run_dir() == "/run/udbad"
    assert capabilities.config_file() == "/etc/udbad/udbad.toml"
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert capabilities.run_dir() == "/tmp/udbad-4711"
    assert capabilities.config_file() == f"{tmp_path}/.config/udbad/udbad.toml"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", "/etc/xdg/me")
    assert capabilities.run_dir() == f"{tmp_path}/udbad"
    assert capabilities.config_file() == "/etc/xdg/me/udbad/udbad.toml"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    assert capabilities.run_dir() == "/tmp/udbad-4711"


@pytest.mark.parametrize(
    ("device", "bits", "may"),
    [(True, 1 << 21, True), (False, 1 << 21, False), (True, ~(1 << 21), False)],
    ids=["root", "no access to the device", "no CAP_SYS_ADMIN"],
)
def test_who_mounts_himself(monkeypatch: pytest.MonkeyPatch, device: bool, bits: int, may: bool) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: device)
    monkeypatch.setattr(os.path, "exists", lambda _: True)
    monkeypatch.setattr(capabilities, "read", lambda: (bits, 0, 0))
    assert capabilities.may_mount() is may
