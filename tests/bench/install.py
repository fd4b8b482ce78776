"""Debian packages the benchmark needs: those that are missing are installed with apt-get.

May not do anything else to the machine. A package that cannot be had is no error here: the system or workload that
needs it is reported as n/a with the reason.
"""

import shutil
import subprocess

# program that shows that a package is there -> the package
PACKAGES = {
    "fuse-overlayfs": "fuse-overlayfs",
    "mergerfs": "mergerfs",
    "unionfs": "unionfs-fuse",
    "fusermount3": "fuse3",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.ext4": "e2fsprogs",
    "fio": "fio",
    "gcc": "gcc",
    "make": "make",
    "git": "git",
    "tar": "tar",
    "find": "findutils",
    "unshare": "util-linux",
}
APT = ["apt-get", "-y", "-q", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0"]


def missing() -> list[str]:
    """Packages whose program is not on PATH."""
    return sorted({package for program, package in PACKAGES.items() if shutil.which(program) is None})


def install() -> list[str]:
    """Install what is missing; returns what is still missing afterwards (no apt-get, no such package, no network)."""
    wanted = missing()
    if not wanted or shutil.which("apt-get") is None:
        return wanted
    environment = {"DEBIAN_FRONTEND": "noninteractive", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    subprocess.run([*APT, "update"], env=environment, check=False, stdout=subprocess.DEVNULL)
    for package in wanted:  # one by one: a package this release does not have must not keep the others away
        subprocess.run([*APT, "install", package], env=environment, check=False, stdout=subprocess.DEVNULL)
    return missing()
