"""What users have named, on the terminal of root: no control characters, no further lines."""

from __future__ import annotations

import os

import click
import pytest
from click.testing import CliRunner

from udbad.commands import common, inspect
from udbad.errors import ExitCode, UserError

EVIL = "\x1b]0;title\x07\n\x1b[2Jgone \u202e\udcff"


def test_files_and_processes_in_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    users = [{"pid": 1, "command": EVIL, "what": "open file", "path": f"/{EVIL}"}]
    monkeypatch.setattr(inspect, "ask_mount", lambda *arguments: {"users": users})
    done = CliRunner().invoke(inspect.busy, ["m", "/b"])
    assert done.exit_code == ExitCode.FAILURE
    assert done.output.count("\n") == 1
    assert done.output.rstrip("\n").isprintable()


def test_messages_of_errors(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def command() -> None:
        with common.user_errors():
            raise UserError(f"m is busy: open file {EVIL}")

    done = CliRunner().invoke(command, [])
    assert done.exit_code != 0
    assert all(line.startswith("udbad: ") and line.isprintable() for line in done.output.splitlines())
    assert os.fsdecode(b"\xff") not in done.output
