"""Debian systems to try things in. The mirror is the one apt uses on the machine that runs the test."""

from __future__ import annotations

from pathlib import Path

from tests.system.support import clean_env, run

# Ends with exit, lest sh replaces itself: as process 1 of the namespace it adopts what apt leaves.
CHROOT = """
mount -t proc proc "$0/proc"
mount --bind /dev "$0/dev"
chroot "$0" "$@"
exit
"""


def mirror() -> tuple[str, str]:
    """(archive URI, suite) that apt on this machine takes its distribution from."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    suite = release["VERSION_CODENAME"].strip('"')
    wanted = ("Created-By: Packages", "Component: main", f"Release: {suite}")
    found = run("apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted).split()
    assert found, f"apt has no source for {suite} main"
    return found[0], suite


def in_chroot(root: Path, *argv: str, timeout: float = 600, ok: tuple[int, ...] = (0,)) -> str:
    """Run a program in the system at `root` with /proc and /dev; all it starts ends with it."""
    namespaces = ("--mount", "--pid", "--fork", "--kill-child", "--propagation", "private")
    env = clean_env(DEBIAN_FRONTEND="noninteractive", HOME="/root")
    return run("unshare", *namespaces, "--", "sh", "-ec", CHROOT, root, *argv, env=env, timeout=timeout, ok=ok)


def apt_get(root: Path, *argv: str) -> str:
    output = in_chroot(root, "apt-get", "-y", "-q", *argv)
    # Above all: "Download is performed unsandboxed as root as file ... couldn't be accessed by user '_apt'".
    warnings = [line for line in output.splitlines() if line.startswith(("W:", "E:", "dpkg: warning", "dpkg: error"))]
    assert not warnings, output
    return output


def debootstrap(target: Path) -> None:
    """A minimal system that starts no services and reaches the mirror as this machine does."""
    uri, suite = mirror()
    # In a mount namespace, because debootstrap mounts /proc and may fail before it unmounts.
    namespace = ("unshare", "--mount", "--propagation", "private", "--")
    run(*namespace, "debootstrap", "--variant=minbase", suite, target, uri, timeout=600)
    policy = target / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    reaching = ("Acquire::http", "Acquire::Check-")
    access = [line for line in run("apt-config", "dump").splitlines() if line.startswith(reaching)]
    options = ['APT::Install-Recommends "false";', 'Dpkg::Use-Pty "false";']
    (target / "etc/apt/apt.conf.d/99test").write_text("\n".join([*access, *options]) + "\n")
    in_chroot(target, "apt-get", "clean")
    for path in ("pool/old", "gone/deep/file", "opaque/under", "note", "was"):
        (target / "srv" / path).parent.mkdir(parents=True, exist_ok=True)
        (target / "srv" / path).write_text("base\n")
