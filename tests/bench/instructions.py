"""Instructions of user space for one request, by kind: `python -m tests.bench.instructions [--mode MODE] [--cached]`.

`Native.take` under valgrind's callgrind, in one process: a socket pair is /dev/fuse, the branches are on tmpfs, there
is a record. Counted is the serving side only, and of system calls nothing that the kernel does. Requests come ten at a
time, and branch events are taken after each ten, as by a loop that is busy. The same sources give the same figures
within a percent, whatever else the machine does: a change is judged by them first, then by CPU time (workload
`requests`). `--keep DIR` leaves a profile of each kind: `callgrind_annotate --threshold=100 DIR/profile.N`.

Needs valgrind and a C compiler. UDBAD_PURE=1 counts the Python sources.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.t2_core.fake_notifier import FakeNotifier
from udbad.branch.accept import open_branches, prepare_writable
from udbad.branch.branches import BranchSpec
from udbad.branch.credentials import Credentials
from udbad.branch.policy import parse_copyup, parse_create
from udbad.coherence.base import Coherence
from udbad.coherence.none import NoneCoherence
from udbad.coherence.notify import NotifyCoherence
from udbad.coherence.reval import RevalCoherence
from udbad.edge.native import Native
from udbad.inodes.record import Record
from udbad.kernel import wire
from udbad.types import ROOT_ID, Perm
from udbad.union import homes, recall
from udbad.union.fs import UnionFs
from udbad.union.superblock import Superblock, UnionOptions

MODES: dict[str, type[Coherence]] = {"none": NoneCoherence, "reval": RevalCoherence, "notify": NotifyCoherence}
FILES = 100
"""In each directory, and so requests of a kind."""
BURST = 10
DIRECTORIES = ("plain", "view", "lower", "upper", "listed")
AGE = 0.2
"""Seconds after which times of files tell for sure that nothing has changed."""

SHIM = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_TOGGLE_COLLECT; }
void end(void) { CALLGRIND_TOGGLE_COLLECT; }
void dump(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
"""

Question = tuple[int, int, bytes]
"""opcode, node id, body."""


class Kernel:
    """Asks, and has what it asks for counted."""

    def __init__(self, union: UnionFs, coherence: Coherence, record: Record, shim: ctypes.PyDLL) -> None:
        self._device, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._device.setblocking(False)
        self._ours.setblocking(False)
        self._shim = shim
        self._unique = 2
        self.native = Native(self._ours.fileno(), union, coherence, union.walks.stale, record=record)

    def ask(self, questions: Sequence[Question], *expected: int) -> list[bytes]:
        """The bodies of the answers, all of which have to have no errno, or one of these."""
        bodies = []
        for first in range(0, len(questions), BURST):
            burst = questions[first : first + BURST]
            for opcode, node, body in burst:
                self._unique += 2
                header = struct.pack("<IIQQIIIHH", wire.BODY + len(body), opcode, self._unique, node, 0, 0, 1, 0, 0)
                self._device.send(header + body)
            self._shim.begin()
            for _ in burst:
                self.native.take()
            self.native.take_events()
            self._shim.end()
            for _ in burst:
                reply = self._device.recv(1 << 20)
                _, error, _ = wire.REPLY.unpack_from(reply)
                if -error and -error not in expected:
                    raise RuntimeError(f"opcode {burst[0][0]}: {os.strerror(-error)}")
                bodies.append(reply[wire.REPLY.size :])
        return bodies

    def tell(self, name: str, questions: Sequence[Question]) -> None:
        """`count` of requests that have no answer."""
        self._shim.dump(b"")
        for opcode, node, body in questions:
            self._unique += 2
            header = struct.pack("<IIQQIIIHH", wire.BODY + len(body), opcode, self._unique, node, 0, 0, 1, 0, 0)
            self._device.send(header + body)
            self._shim.begin()
            self.native.take()
            self._shim.end()
        self._shim.dump(f"{name} {len(questions)}".encode())

    def count(self, name: str, questions: Sequence[Question], *expected: int) -> list[bytes]:
        """`ask`, as a kind of its own."""
        self._shim.dump(b"")  # what came before is nobody's
        bodies = self.ask(questions, *expected)
        self._shim.dump(f"{name} {len(questions)}".encode())
        return bodies


def number(body: bytes, offset: int = 0) -> int:
    (value,) = wire.QWORD.unpack_from(body, offset)
    assert isinstance(value, int)
    return value


def nodes(kernel: Kernel, parent: int, names: Sequence[bytes]) -> list[int]:
    return [number(body) for body in kernel.ask([(wire.LOOKUP, parent, name + b"\0") for name in names])]


def setattr_body(valid: int, mode: int = 0, uid: int = 0, seconds: int = 0) -> bytes:
    return wire.SETATTR_IN.pack(valid, 0, 0, seconds, seconds, 0, 0, 0, 0, mode, uid, 0)


def read_side(kernel: Kernel, plain: int, view: int, listed: int) -> None:
    names = [b"file%d\0" % each for each in range(FILES)]
    absent = [b"none%d\0" % each for each in range(FILES)]
    handle = number(kernel.ask([(wire.OPENDIR, view, bytes(8))])[0])
    kernel.count("readdir, 100 names", [(wire.READDIR, view, wire.READ_IN.pack(handle, 0, 65536) + bytes(20))])
    kernel.count("readdir, again", [(wire.READDIR, view, wire.READ_IN.pack(handle, 0, 65536) + bytes(20))])
    kernel.ask([(wire.RELEASEDIR, view, wire.QWORD.pack(handle) + bytes(16))])
    handle = number(kernel.ask([(wire.OPENDIR, listed, bytes(8))])[0])
    kernel.count("readdirplus", [(wire.READDIRPLUS, listed, wire.READ_IN.pack(handle, 0, 65536) + bytes(20))])
    for title, directory in (("", plain), (", view", view)):
        found = kernel.count(f"lookup{title}", [(wire.LOOKUP, directory, name) for name in names])
        kernel.count(f"lookup, known{title}", [(wire.LOOKUP, directory, name) for name in names])
        kernel.count(f"lookup, none{title}", [(wire.LOOKUP, directory, name) for name in absent], errno.ENOENT)
    files = [number(body) for body in found]
    kernel.count("getattr", [(wire.GETATTR, each, bytes(16)) for each in files])
    opened = kernel.count("open", [(wire.OPEN, each, wire.TWO_WORDS.pack(os.O_RDONLY, 0)) for each in files])
    handles = list(zip(files, map(number, opened), strict=True))
    kernel.count(
        "read", [(wire.READ, each, wire.READ_IN.pack(handle, 0, 4096) + bytes(20)) for each, handle in handles]
    )
    kernel.count("release", [(wire.RELEASE, each, wire.QWORD.pack(handle) + bytes(16)) for each, handle in handles])
    key = wire.TWO_WORDS.pack(255, 0) + b"security.capability\0"
    for title in ("getxattr", "getxattr, again"):
        kernel.count(title, [(wire.GETXATTR, each, key) for each in files], errno.ENODATA)


def change_side(kernel: Kernel, lower: int, upper: int) -> None:
    names = [b"file%d" % each for each in range(FILES)]
    copied = nodes(kernel, lower, names)
    time.sleep(AGE)
    kernel.count("chown, copy-up", [(wire.SETATTR, each, setattr_body(wire.SET_UID, uid=7)) for each in copied])
    kernel.ask([(wire.LOOKUP, upper, b"new%d\0" % each) for each in range(FILES)], errno.ENOENT)
    flags = wire.FOUR_WORDS.pack(os.O_RDWR | os.O_CREAT, 0o100644, 0o22, 0)
    made = kernel.count("create", [(wire.CREATE, upper, flags + b"new%d\0" % each) for each in range(FILES)])
    opened = [(number(body), number(body, wire.ENTRY_SIZE)) for body in made]  # with io=cached the handle is 0
    data = bytes(1024)
    kernel.count(
        "write", [(wire.WRITE, each, wire.READ_IN.pack(fh, 0, len(data)) + bytes(20) + data) for each, fh in opened]
    )
    if not kernel.native.fs.kept:
        kernel.count("release, written", [(wire.RELEASE, each, wire.QWORD.pack(fh) + bytes(16)) for each, fh in opened])
    files = [each for each, _ in opened]
    time.sleep(AGE)
    kernel.count("chmod", [(wire.SETATTR, each, setattr_body(wire.SET_MODE, mode=0o100600)) for each in files])
    kernel.count("chown", [(wire.SETATTR, each, setattr_body(wire.SET_UID, uid=7)) for each in files])
    times = setattr_body(wire.SET_ATIME | wire.SET_MTIME, seconds=1_000_000_000)
    kernel.count("utime", [(wire.SETATTR, each, times) for each in files])
    key = wire.TWO_WORDS.pack(2, 0) + bytes(8) + b"user.a\0" + b"xx"
    kernel.count("setxattr", [(wire.SETXATTR, each, key) for each in files])
    to = wire.QWORD_AND_WORD.pack(upper, 0)
    kernel.count("rename", [(wire.RENAME2, upper, to + b"new%d\0to%d\0" % (each, each)) for each in range(FILES)])
    kernel.count("link", [(wire.LINK, upper, wire.QWORD.pack(file) + b"link%d\0" % file) for file in files])
    kernel.count("unlink, of two", [(wire.UNLINK, upper, b"link%d\0" % file) for file in files])
    kernel.count("unlink", [(wire.UNLINK, upper, b"to%d\0" % each) for each in range(FILES)])
    kernel.tell("forget", [(wire.FORGET, each, wire.QWORD.pack(1)) for each in files])
    kernel.count("unlink, lower", [(wire.UNLINK, lower, name + b"\0") for name in names])
    mode = wire.TWO_WORDS.pack(0o40755, 0o22)
    kernel.count("mkdir", [(wire.MKDIR, upper, mode + b"dir%d\0" % each) for each in range(FILES)])
    kernel.count("rmdir", [(wire.RMDIR, upper, b"dir%d\0" % each) for each in range(FILES)])
    kernel.count("symlink", [(wire.SYMLINK, upper, b"link%d\0to\0" % each) for each in range(FILES)])


@contextmanager
def served(directory: Path, mode: str, cached: bool, shim: ctypes.PyDLL) -> Iterator[Kernel]:
    for branch, each in ((branch, each) for branch in ("top", "base") for each in DIRECTORIES):
        (directory / branch / each).mkdir(parents=True)
    for each in DIRECTORIES:
        for file in range(FILES):
            (directory / f"base/{each}/file{file}").write_bytes(bytes(2048))
    (directory / "mnt").mkdir()
    time.sleep(AGE)
    specs = [
        BranchSpec(os.fsencode(directory / "top"), Perm.RW),
        BranchSpec(os.fsencode(directory / "base"), Perm.RO),
    ]
    branches = open_branches(specs, False, os.fsencode(directory / "mnt"))
    prepare_writable(branches.branches[0], True)
    sb = Superblock(branches, UnionOptions(parse_create("tdp"), parse_copyup("tdp")), 1000)
    homes.load(sb)
    coherence = MODES[mode](sb, FakeNotifier())
    coherence.start()
    union = UnionFs(sb, Credentials())
    if cached:
        union.keep_files(10 * FILES)
    record = Record.create()
    recall.keep(union, record)
    try:
        yield Kernel(union, coherence, record, shim)
    finally:
        coherence.stop()
        branches.close()


def serve(directory: Path, mode: str, cached: bool, library: str) -> None:
    """In the process that valgrind counts."""
    shim = ctypes.PyDLL(library)
    with served(directory, mode, cached, shim) as kernel:
        plain, view, lower, upper, listed = nodes(kernel, ROOT_ID, [each.encode() for each in DIRECTORIES])
        if not cached:
            read_side(kernel, plain, view, listed)
        change_side(kernel, lower, upper)
        sys.stdout.flush()
        os._exit(0)  # what it holds is of no use to anybody


def figures(profiles: Path) -> Iterator[tuple[str, float, Path]]:
    """kind, instructions a request, profile."""
    for path in sorted(profiles.glob("profile.*"), key=lambda path: int(path.suffix[1:])):
        text = path.read_text()
        title = re.search(r"^desc: Trigger: Client Request: (.+) (\d+)$", text, re.MULTILINE)
        total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
        if title is not None and total is not None and int(title[2]):
            yield title[1], int(total[1]) / int(title[2]), path


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.bench.instructions", description=__doc__.partition(":")[0])
    parser.add_argument("--mode", choices=MODES, default="notify")
    parser.add_argument("--cached", action="store_true", help="io=cached; changes only")
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--scratch", default="/dev/shm", help="a directory on tmpfs")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(Path(options.serve[0]), options.mode, options.cached, options.serve[1])
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        profiles = Path(scratch) if options.keep is None else options.keep
        profiles.mkdir(parents=True, exist_ok=True)
        library = f"{scratch}/shim.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-o", library, "-"], input=SHIM.encode(), check=True)
        (Path(scratch) / "union").mkdir()
        command = [
            "valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={profiles}/profile",
            f"--log-file={scratch}/log", sys.executable, "-m", "tests.bench.instructions", "--mode", options.mode,
            *(("--cached",) if options.cached else ()), "--serve", f"{scratch}/union", library,
        ]  # fmt: skip
        if subprocess.run(command).returncode:
            sys.stderr.write(Path(f"{scratch}/log").read_text())
            return 1
        for kind, instructions, path in figures(profiles):
            print(f"{kind:20}{instructions / 1000:10.1f} k" + ("" if options.keep is None else f"  {path.name}"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
