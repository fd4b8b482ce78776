"""The Debian package in a fresh Debian: it installs, mounts a union, serves the daemon's, and goes without a trace.

`make deb-test` builds the package and says where it is; without that the test has nothing to look at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.debian import apt_get, debootstrap, in_chroot
from tests.system.support import below, require, run

PACKAGE = os.environ.get("UDBAD_DEB", "")

pytestmark = [
    pytest.mark.system,
    pytest.mark.fuse,
]

APT_KEEPS = (b"var/lib/dpkg", b"var/lib/apt", b"var/cache", b"var/log", b"tmp", b"root")
"""What apt and dpkg write for themselves."""

PRESENT = (
    "/etc/udbad/conf.d",
    "/etc/udbad/udbad.toml",
    "/usr/bin/udbad",
    "/usr/sbin/mount.fuse.udba",
    "/usr/bin/udbad-overlay",
    "/usr/sbin/mount.udba",
    "/usr/share/bash-completion/completions/udbad",
    "/usr/share/doc/udbad/examples/pool.toml",
    "/usr/share/fish/vendor_completions.d/udbad.fish",
    "/usr/share/man/man5/udbad.toml.5.gz",
    "/usr/share/man/man8/mount.fuse.udba.8.gz",
    "/usr/share/man/man1/udbad-overlay.1.gz",
    "/usr/share/man/man8/mount.udba.8.gz",
    "/usr/share/man/man8/udbad.8.gz",
    "/usr/share/zsh/vendor-completions/_udbad",
)

BY_HAND = """
mkdir -p /srv/top /srv/base
echo base >/srv/base/file
mount -t udba -o br=/srv/top=rw:/srv/base=ro,udba=notify none /mnt
echo changed >/mnt/file
cat /srv/base/file /srv/top/file
dpkg --install /tmp/udbad.deb >/dev/null # an upgrade
cat /mnt/file
mount -o remount,udba=none /mnt
udbad where /mnt/file | cut -d' ' -f1 | xargs
umount /mnt
udbad fsck -n /srv/top >/dev/null
echo clean
rm -r /srv/top /srv/base
"""

BY_THE_DAEMON = """
udbad check-config -c /etc/udbad/udbad.toml
mkdir -p /srv/top /srv/base /tmp/etc
echo base >/srv/base/file
sed 's/^listen = .*/listen = "off"/; s/^enabled = false//; s,"/mnt/union","/mnt",' \\
    /etc/udbad/udbad.toml >/tmp/etc/udbad.toml
udbad run -c /tmp/etc/udbad.toml &
until udbad flush example 2>/dev/null; do sleep 0.1; done
cat /mnt/file
udbad status | grep -o serving
udbad stop
wait
ls /mnt | wc -l
rm -r /srv/top /srv/base /tmp/etc
"""


@pytest.fixture
def system(tmp_path: Path) -> Iterator[Path]:
    """A minimal Debian with what the package depends on, and not the package."""
    require("debootstrap", "unshare", "chroot")
    root = tmp_path / "root"
    try:
        debootstrap(root)
        assert PACKAGE
        depends = run("dpkg-deb", "--field", PACKAGE, "Depends").strip()
        apt_get(root, "satisfy", depends)
        shutil.copy(PACKAGE, root / "tmp/udbad.deb")
        yield root
    finally:
        shutil.rmtree(root)


def files(root: Path) -> dict[bytes, tuple[str, int, int, int, bytes]]:
    """Path to type, mode, owner, group and content, without what apt keeps for itself."""
    return {
        path: (entry.kind, entry.mode, entry.uid, entry.gid, entry.content)
        for path, entry in below(root).items()
        if not path.startswith(APT_KEEPS)
    }


def test_install_mount_purge(system: Path) -> None:
    """Everything works from what dpkg has unpacked, and after a purge the system is what it was."""
    before = files(system)
    in_chroot(system, "dpkg", "--install", "/tmp/udbad.deb")
    by_hand = in_chroot(system, "sh", "-ec", BY_HAND).splitlines()
    assert by_hand == ["base", "changed", "changed", "serves hidden", "clean"]
    lines = in_chroot(system, "sh", "-ec", BY_THE_DAEMON).splitlines()
    assert [line for line in lines if line in ("base", "serving", "0")] == ["base", "serving", "0"], lines
    listed = in_chroot(system, "dpkg", "--listfiles", "udbad").splitlines()
    assert set(PRESENT) <= set(listed)
    assert any(path.endswith("/systemd/system/udbad.service") for path in listed)
    assert in_chroot(system, "dpkg", "--verify", "udbad") == ""
    in_chroot(system, "dpkg", "--purge", "udbad")
    after = files(system)
    assert {path: after.get(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == {}
