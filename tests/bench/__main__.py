"""python -m tests.bench: options, a private mount namespace, the run, and the cleaning up after it.

Everything is mounted in a mount namespace of its own (unshare -m), so that even a killed run leaves no mount behind,
and lives below one temporary directory that is removed at the end.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from tests.bench import install, plot, process, report
from tests.bench.budget import LEAST, Budget
from tests.bench.data import FULL, QUICK, Data, Scale, mount_image
from tests.bench.machine import awake, versions
from tests.bench.measure import Course, measure
from tests.bench.process import Failed
from tests.bench.systems import REPOSITORY, SYSTEMS, mount_fusectl
from tests.bench.workloads import all_workloads, check_name

# A fresh ext4 with default options, the same on every machine: what is under --scratch may be full, old, or without
# a journal (ext4 then searches for a free inode past all that were freed within the last minute: a create costs 1 ms).
EXT4 = ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
EXT4_BYTES = 16 << 30  # sparse; 40 GiB would be 640 MiB of inode tables to write
CLOSING = 30  # seconds of the time that are for taking all down (unmounting writes what is dirty) and for the report
INSIDE = "UDBAD_BENCH_NAMESPACE"
HERE = Path(__file__).resolve().parent


def options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="udbad beside its competitors")
    parser.add_argument("--quick", action="store_true", help="a few minutes: less data, fewer repetitions")
    parser.add_argument("--only", metavar="NAME,...", help="workloads to run (--list shows them)")
    parser.add_argument("--systems", metavar="NAME,...", help="systems to measure")
    parser.add_argument("--repetitions", type=int, metavar="N", help="at most so many, instead of the default")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="how long it may take, not the default; 0: without end",
    )
    parser.add_argument("--out", type=Path, default=Path("bench-out"), metavar="DIR", help="default: ./bench-out")
    parser.add_argument("--scratch", type=Path, default="/var/tmp", metavar="DIR", help="where the data goes")
    parser.add_argument("--plain", action="store_true", help="measure --scratch itself, not a fresh ext4 in an image")
    parser.add_argument("--as-is", action="store_true", help="a virtual machine that halts without polling stays so")
    parser.add_argument("--no-install", action="store_true", help="never call apt-get")
    parser.add_argument("--publish", action="store_true", help="put the figures into the documentation of this clone")
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


def run(images: Path, scratch: Path, scale: Scale, courses: list[Course], budget: Budget, console: Console) -> None:
    """Generate the data and measure; other file systems are unmounted in any case. Raises Failed."""
    client = images / "client"
    process.run(["gcc", "-O2", "-o", client, HERE / "client.c"], deadline=60)
    (scratch / "run").mkdir()
    data = Data(images, scratch, scale, client)
    try:
        with console.status("making the data") as status:
            data.generate()
            data.mount_others(sorted({kind for course in courses if (kind := course.workload.file_system)}))
            console.log(f"data made, {budget.left():.0f} s left")
            measure(courses, data, scale.repetitions, budget, status.update, console.log)
    except KeyboardInterrupt:
        console.print("interrupted: reporting what is there")
    finally:
        data.umount_others()


def main(argv: list[str]) -> int:
    arguments = options(argv)
    scale = QUICK if arguments.quick else FULL
    if arguments.repetitions:
        scale = replace(scale, repetitions=arguments.repetitions)
    if arguments.minutes is not None:
        scale = replace(scale, minutes=arguments.minutes)
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
    budget = Budget(max(scale.minutes * 60 - CLOSING, LEAST) if scale.minutes else 0)
    os.chdir(REPOSITORY)  # the daemons and the latency client are run with -m
    mount_fusectl()
    signal.signal(signal.SIGTERM, on_signal)
    courses = [Course(workload, systems) for workload in workloads if workload.name in names]
    images = Path(tempfile.mkdtemp(prefix="udbad-bench-", dir=arguments.scratch)).resolve()
    scratch = images / "ext4"
    try:
        if arguments.plain:
            scratch.mkdir()
        else:
            mount_image(images / "ext4.img", scratch, EXT4_BYTES, EXT4)
        with contextlib.nullcontext() if arguments.as_is else awake():
            machine = versions(scratch)
            run(images, scratch, scale, courses, budget, console)
    except (Failed, OSError) as error:
        console.print(f"the run could not start: {error}", markup=False)
        return 1
    finally:
        if not arguments.plain:
            subprocess.run(["umount", scratch], check=False, timeout=300)
        shutil.rmtree(images, ignore_errors=True)
    rows = [row for course in courses for row in course.figures()]
    settings: dict[str, object] = {"quick": arguments.quick, **asdict(scale)}
    svg = plot.svg(rows)
    report.write(arguments.out, rows, machine, settings, svg)
    report.terminal(rows, Console())
    console.print(f"written: {arguments.out}/bench.json, bench.md, bench.svg", markup=False)
    if arguments.publish:
        report.publish(REPOSITORY, rows, machine, svg)
        console.print("written: docs/performance.md, tests/bench/results", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
