"""python -m tests.bench: options, a private mount namespace, the run, and the cleaning up after it.

Everything is mounted in a mount namespace of its own (unshare -m), so that even a killed run leaves no mount behind,
and lives below one temporary directory that is removed at the end.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from tests.bench import install, plot, process, report
from tests.bench.data import FULL, QUICK, Data, Scale, mount_image
from tests.bench.measure import Row, measure, versions
from tests.bench.process import Failed
from tests.bench.systems import REPOSITORY, SYSTEMS, System, mount_fusectl
from tests.bench.workloads import Workload, all_workloads, check_name

# A fresh ext4 with default options, the same on every machine: what is under --scratch may be full, old, or without
# a journal (ext4 then searches for a free inode past all that were freed within the last minute: a create costs 1 ms).
EXT4 = ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
EXT4_BYTES = 40 << 30  # sparse
INSIDE = "UDBAD_BENCH_NAMESPACE"
HERE = Path(__file__).resolve().parent


def options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="udbad beside its competitors")
    parser.add_argument("--quick", action="store_true", help="a few minutes: less data, fewer repetitions")
    parser.add_argument("--only", metavar="NAME,...", help="workloads to run (--list shows them)")
    parser.add_argument("--systems", metavar="NAME,...", help="systems to measure")
    parser.add_argument("--repetitions", type=int, metavar="N", help="instead of the default")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), metavar="DIR", help="default: ./bench-out")
    parser.add_argument("--scratch", type=Path, default="/var/tmp", metavar="DIR", help="where the data goes")
    parser.add_argument("--plain", action="store_true", help="measure --scratch itself, not a fresh ext4 in an image")
    parser.add_argument("--no-install", action="store_true", help="never call apt-get")
    parser.add_argument("--list", action="store_true", help="show workloads and systems")
    return parser.parse_args(argv)


def chosen(text: str | None, known: list[str]) -> list[str]:
    """The names of a NAME,... option, all when it is not given. Raises Failed."""
    return known if text is None else [check_name(name, known) for name in text.split(",")]


def enter_namespace() -> None:
    """Start over inside a private mount namespace (os.unshare came with Python 3.12)."""
    if os.environ.get(INSIDE):
        return
    argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.bench", *sys.argv[1:]]
    os.environ[INSIDE] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execvp(argv[0], argv)


def on_signal(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does, through the finally clauses."""
    raise KeyboardInterrupt


def run(
    images: Path, scratch: Path, scale: Scale, workloads: list[Workload], systems: list[System], console: Console
) -> list[Row]:
    """Generate the data and measure; the loop devices are unmounted in any case. Raises Failed."""
    client = images / "client"
    process.run(["gcc", "-O2", "-o", client, HERE / "client.c"], deadline=60)
    (scratch / "run").mkdir()
    data = Data(images, scratch, scale, client)
    rows: list[Row] = []
    try:
        with console.status("making the data") as status:
            data.generate()
            if any(workload.file_system for workload in workloads):
                data.mount_loops()
            for workload in workloads:
                began = time.monotonic()
                rows += measure(workload, systems, data, scale.repetitions, status.update)
                console.log(f"{workload.name}: {time.monotonic() - began:.0f} s")
    except KeyboardInterrupt:
        console.print("interrupted: reporting what is there")
    finally:
        data.umount_loops()
    return rows


def main(argv: list[str]) -> int:
    arguments = options(argv)
    scale = QUICK if arguments.quick else FULL
    if arguments.repetitions:
        scale = replace(scale, repetitions=arguments.repetitions)
    workloads = all_workloads(scale)
    console = Console(stderr=True)
    try:
        names = chosen(arguments.only, [workload.name for workload in workloads])
        systems = [SYSTEMS[name] for name in chosen(arguments.systems, list(SYSTEMS))]
    except Failed as error:
        console.print(str(error), markup=False)
        return 2
    if arguments.list:
        print("workloads:", *(workload.name for workload in workloads))
        print("systems:", *SYSTEMS)
        return 0
    if os.geteuid() != 0:
        console.print("the benchmark mounts file systems and drops caches: it needs root")
        return 2
    arguments.out = arguments.out.absolute()
    if not arguments.no_install and not os.environ.get(INSIDE):
        for package in install.install():
            console.print(f"{package}: not to be had; what needs it is reported as n/a")
    enter_namespace()
    os.chdir(REPOSITORY)  # the daemons and the latency client are run with -m
    mount_fusectl()
    signal.signal(signal.SIGTERM, on_signal)
    images = Path(tempfile.mkdtemp(prefix="udbad-bench-", dir=arguments.scratch)).resolve()
    scratch = images / "ext4"
    try:
        if arguments.plain:
            scratch.mkdir()
        else:
            mount_image(images / "ext4.img", scratch, EXT4_BYTES, EXT4)
        machine = versions(scratch)
        rows = run(images, scratch, scale, [w for w in workloads if w.name in names], systems, console)
    except (Failed, OSError) as error:
        console.print(f"the run could not start: {error}", markup=False)
        return 1
    finally:
        if not arguments.plain:
            subprocess.run(["umount", scratch], check=False, timeout=300)
        shutil.rmtree(images, ignore_errors=True)
    settings: dict[str, object] = {"quick": arguments.quick, **asdict(scale)}
    report.write(arguments.out, rows, machine, settings, plot.svg(rows))
    report.terminal(rows, Console())
    console.print(f"written: {arguments.out}/bench.json, bench.md, bench.svg", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
