"""What packages say of udbad and bring along agrees with udbad."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from udbad import __version__, cli, manpages

ROOT = Path(__file__).parents[2]
MAN = ROOT / "share/man"


def test_debian_version() -> None:
    """The newest entry of debian/changelog is of this version."""
    assert (ROOT / "debian/changelog").read_text().startswith(f"udbad ({__version__}) ")


def test_manual_pages_are_current() -> None:
    """`python -m udbad.manpages share/man` mends it."""
    written = {str(path.relative_to(MAN)): path.read_text() for path in MAN.rglob("*.?")}
    assert written == manpages.pages(ROOT)


@pytest.mark.parametrize(
    "page", ["man1/udbad-overlay.1", "man8/udbad.8", "man8/mount.udba.8", "man8/mount.fuse.udba.8", "man5/udbad.toml.5"]
)
def test_manual_page_is_good_man(page: str) -> None:
    """Neither man(1), that is groff, nor mandoc has anything to say about it."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    program, section = page.rpartition("/")[2].rsplit(".", 1)
    commands = [["man", "-M", str(MAN), "--warnings=w", section, program]]
    if not (MAN / page).read_text().startswith(".so "):
        commands.append(["mandoc", "-Tlint", "-Wwarning", page])
    for command in commands:
        done = subprocess.run(command, cwd=MAN, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), command
        if command[0] == "man":
            assert "SEE ALSO" in done.stdout
        else:
            assert done.stdout == ""


def test_manual_page_has_every_command() -> None:
    text = (MAN / "man8/udbad.8").read_text()
    hidden = {name for name, command in cli.main.commands.items() if command.hidden}
    named = {line.split('"')[1].split()[0] for line in text.splitlines() if line.startswith(".SS ")}
    assert named == cli.main.commands.keys() - hidden
