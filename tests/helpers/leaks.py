"""What a test run may not leave behind: mounts, processes, loop devices, temporary files.

The functions read /proc and /sys only and never touch a mount point, which may be wedged. As a
program (`python -m tests.helpers.leaks --run ID --tree DIR`) it reports every leak, then ends,
unmounts and detaches what it reported, so that the tree can be removed; exit code 1 on any leak.
A process belongs to the run when its environment carries UDBAD_TEST_RUN=ID, or when its root,
working directory or an open file lies in the tree (a chroot may have cleared the environment).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from udbad.branch import mountinfo

RUN_MARKER = "UDBAD_TEST_RUN"
FS_TYPE = "fuse.udba"
FUSECTL = Path("/sys/fs/fuse/connections")
_CLONE_NEWNS: Final = 0x00020000  # linux/sched.h


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One line of /proc/self/mountinfo. minor: of st_dev; of a FUSE mount, its connection number.

    options: of the mount, super_options: of the file system.
    """

    path: Path
    fs_type: str
    major: int
    minor: int
    source: str
    options: frozenset[str]
    super_options: frozenset[str]

    def __str__(self) -> str:
        return f"{self.fs_type} on {self.path}"


def read_mountinfo() -> list[MountInfo]:
    """Every mount of this namespace, in mount order (a later one covers an earlier one on the same path)."""
    return list(_parsed(Path("/proc/self/mountinfo").read_bytes()))


@lru_cache(maxsize=8)
def _parsed(table: bytes) -> tuple[MountInfo, ...]:
    """Looked at twice by every test, most of which find what the one before has found."""
    return tuple(
        MountInfo(
            Path(os.fsdecode(mount.point)), os.fsdecode(mount.fs_type), *mount.device, os.fsdecode(mount.source),
            frozenset(os.fsdecode(mount.options).split(",")), frozenset(os.fsdecode(mount.super_options).split(",")),
        )
        for mount in mountinfo.parse(table)
    )  # fmt: skip


def mount_on(path: Path) -> MountInfo:
    """What is mounted on `path`, topmost. Raises LookupError."""
    return [mount for mount in read_mountinfo() if mount.path == path][-1]


def mounts_under(tree: Path) -> list[MountInfo]:
    """Mounts at or below `tree`, which must be absolute and free of symbolic links; innermost last."""
    return [mount for mount in read_mountinfo() if mount.path.is_relative_to(tree)]


def abort_connection(connection: int) -> None:
    """Abort a FUSE connection through fusectl, the one way to free a wedged mount; one that is gone is fine."""
    try:
        (FUSECTL / str(connection) / "abort").write_text("1")
    except FileNotFoundError:
        return


def remove_mount(mount: MountInfo) -> bool:
    """Take a left mount away whatever its state: abort it if it is FUSE, then unmount lazily. Whether that worked."""
    if mount.fs_type.split(".")[0] == "fuse":
        abort_connection(mount.minor)
    # -i, -c: no helper program and no path look-up that could hang.
    done = subprocess.run(["umount", "-i", "-c", "-l", "--", str(mount.path)], check=False, timeout=20)
    return done.returncode == 0


def own_namespace() -> None:
    """Give the calling thread, and what it starts, a mount namespace without the unions that others have mounted.

    A copy of a union keeps the daemon that serves it from ending. For a main thread, before it has mounted anything.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:  # os.unshare came with Python 3.12
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True, timeout=20)
    for mount in reversed(read_mountinfo()):
        if mount.fs_type == FS_TYPE:
            subprocess.run(["umount", "-i", "-c", "-l", "--", str(mount.path)], check=True, timeout=20)


def _own_family() -> set[int]:
    """This process and its ancestors, which rightly carry the marker of the run."""
    family = set()
    pid = os.getpid()
    while pid > 0:
        family.add(pid)
        # The command name, field 2, may contain anything; what follows its last ")" is: state ppid ...
        pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return family


def _links(pid: int) -> Iterator[str]:
    """Where the root, the working directory and the open files of a process are; readlink touches no mount."""
    proc = f"/proc/{pid}"
    try:
        names = [f"{proc}/root", f"{proc}/cwd", *(f"{proc}/fd/{fd}" for fd in os.listdir(f"{proc}/fd"))]
    except OSError:  # ended meanwhile, or not ours to look at
        return
    for name in names:
        try:
            yield os.readlink(name)
        except OSError:
            continue


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def holders(tree: Path) -> list[int]:
    """Processes, this one and its ancestors aside, with root, working directory or an open file in `tree`."""
    prefix = str(tree)
    family = _own_family()
    return [
        pid
        for pid in _processes()
        if pid not in family and any(link == prefix or link.startswith(prefix + "/") for link in _links(pid))
    ]


def marked_processes(run: str) -> list[int]:
    """Processes, this one and its ancestors aside, whose environment carries the marker of the run."""
    marker = f"{RUN_MARKER}={run}".encode()
    family = _own_family()
    found = []
    for pid in _processes():
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or not ours to look at
            continue
        if marker in environ and pid not in family:
            found.append(pid)
    return found


def describe_process(pid: int) -> str:
    """`pid command line`, for a message."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return f"{pid} (ended)"
    return f"{pid} {b' '.join(words).decode(errors='replace').strip()}"


def loop_devices(tree: Path) -> list[tuple[str, str]]:
    """(device, backing file) of every loop device over a file in `tree`, deleted files included."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            target = backing.read_text().strip()
        except OSError:  # detached meanwhile
            continue
        if target.startswith(f"{tree}/"):
            found.append((f"/dev/{backing.parts[3]}", target))
    return found


def check_and_clean(run: str, tree: Path, empty: Path | None, own_namespace: bool) -> list[str]:
    """Every leak in words; each one is removed, temporary files aside.

    empty: a directory that must have nothing in it (TMPDIR of the run). own_namespace: the mount
    namespace is the run's own, so that a union anywhere in it is a leak.
    """
    leaks = []
    for mount in reversed(read_mountinfo()):
        if mount.path.is_relative_to(tree) or (own_namespace and mount.fs_type == FS_TYPE):
            leaks.append(f"mount: {mount}")
            remove_mount(mount)
    for pid in sorted({*marked_processes(run), *holders(tree)}):
        leaks.append(f"process: {describe_process(pid)}")
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for device, target in loop_devices(tree):
        leaks.append(f"loop device: {device} over {target}")
        subprocess.run(["losetup", "--detach", device], check=False, timeout=20)
    if empty is not None:
        leaks += [f"temporary file: {path}" for path in sorted(empty.iterdir())]
    return leaks


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Report and remove what a test run left behind.")
    parser.add_argument("--run", required=True, help=f"value of {RUN_MARKER}")
    parser.add_argument("--tree", required=True, type=Path, help="directory that held all files of the run")
    parser.add_argument("--empty", type=Path, help="directory that must be empty")
    parser.add_argument("--own-namespace", action="store_true", help=f"any mount of type {FS_TYPE} is a leak")
    options = parser.parse_args(None if arguments is None else list(arguments))
    leaks = check_and_clean(options.run, options.tree.resolve(), options.empty, options.own_namespace)
    for leak in leaks:
        print(f"left behind: {leak}", file=sys.stderr)
    print(f"leak check: {len(leaks)} left behind")
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main())
