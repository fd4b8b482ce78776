"""Telling a mount of changes that it cannot see happen, as lines of standard input: paths, or JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

import click

from udbad.commands.common import run_dir_option, user_errors
from udbad.commands.completion import mounts
from udbad.control import client
from udbad.control.protocol import MAX_LINE, Message, checked_text
from udbad.errors import ExitCode, UserError

_READ_BYTES = 64 * 1024
_PATIENCE = 60.0
"""Seconds for a mount whose process is being replaced: its successor believes nothing that was cached before."""

Hint = tuple[str, str]
"""A path, and what has become of it (words of inotifywait(1); "": anything)."""


@click.command()
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help='Objects: {"path": ..., "kind": "create,isdir", "to": ...}.')
@click.option("-0", "--null", is_flag=True, help="Lines end with NUL, for names with line feeds (find -print0).")
@click.option(
    "--strip", default="", metavar="PREFIX", help="What paths have before them elsewhere, where they begin so."
)
@click.argument("mount", shell_complete=mounts)
def feed(run_dir: str, as_json: bool, null: bool, strip: str, mount: str) -> None:
    """Have MOUNT look at what standard input says has changed on its branches, a path a line.

    A path is relative to the branches, or absolute on one of them or in MOUNT; with a slash at its end it stands for
    all that is below it, too. What a line says is looked at, not believed. Ends with standard input; exit code 1 when
    a line could not be read.
    """
    totals = {"hints": 0, "known": 0, "outside": 0}
    wrong = 0
    with user_errors():
        client.locate(run_dir, mount)
        for lines in _batches(b"\0" if null else b"\n"):
            hints: list[Hint] = []
            for line in lines:
                try:
                    hints += _from_json(line, strip) if as_json else [(_stripped(os.fsdecode(line), strip), "")]
                except UserError as error:
                    wrong += 1
                    click.echo(f"udbad: line {totals['hints'] + len(hints) + wrong}: {error.message}", err=True)
            if hints:
                answer = _tell(run_dir, mount, hints)
                for key in totals:
                    totals[key] += answer[key]
    click.echo(f"{totals['hints']} hints, {totals['known']} of them on what is cached, {totals['outside']} elsewhere")
    if wrong:
        raise SystemExit(int(ExitCode.FAILURE))


def _batches(end: bytes) -> Iterator[list[bytes]]:
    """What can be read, without waiting for more of it, as whole lines without their ends."""
    rest = b""
    while data := os.read(0, _READ_BYTES):
        *lines, rest = (rest + data).split(end)
        if len(rest) > MAX_LINE // 8:
            raise UserError("a line is longer than any path")
        yield [line for line in lines if line]
    if rest:
        yield [rest]


def _from_json(line: bytes, strip: str) -> list[Hint]:
    """Raises UserError for what is no hint."""
    try:
        hint = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError("not JSON") from None
    if not isinstance(hint, dict) or "path" not in hint:
        raise UserError('not an object with "path"')
    kind = checked_text(hint.get("kind", ""), "kind")
    if "to" in hint and kind:
        kind += ",move"
    return [(_stripped(checked_text(hint[key], key), strip), kind) for key in ("path", "to") if key in hint]


def _stripped(path: str, prefix: str) -> str:
    prefix = prefix.rstrip("/")
    inside = bool(prefix) and (path == prefix or path.startswith(prefix + "/"))
    return path[len(prefix) :].lstrip("/") if inside else path


def _tell(run_dir: str, mount: str, hints: list[Hint]) -> Message:
    """Raises UserError when the mount has been gone for too long."""
    given_up = time.monotonic() + _PATIENCE
    while True:
        try:
            entry, _ = client.locate(run_dir, mount)
            return client.ask_mount(entry, {"op": "feed", "hints": hints})
        except UserError as error:
            if error.code is not ExitCode.NO_DAEMON or time.monotonic() > given_up:
                raise
        time.sleep(0.1)
