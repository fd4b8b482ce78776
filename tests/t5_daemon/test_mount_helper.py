"""mount.udba as mount(8) calls it, with and without a daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.helpers.mount import REPOSITORY

pytestmark = pytest.mark.fuse

HELPER = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from udbad.commands.helper import main
main()
"""


@pytest.mark.parametrize("mode", ["daemon", "alone"])
def test_mount_8(tmp_path: Path, mode: str) -> None:
    helper = tmp_path / "mount.udba"
    helper.write_text(HELPER)
    helper.chmod(0o755)
    run_dir = tempfile.mkdtemp(prefix="udbad-run-")
    script = Path(__file__).with_name("mount_helper.sh")
    environment = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "UDBAD_RUN_DIR": run_dir, "PYTHON": sys.executable,
    }  # fmt: skip
    command = ["unshare", "--mount", "--propagation", "private", str(script), str(tmp_path / "w"), str(helper), mode]
    log = tmp_path / "log"
    try:
        with log.open("wb") as errors:
            done = subprocess.run(
                command, check=False, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=300, env=environment
            )
    finally:
        shutil.rmtree(run_dir)
    assert done.returncode == 0, done.stdout + log.read_text()
    assert done.stdout.splitlines() == [
        "mounted: base fuse.udba top=rw base=ro",
        "remounted: extra top=rw base=ro extra=ro 1",
        "deleted: file top=rw base=ro",
        "added: extra=rw top=rw od,d=dir=ro base=ro",
        "changed: extra=ro top=rw base=ro",
        "empty: mount.udba: append needs a value: PATH[=PERM[+ATTR...]]",
        "refused: mount.udba: plink cannot change while mounted: umount, and mount again",
        "ro: Read-only file system ro",
        "rw: rw,noexec",
        "busy: mount.udba: mnt is busy: open file /open of process",
        "unmounted: 0",
        "fstab: base pool mnt",
        "again: 1",
        "other: mount.udba: mnt is mounted already, with other options (-o remount changes them)",
        "by name: 0",
        "missing: branch nowhere does not exist",
        "option: udba=sometimes: must be none, reval or notify",
    ], log.read_text()


@pytest.mark.parametrize("unit", ["udbad.service", "udbad@.service"])
def test_systemd_units(tmp_path: Path, unit: str) -> None:
    """As installed, but for the path of the program, which systemd-analyze looks for."""
    text = (REPOSITORY / "config" / unit).read_text()
    assert "/usr/bin/udbad " in text
    path = tmp_path / unit
    path.write_text(text.replace("/usr/bin/udbad ", "/usr/bin/env udbad "))
    path.chmod(0o644)  # systemd complains about files that others can write, whatever the umask here is
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("ok: no systemd-analyze here")
    done = subprocess.run([analyze, "verify", str(path)], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
