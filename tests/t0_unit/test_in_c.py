"""What is in C where the hot modules are compiled says the same as the Python beside it."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_IFCHR, S_IFREG
from types import ModuleType
from typing import Any

import pytest
from asyncinotify import Inotify, Mask
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.scenarios import ACL
from tests.helpers.uncompiled import from_source
from udbad import compiled
from udbad.branch import datacalls, fanotify, listing, state, syscalls
from udbad.branch.branches import Branch
from udbad.coherence import echoes, watcher
from udbad.errors import ABSENT
from udbad.inodes import byid, names
from udbad.inodes.handles import HandleTable
from udbad.inodes.inomap import InoMap
from udbad.inodes.journal import DIRECTORY, Journal
from udbad.inodes.node import Dir, Layer, Node
from udbad.inodes.record import Record, pack, unpack
from udbad.inodes.table import InodeTable
from udbad.kernel import device, scheduling, wire
from udbad.kernel.protocol import inval_attributes, inval_data, inval_entry
from udbad.kernel.received import Received
from udbad.types import ROOT_ID, Caller, Perm
from udbad.union.readdir import Run

PYTHON_WIRE, PYTHON_DEVICE, PYTHON_LISTING = from_source(wire), from_source(device), from_source(listing)
PYTHON_STATE, PYTHON_FANOTIFY, PYTHON_NAMES = from_source(state), from_source(fanotify), from_source(names)
PYTHON_BYID, PYTHON_ECHOES = from_source(byid), from_source(echoes)
BRANCH = Branch(0, 0, b"/", Perm.RO, frozenset(), None, -1, -1, 0, "ext4")
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 63) - 1)
LINKS = st.integers(0, (1 << 32) - 8)
"""What `nodes` add to them has room, too."""
TIME_NS = st.integers(-(1 << 31) * 10**9, (1 << 33) * 10**9)
TIMEOUT = st.floats(0, 1e9)


@st.composite
def statuses(draw: st.DrawFn) -> os.stat_result:
    """Any that a file system can give."""
    times = [draw(TIME_NS) for _ in range(3)]
    mode, links, uid, gid = draw(U32), draw(LINKS), draw(U32), draw(U32)
    return os.stat_result(
        (mode, draw(U64), draw(U64), links, uid, gid, draw(U64), *(time // 10**9 for time in times)),
        {
            "st_atime_ns": times[0], "st_mtime_ns": times[1], "st_ctime_ns": times[2],
            "st_blksize": draw(st.sampled_from([512, 4096, 1 << 20])), "st_blocks": draw(U64), "st_rdev": draw(U64),
        },
    )  # fmt: skip


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    number = draw(st.integers(2, (1 << 64) - 1))
    node = Node(number, 0o100000, BRANCH, 1, 2)
    if draw(st.booleans()):
        node = Dir(number, [Layer(BRANCH, 1, 2, 2, -1)])
        node.mtime_offset = draw(st.integers(0, 10**12))
    node.dead = draw(st.booleans())
    node.nlink_extra = draw(st.sampled_from([0, 0, 1, 7, -1, -3]))
    return node


@given(nodes(), statuses(), TIMEOUT, TIMEOUT)
def test_entries(node: Node, status: os.stat_result, entry_timeout: float, attr_timeout: float) -> None:
    made = wire.entry(node, status, entry_timeout, attr_timeout)
    assert made == PYTHON_WIRE.entry(node, status, entry_timeout, attr_timeout)
    assert wire.attributes(node, status, attr_timeout) == PYTHON_WIRE.attributes(node, status, attr_timeout)
    assert wire.negative(entry_timeout) == PYTHON_WIRE.negative(entry_timeout)


@given(st.integers(1, (1 << 64) - 1), st.sampled_from([0o040000, 0o100000, 0o120000]), st.binary(max_size=300), U64)
def test_directory_entries(number: int, kind: int, name: bytes, after: int) -> None:
    assert wire.dirent(number, kind, name, after) == PYTHON_WIRE.dirent(number, kind, name, after)


@given(st.lists(st.tuples(st.binary(max_size=300), U64, st.sampled_from([0, 0o040000]), U64)), st.integers(-1, 4096))
def test_listings(entries: list[tuple[bytes, int, int, int]], room: int) -> None:
    made = wire.dirents(iter(entries), room)
    assert made == PYTHON_WIRE.dirents(iter(entries), room)
    assert len(made) <= max(room, 0)


NUMBERS = st.builds(lambda low, high: low | high << 48, st.integers(0, 40), st.sampled_from([0, 1, 1 << 15]))
"""That follow each other, and that differ in a few high bits."""


@given(st.lists(st.tuples(st.sampled_from(["add", "add", "remove"]), NUMBERS), max_size=200))
def test_nodes_by_their_ids(changes: list[tuple[str, int]]) -> None:
    used, python = byid.ById(), PYTHON_BYID.ById()
    known: dict[int, Node] = {}
    for change, number in changes:
        if change == "add":
            node = known[number] = Node(number, 0o100000, BRANCH, 1, 2)
            used.add(node)
            python.add(node)
        elif number in known:
            with pytest.raises(KeyError):
                used.remove(Node(number, 0o100000, BRANCH, 1, 2))
            used.remove(known[number])
            python.remove(known.pop(number))
        else:
            with pytest.raises(KeyError):
                used.remove(Node(number, 0o100000, BRANCH, 1, 2))
        assert used.get(number) is python.get(number)
        assert (number in used, len(used)) == (number in python, len(python))
    for nodes in (used, used.shrunk()):
        assert sorted(nodes) == sorted(python)
        assert {id(node) for node in nodes.values()} == {id(node) for node in python.values()}
        assert all(nodes[number] is node for number, node in known.items())
        with pytest.raises(KeyError):
            nodes[41]


FEW = [b"a", b"bb", b".c", b".wh.d", b"e" * 255, b"f" * 1024]
MANY = [b"%d" % number for number in range(100)]
HITS = [None, 0, 1, 70, (0,), (0, 2)]


def make_branches(path: Path) -> None:
    """Two directories, and one that is empty, that have names of every kind, some of them in common."""
    for branch, chosen in (("upper", MANY[:40]), ("lower", MANY[20:90]), ("empty", [])):
        (path / branch).mkdir()
        for name in chosen:
            made = path / branch / name.decode()
            if int(name) % 5 == 1:
                made.mkdir()
            elif int(name) % 7 == 0 and branch == "lower":
                made.symlink_to("x")
            else:
                made.touch()
    for mark in (".wh.", ".wh.50", ".wh..wh.aufs", ".wh"):
        (path / "upper" / mark).touch()
    os.mknod(path / "lower" / "device", S_IFCHR, 0)


def changed(one: Any, what: str, rng: random.Random, path: Path) -> object:
    """Do what it says to names; rng: the same for both kinds of them."""
    name = rng.choice(rng.choice([FEW, MANY, MANY]))
    hidden: set[bytes] = {b"50", b"a"} if rng.random() < 0.5 else set()
    stacked: set[bytes] = set()
    if what == "set":
        one[name] = rng.choice(HITS)
    elif what == "discard":
        one.discard(name)
    elif what == "add":
        one.add(name, rng.choice([1, 3]), rng.getrandbits(64), rng.choice([0, 4, 8, 10]), hidden, stacked)
    elif what == "read":
        fd = os.open(path / rng.choice(["upper", "lower", "empty"]), os.O_RDONLY)
        try:
            return one.read(fd, rng.choice([1, 3]), hidden, stacked), stacked
        finally:
            os.close(fd)
    elif what == "fill":
        other = type(one)([name, b"1"])
        other.add(b"2", 4, rng.getrandbits(64), 8, set(), None)
        one.fill(other)
    elif what == "doubt":
        one.doubt()
    elif what == "copy":
        copy = one.copy()
        assert copy.same(one)
        copy[name] = 1
        copy.discard(b"3")
        return all_of(copy), copy.same(one)
    elif what == "take":
        other = type(one)(rng.sample(MANY, 10))
        one.take(other)
        other[name] = 0
    return stacked


def all_of(names: Any) -> list[object]:
    """What every question to it is answered."""
    listed = list(names)
    places = [names.at(place) for place in range(len(names))]
    with pytest.raises(IndexError):
        names.at(len(names))
    asked = [*FEW, *MANY, b"", b"x" * 5000]
    assert unpack(names.packed()) == listed == [place[0] for place in places]
    assert names.hits() == [place[1] for place in places]
    assert [names.get(name, -1) for name in asked] == [(names.find(name) or (-1,))[0] for name in asked]
    return [places, [name in names for name in asked], names.lacking({}), names.lacking({b"1": 0, b"a": 0})]


@pytest.mark.parametrize("seed", range(20))
def test_names_of_a_directory(tmp_path: Path, seed: int) -> None:
    """Whatever is done to them."""
    rng = random.Random(seed)
    make_branches(tmp_path)
    both = names.Names(MANY[:3]), PYTHON_NAMES.Names(MANY[:3])
    for _ in range(100):
        what = rng.choice(["set", "discard", "add", "fill", "copy", *rng.choice([[], ["read", "doubt", "take"]])])
        again = rng.getstate()
        said = changed(both[0], what, rng, tmp_path)
        rng.setstate(again)
        assert changed(both[1], what, rng, tmp_path) == said
        assert all_of(both[0]) == all_of(both[1])
    for one in both:
        for name in (b"", b"x" * 5000):
            with pytest.raises(ValueError, match=r"x|b''"):
                one[name] = 0


TWICE = """
#define _GNU_SOURCE
#include <dirent.h>
#include <stdio.h>
#include <string.h>

/* A directory of %d names, of which one in ten comes once more. */
ssize_t getdents64(int fd, void *buffer, size_t room)
{
	static int calls;
	char *at = buffer;

	for (int i = 0; i < COUNT + COUNT / 10 && !calls; i++) {
		struct dirent64 *entry = (struct dirent64 *)at;
		entry->d_ino = 100 + i, entry->d_type = DT_REG, entry->d_reclen = 32;
		sprintf(entry->d_name, "%%d", i < COUNT ? i : (i - COUNT) * 10);
		at += entry->d_reclen;
	}
	return calls++ ? 0 : at - (char *)buffer;
}
"""


@pytest.mark.skipif(bool(compiled.why_not()), reason=f"{'' if compiled.wanted() else 'ok: '}of what is compiled")
@pytest.mark.parametrize("count", [10, 300])
def test_a_name_that_is_read_twice(tmp_path: Path, count: int) -> None:
    """As a directory may say it that is changed meanwhile: it is one, what was said first counts, and it can go."""
    (tmp_path / "twice.c").write_text(f"#define COUNT {count}\n{TWICE % count}")
    words = ["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "twice.so"), str(tmp_path / "twice.c")]
    subprocess.run(words, check=True, timeout=60)
    script = (
        "from udbad.inodes.names import Names\n"
        "names, stacked = Names(), set()\n"
        "assert names.read(0, 3, set(), stacked) == []\n"
        f"assert list(names) == [b'%d' % number for number in range({count})]\n"
        f"assert [names.at(place)[2] for place in range(len(names))] == [*range(100, 100 + {count})]\n"
        f"assert stacked == {{b'%d' % number for number in range(0, {count} // 10 * 10, 10)}}\n"
        "assert names.packed() == Names(list(names)).packed()\n"
        "names.discard(b'0')\n"
        "assert names.get(b'0', -1) == -1 and b'0' not in list(names)\n"
    )
    before = [os.environ["LD_PRELOAD"]] if "LD_PRELOAD" in os.environ else []  # a sanitizer has to be the first
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join([*before, str(tmp_path / "twice.so")]),
        "PYTHONPATH": str(Path(compiled.__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=environment)


def test_copies_of_names() -> None:
    """What becomes of one is none of the others."""
    first = names.Names(MANY)
    second, third = first.copy(), first.copy()
    first[b"1"] = 5
    second.discard(b"2")
    third.doubt()
    fourth = second.copy()
    fourth.fill(first)
    assert first.get(b"1") == 5
    assert fourth.get(b"1") == 5
    assert list(first) == list(third) == MANY
    assert list(second) == list(fourth) == [name for name in MANY if name != b"2"]
    assert not first.same(second)
    assert first.same(third)
    second.take(first)
    second[b"1"] = 6
    assert (first.get(b"1"), second.get(b"1")) == (5, 6)


@given(st.randoms(use_true_random=False), st.integers(-1, 4096))
def test_names_that_follow_each_other(rng: random.Random, room: int) -> None:
    """Names may have gone and come since, and of some the kernel knows the nodes, or has to be asked."""
    listed = names.Names()
    chosen = [*rng.sample(FEW, rng.randrange(3)), *rng.sample(MANY, rng.randrange(30))]
    for name in chosen:
        listed.add(
            name, rng.choice([0, 2, 2, 3]), rng.choice([0, 1, 5, 6, 90, 1 << 40]), rng.choice([4, 8, 8]), set(), None
        )
    current = rng.choice([listed, listed.copy()])
    for name in rng.sample(chosen, min(rng.randrange(4), len(chosen))):
        current.discard(name)
        if rng.random() < 0.6:
            current[name] = rng.choice(HITS)
    children = {name: Node(7, S_IFREG, BRANCH, 1, 2) for name in chosen if rng.random() < 0.05}
    numbering = {0: (1, 1 << 31, 50, set[int]()), 2: (2, 1000, 100, {5, 90})}
    said = []
    for module in (wire, PYTHON_WIRE):
        inomap = InoMap(2)
        run = Run(listed, current, children, inomap, numbering, 0, 1000)
        answer = module.dirents([(b".", 1, 0o040000, 1), run], room)
        said.append((answer, run.first if len(answer) + 1100 < room else None, len(inomap)))
    assert said[0] == said[1]


@given(st.integers(0, (1 << 9) - 1), st.binary(min_size=84, max_size=84))
def test_what_a_setattr_asks_for(valid: int, rest: bytes) -> None:
    """fuse_setattr_in is 88 bytes."""
    request = bytearray(wire.BODY) + wire.WORD.pack(valid) + rest
    asked = wire.setattr_in(request)
    assert asked == PYTHON_WIRE.setattr_in(request)
    mode, *_, fh = asked
    assert (mode is None, fh is None) == (not valid & wire.SET_MODE, not valid & wire.SET_FH)


@pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo", "device", "old"])
def test_a_status(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "name"
    match kind:
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to("nowhere")
        case "fifo":
            os.mkfifo(path)
        case "device":
            os.mknod(path, 0o020644, os.makedev(300, 70000))
        case _:
            path.write_bytes(b"content")
    if kind == "old":
        os.utime(path, ns=(-1, -(10**9) - 1))
    expected = os.lstat(path)
    directory = os.open(tmp_path, os.O_PATH)
    file = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        for found in (syscalls.stat_at(directory, b"name"), syscalls.fstat(file)):
            names = [name for name in dir(found) if name.startswith("st_")]
            assert {"st_mode", "st_ino", "st_dev", "st_nlink", "st_mtime_ns", "st_rdev", "st_blksize"} <= set(names)
            assert {name: getattr(found, name) for name in names} == {name: getattr(expected, name) for name in names}
            assert [found[index] for index in (7, 8, 9)] == [expected[index] for index in (7, 8, 9)]
            node = Node(5, found.st_mode & 0o170000, BRANCH, found.st_dev, found.st_ino)
            assert wire.entry(node, found, 1.5, 0.0) == PYTHON_WIRE.entry(node, expected, 1.5, 0.0)
    finally:
        os.close(file)
        os.close(directory)


@pytest.mark.parametrize(
    ("name", "number"), [(b"nothing", errno.ENOENT), (b"file/below", errno.ENOTDIR), (b"n" * 300, errno.ENAMETOOLONG)]
)
def test_errors(tmp_path: Path, name: bytes, number: int) -> None:
    (tmp_path / "file").touch()
    directory = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            syscalls.stat_at(directory, name)
        for calls in (syscalls, PYTHON_SYSCALLS):
            if number in ABSENT:
                assert (calls.find_at(directory, name), calls.mode_at(directory, name)) == (None, 0)
                continue
            for call in (calls.find_at, calls.mode_at):
                with pytest.raises(OSError, match=os.strerror(number)):
                    call(directory, name)
        assert caught.value.errno == number
        assert type(caught.value) is type(OSError(number, ""))
        with pytest.raises(ValueError, match="null"):
            syscalls.stat_at(directory, b"file\0x")
    finally:
        os.close(directory)
    with pytest.raises(OSError, match="Bad file descriptor"):
        syscalls.fstat(directory)


PYTHON_SYSCALLS = from_source(syscalls)


@pytest.mark.parametrize("calls", [syscalls, PYTHON_SYSCALLS], ids=["used", "python"])
def test_changes(tmp_path: Path, calls: ModuleType) -> None:
    """Files, names, owners, modes and times, and what those calls refuse."""
    directory = os.open(tmp_path, os.O_PATH)
    try:
        os.close(calls.create_file_at(directory, b"made", os.O_WRONLY, 0o640))
        with pytest.raises(FileExistsError):
            calls.create_file_at(directory, b"made", os.O_WRONLY, 0o640)
        calls.rename_at(directory, b"made", directory, b"moved")
        (tmp_path / "other").touch()
        with pytest.raises(FileExistsError):
            calls.rename_at(directory, b"moved", directory, b"other", calls.RENAME_NOREPLACE)
        os.symlink("nowhere", tmp_path / "link")
        os.close(calls.open_at(directory, b"moved", os.O_RDONLY | os.O_CLOEXEC))
        fd, status = calls.open_regular(directory, b"moved", os.O_RDWR)
        assert (os.get_inheritable(fd), os.pread(fd, 1, 0), status.st_ino) == (False, b"", os.fstat(fd).st_ino)
        os.close(fd)
        os.mkfifo(tmp_path / "fifo")
        opened = os.listdir("/proc/self/fd")
        for name in (b"link", b"fifo", b"gone", b"/"):
            assert calls.open_regular(directory, name, os.O_RDONLY) is None
        assert len(os.listdir("/proc/self/fd")) == len(opened)
        for name, mode in ((b"moved", 0o4711), (b"link", None)):
            fd = calls.pin_at(directory, name)
            try:
                calls.link_fd(fd, directory, name + b" again")
                with pytest.raises(FileExistsError):
                    calls.link_fd(fd, directory, name + b" again")
                calls.unlink_at(directory, name + b" again")
                before = os.fstat(fd)
                calls.chown_fd(fd, -1, -1)
                assert os.fstat(fd)[:6] == before[:6]
                if os.getuid() == 0:
                    calls.chown_fd(fd, 12, -1)
                    calls.chown_fd(fd, -1, 4_000_000_000)
                    assert os.fstat(fd)[4:6] == (12, 4_000_000_000)
                if mode is None:
                    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
                        calls.chmod_fd(fd, 0o600)
                else:
                    calls.chmod_fd(fd, mode)
                    assert os.fstat(fd).st_mode & 0o7777 == mode
            finally:
                os.close(fd)
        calls.utime_at(directory, b"link", -1_500_000_000, 7_000_000_001)
        found = os.lstat(tmp_path / "link")
        assert (found.st_atime_ns, found.st_mtime_ns) == (-1_500_000_000, 7_000_000_001)
        calls.unlink_at(directory, b"moved")
        with pytest.raises(FileNotFoundError):
            calls.unlink_at(directory, b"moved")
        with pytest.raises(ValueError, match="null"):
            calls.open_at(directory, b"a\0b", os.O_RDONLY)
    finally:
        os.close(directory)


@pytest.mark.parametrize("calls", [datacalls, from_source(datacalls)], ids=["used", "python"])
def test_content_that_is_written_out(tmp_path: Path, calls: ModuleType) -> None:
    with open(tmp_path / "file", "wb", buffering=0) as file:
        file.write(b"data")
        calls.start_writing(file.fileno(), 0, 0)
        calls.start_writing(-1, 0, 0)  # told to who waits
        calls.write_out(file.fileno())
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        calls.write_out(-1)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("calls", [datacalls, from_source(datacalls)], ids=["used", "python"])
def test_content_that_is_copied_in_turns(tmp_path: Path, calls: ModuleType, short: bool) -> None:
    content = os.urandom(3_000_007)  # several portions, and not whole pages
    (tmp_path / "source").write_bytes(content)

    def check() -> None:
        if short:
            scheduling.take_turns(scheduling.SHORTEST)
        with (tmp_path / "source").open("rb") as source, (tmp_path / "copy").open("wb") as copy:
            files = source.fileno(), copy.fileno()
            assert calls.copy_in_turns(*files, 2_000_000, 5, 1) == 2_000_000
            assert calls.copy_in_turns(*files, 8 << 20, 2_000_005, 2_000_001) == 1_000_002, "to the end of the source"
            assert calls.copy_in_turns(*files, 1, len(content), 0) == 0
            with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
                calls.copy_in_turns(source.fileno(), source.fileno(), 1, 0, 5)
        assert (tmp_path / "copy").read_bytes() == b"\0" + content[5:]

    with ThreadPoolExecutor(1) as pool:  # this thread keeps its turns
        pool.submit(check).result(60)


@pytest.mark.parametrize("calls", [syscalls, PYTHON_SYSCALLS], ids=["used", "python"])
def test_files_that_are_copied(tmp_path: Path, calls: ModuleType) -> None:
    """What a copy-up asks of its two files."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    pinned = os.open(tmp_path / "file", os.O_PATH)
    try:
        os.write(fd, b"data")
        acls = ("system.posix_acl_access",)
        assert calls.is_bare(fd, acls)
        assert calls.is_bare(fd, ())
        assert not calls.is_bare(pinned, acls), "it cannot be asked"
        path = syscalls.proc_path(pinned)
        assert calls.getxattr(fd, b"user.a") is calls.getxattr(path, b"user.a") is None
        assert calls.lists_nothing(fd) is calls.lists_nothing(path) is True
        for value in (b"", b"a\0b", bytes(256), bytes(257), bytes(1000)):
            os.setxattr(fd, "user.a", value)
            assert calls.getxattr(fd, b"user.a") == calls.getxattr(path, b"user.a") == value
        assert calls.lists_nothing(fd) is calls.lists_nothing(path) is False
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            calls.getxattr(pinned, b"user.a")
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            calls.lists_nothing(pinned)
        with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
            calls.getxattr(fd, b"nothing")
        assert not calls.is_bare(fd, acls)
        os.removexattr(fd, "user.a")
        os.setxattr(fd, "system.posix_acl_access", ACL)
        assert not calls.is_bare(fd, acls)
    finally:
        os.close(fd)
        os.close(pinned)


@pytest.mark.parametrize("calls", [syscalls, PYTHON_SYSCALLS], ids=["used", "python"])
def test_small_files_that_are_copied(tmp_path: Path, calls: ModuleType) -> None:
    acl = "system.posix_acl_access"
    ids = (os.getuid(), os.getgid())

    def copy(content: bytes, size: int, flags: int = 0) -> int:
        (tmp_path / "copy").unlink(missing_ok=True)
        source.seek(0)
        source.truncate()
        source.write(content)
        source.flush()
        fd = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT | flags, 0o600)
        try:
            how: int = calls.copy_small(source.fileno(), fd, size, acl, *ids, 0o4751, -1_500_000_000, 7_000_000_001)
        finally:
            os.close(fd)
        return how

    with (tmp_path / "file").open("wb+") as source:
        for size in (0, 1, 4096):
            content = os.urandom(size)
            for flags, how in ((0, 1), (os.O_APPEND, 2 if size else 1)):  # copy_file_range(2) refuses to append
                assert copy(content, size, flags) == how
                st = (tmp_path / "copy").stat()
                assert (tmp_path / "copy").read_bytes() == content
                assert (st.st_mode & 0o7777, st.st_uid, st.st_gid) == (0o4751, *ids)
                assert (st.st_atime_ns, st.st_mtime_ns) == (-1_500_000_000, 7_000_000_001)
        assert copy(bytes(4097), 4097) == 0, "it is not small"
        assert copy(b"data", 5) == 0, "it is shorter"
        assert calls.copy_small(source.fileno(), -1, 0, acl, *ids, 0o600, 0, 0) == 0
        os.setxattr(source.fileno(), "user.a", b"")
        assert copy(b"data", 4) == 0
        os.removexattr(source.fileno(), "user.a")
        os.setxattr(source.fileno(), acl, ACL)
        assert copy(b"data", 4) == 0
        assert calls.copy_small(source.fileno(), -1, 4, None, *ids, 0o600, 0, 0) == 0, "it is listed"
        os.removexattr(source.fileno(), acl)
        assert copy(b"data", 4) == 1


def test_attributes_that_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does not list ACLs."""
    path = tmp_path / "file"
    path.touch()
    os.setxattr(path, "system.posix_acl_access", ACL)
    monkeypatch.setattr(os, "listxattr", lambda *_: [])
    with path.open() as file:
        for calls in (syscalls, PYTHON_SYSCALLS):
            assert not calls.is_bare(file.fileno(), ("system.posix_acl_access",))
            assert not calls.copy_small(file.fileno(), file.fileno(), 0, "system.posix_acl_access", 0, 0, 0o600, 0, 0)


@pytest.mark.parametrize("module", [listing, PYTHON_LISTING], ids=["used", "python"])
def test_a_listing(tmp_path: Path, module: ModuleType) -> None:
    """More than one call of getdents64(2) brings, and of every type."""
    for number in range(3000):
        (tmp_path / f"{number:040}").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / ".hidden").symlink_to("nowhere")
    (tmp_path / "..two").mkdir()
    os.mkfifo(tmp_path / "fifo")
    os.mknod(os.fsencode(tmp_path) + b"/\xff", 0o020644, os.makedev(1, 3))
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        names, numbers, types = module.read(fd)
        assert module.type_of(fd, b"fifo") == 0o010000
        assert module.type_of(fd, b"gone") == 0
    finally:
        os.close(fd)
    with os.scandir(os.fsencode(tmp_path)) as entries:
        expected = {entry.name: (entry.inode(), entry.stat(follow_symlinks=False).st_mode >> 12) for entry in entries}
    assert len(names) == len(expected)
    assert dict(zip(names, zip(numbers, types, strict=True), strict=True)) == expected
    with pytest.raises(OSError, match="Bad file descriptor"):
        module.read(fd)


@given(statuses(), st.sampled_from([-(10**13), -(10**10), 10**10, 10**13, None]), st.booleans())
def test_stamps(status: os.stat_result, since: int | None, whole: bool) -> None:
    """Of any status, and of one whose ctime is so many nanoseconds from now."""
    if since is not None:
        changed = time.time_ns() + since
        changed = changed // 10**9 * 10**9 if whole else changed | 1
        times = {"st_atime_ns": 5, "st_mtime_ns": 5, "st_ctime_ns": changed}
        rest = {"st_blksize": 512, "st_blocks": 0, "st_rdev": 0}
        status = os.stat_result((*status[:9], changed // 10**9), times | rest)
    stamp, by_python = state.stamp(status), PYTHON_STATE.stamp(status)
    assert bytes(stamp) == by_python
    assert state.has_one_name(stamp) == PYTHON_STATE.has_one_name(by_python) == (status.st_nlink <= 1)
    for fs_type in ("ext4", "nfs"):
        for perm in (Perm.RO, Perm.RR):
            branch = Branch(0, 0, b"/", perm, frozenset(), None, -1, -1, 0, fs_type)
            made = state.lasting_stamp(branch, status)
            assert (made is None) == (PYTHON_STATE.lasting_stamp(branch, status) is None)
            assert made in (None, stamp)


@given(statuses(), statuses(), st.sets(st.sampled_from([3, 6, 8, 9])))
def test_stamps_of_two_states(one: os.stat_result, two: os.stat_result, alike: set[int]) -> None:
    """alike: links, size, mtime and ctime, as fields of a status that both have in common."""
    times = {
        name: getattr(one if at in alike else two, name)
        for at, name in ((7, "st_atime_ns"), (8, "st_mtime_ns"), (9, "st_ctime_ns"))
    }
    rest = {name: getattr(two, name) for name in ("st_blksize", "st_blocks", "st_rdev")}
    other = os.stat_result([one[at] if at in alike else two[at] for at in range(10)], times | rest)
    stamps = [state.stamp(status) for status in (one, other)]
    by_python = [bytes(stamp) for stamp in stamps]
    assert (stamps[0] == stamps[1]) == (by_python[0] == by_python[1])
    assert state.same_content(*stamps) == PYTHON_STATE.same_content(*by_python)
    assert stamps[0] not in (b"", None)


def test_a_stamp_of_a_file(tmp_path: Path) -> None:
    for changed in (-1, 10**9, 1 << 34):
        os.utime(tmp_path, (1, changed))
        status = syscalls.stat_at(-1, os.fsencode(tmp_path))
        assert bytes(state.stamp(status)) == PYTHON_STATE.stamp(os.stat(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="fanotify of a file system is root's")
@pytest.mark.parametrize("module", [fanotify, PYTHON_FANOTIFY], ids=["used", "python"])
def test_events_of_a_file_system(tmp_path: Path, module: ModuleType) -> None:
    for directory in ("known", "foreign"):
        (tmp_path / directory).mkdir()
    group = fanotify.open_group()
    known, file = os.open(tmp_path / "known", os.O_PATH), -1
    try:
        fanotify.mark(group, known)
        fsid = fanotify.file_system_id(known)
        handle = fanotify.handle_of(known, fsid)
        names = [b"a", b"n" * 15, b"n" * 16, b"n" * 255]
        for name in names:
            for directory in ("known", "foreign"):
                os.close(os.open(os.fsencode(tmp_path / directory) + b"/" + name, os.O_CREAT))
        data = os.read(group, 1 << 16)
        count, found = module.events(data, {handle: None})
        assert count >= 2 * len(names)
        assert [(key, name, pid) for key, _, name, pid in found] == [(handle, name, os.getpid()) for name in names]
        assert all(mask & fanotify.CREATE for _, mask, _, _ in found)
        # A file that is known itself: by its own handle, whatever directory it is in.
        file = os.open(tmp_path / "foreign" / "a", os.O_PATH)
        of_file = fanotify.handle_of(file, fsid)
        (tmp_path / "foreign" / "a").chmod(0o600)
        (tmp_path / "known").chmod(0o700)
        _, found = module.events(os.read(group, 1 << 16), {handle: None, of_file: None})
        attributes = [(key, name) for key, mask, name, _ in found if mask & fanotify.ATTRIB]
        assert attributes == [(of_file, b""), (handle, b"")]
        assert module.events(b"", {}) == (0, [])
        overflow = struct.pack("=IBBHQii", 24, 3, 0, 24, fanotify.Q_OVERFLOW, -1, 0)
        assert module.events(overflow, {}) == (1, [(b"", fanotify.Q_OVERFLOW, b"", 0)])
    finally:
        for fd in (group, known, *([file] if file >= 0 else ())):
            os.close(fd)


@pytest.mark.parametrize("module", [listing, PYTHON_LISTING], ids=["used", "python"])
def test_events(tmp_path: Path, module: ModuleType) -> None:
    inotify = Inotify()
    directory = os.open(tmp_path, os.O_PATH)
    try:
        number = listing.watch(inotify.fd, directory, int(Mask.CREATE | Mask.DELETE | Mask.DELETE_SELF))
        names = [b"a", b"n" * 15, b"n" * 16, b"n" * 255]
        for name in names:
            os.close(os.open(os.fsencode(tmp_path) + b"/" + name, os.O_CREAT))
        made = [(number, int(Mask.CREATE), name) for name in names]
        assert module.events(os.read(inotify.fd, 4096)) == made
        for name in names:
            (tmp_path / os.fsdecode(name)).unlink()
        tmp_path.rmdir()
    finally:
        os.close(directory)
    gone = [(number, int(Mask.DELETE), name) for name in names]
    assert module.events(os.read(inotify.fd, 4096))[: len(names)] == gone
    inotify.close()
    assert module.events(b"") == []


EVENTS = st.tuples(
    st.integers(1, 2), st.sampled_from([0x100, 0x200, 0x40000100]), st.sampled_from([b"", b"a", b"b" * 16])
)
"""Few enough to come again."""


@given(st.lists(st.one_of(st.none(), EVENTS, st.lists(EVENTS, max_size=8)), max_size=40))
def test_events_that_were_expected(steps: list[tuple[int, int, bytes] | list[tuple[int, int, bytes]] | None]) -> None:
    """Sent (one), read (several), or believed no more."""
    used, python = echoes.Expected(), PYTHON_ECHOES.Expected()
    waiting: list[tuple[int, int, bytes]] = []
    for step in steps:
        if step is None:
            used.clear()
            python.clear()
            waiting.clear()
        elif isinstance(step, tuple):
            used.add(*step)
            python.add(*step)
            waiting.append(step)
        else:
            data = b""
            others = []
            for watch, mask, name in step:
                padded = name + bytes(16 - len(name) % 16) if name else b""
                data += listing.EVENT.pack(watch, mask, 0, len(padded)) + padded
                if (watch, mask, name) in waiting:
                    waiting.remove((watch, mask, name))
                else:
                    others.append((watch, mask, name))
            sifted = used.sift(data)
            assert sifted == python.sift(data)
            assert sifted[:2] == (len(step), others)
            assert sum(sifted[2].values()) == len(step) - len(others)
        assert len(used) == len(python) == len(waiting)


def test_many_events_that_were_expected() -> None:
    """And some that nobody sent between them; what fanotify tells is expected by nobody."""
    used = echoes.Expected()
    used.add(b"a handle", 0x100, b"name")
    assert len(used) == 0
    for number in range(1000):
        used.add(1, 0x100, b"%d" % number)
        if number % 3 == 2:
            data = b"".join(
                listing.EVENT.pack(1, mask, 0, 16) + (b"%d" % (number // 3)).ljust(16, b"\0") for mask in (0x200, 0x100)
            )
            assert used.sift(data) == (2, [(1, 0x200, b"%d" % (number // 3))], {1: 1})
    assert len(used) == 1000 - 333


@pytest.mark.parametrize("module", [listing, PYTHON_LISTING], ids=["used", "python"])
def test_a_watch(tmp_path: Path, module: ModuleType) -> None:
    inotify = module.inotify()
    directory = os.open(tmp_path, os.O_PATH)
    try:
        assert not os.get_blocking(inotify)
        assert not os.get_inheritable(inotify)
        number = module.watch(inotify, directory, int(Mask.CREATE))
        (tmp_path / "made").touch()
        assert struct.unpack_from("iI", os.read(inotify, 4096)) == (number, Mask.CREATE)
        module.unwatch(inotify, number)
        with pytest.raises(OSError, match="Invalid argument"):
            module.unwatch(inotify, number)
        with pytest.raises(OSError, match="Invalid argument"):
            module.watch(inotify, directory, 0)
    finally:
        os.close(directory)
        os.close(inotify)


def test_the_numbers_of_inotify() -> None:
    """As asyncinotify has them, which is not imported for a mount."""
    names = Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO
    content = Mask.MODIFY | Mask.CLOSE_WRITE
    itself = Mask.ATTRIB | Mask.DELETE_SELF | Mask.MOVE_SELF
    assert int(names | content | itself | Mask.ONLYDIR | Mask.EXCL_UNLINK) == watcher._DIRECTORY
    assert int(names | Mask.ONLYDIR) == watcher._DIRECTORY_NAMES
    assert int(content | Mask.ATTRIB) == watcher._FILE
    assert int(Mask.IGNORED | Mask.UNMOUNT) == watcher._GONE
    assert int(Mask.Q_OVERFLOW) == watcher._OVERFLOW


@pytest.mark.parametrize("module", [device, PYTHON_DEVICE], ids=["used", "python"])
def test_a_device(module: ModuleType) -> None:
    """A socket pair stands for it."""
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = Received(4096)
    with kernel, ours:
        kernel.setblocking(False)
        ours.setblocking(False)
        fd = ours.fileno()
        assert not module.receive(fd, request, 0.0)
        assert not module.receive(fd, request, 0.0001)
        assert module.wait(fd, -1, -1, 0.0) == 0
        assert module.wait(-1, -1, -1, 0.0001) == 0
        numbers = 51, 1, (1 << 64) - 1, 1 << 63, (1 << 32) - 1, 0, 1 << 31
        kernel.send(struct.pack("<IIQQIIII", *numbers, 0) + b"name\0other\0")
        assert module.wait(-1, fd, -1, device.FOREVER) == device.WOKEN
        assert module.wait(fd, -1, -1, 1.0) == device.REQUESTS
        assert module.receive(fd, request, 0.0)
        assert request.size == 51
        assert numbers == (
            request.length, request.opcode, request.unique, request.node, request.uid, request.gid, request.pid
        )  # fmt: skip
        assert module.name_at(request, 45) == b"other"
        assert module.name_at(request, 50) == b""
        assert [module.name_at(request, start) for start in (40, 51, 52, 5000)] == [None] * 4
        assert module.names_at(request, 40) == (b"name", b"other")
        assert [module.names_at(request, start) for start in (45, 50, 51, 5000)] == [None] * 4
        assert module.word_at(request, 0) == request.length
        caller = module.caller_of(request, 0o22)
        assert type(caller) is Caller
        assert caller == (request.uid, request.gid, request.pid, 0o22)
        for body in (b"", b"answer", bytearray(b"answer"), bytes(1 << 17)):
            module.answer(fd, (1 << 64) - 1, 0, body)
            assert kernel.recv(1 << 18) == struct.pack("<IiQ", 16 + len(body), 0, (1 << 64) - 1) + body
        messages = [inval_data(1), inval_entry(2, b"name"), inval_attributes(3)]
        assert module.tell(fd, b"".join(messages)) == (0, 0)
        assert [kernel.recv(1 << 18) for _ in messages] == messages
        assert module.tell(-1, b"".join(messages)) == (0, errno.EBADF)
        assert module.tell(fd, b"") == (0, 0)
        module.answer(fd, 7, errno.ENOENT, b"")
        assert kernel.recv(1 << 18) == struct.pack("<IiQ", 16, -errno.ENOENT, 7)
    with pytest.raises(OSError, match="Bad file descriptor"):
        module.answer(fd, 7, 0, b"")
    with pytest.raises(OSError, match="Bad file descriptor"):
        module.receive(fd, request, 0.0)


# -- a record that is damaged -----------------------------------------------------------------------------------


@pytest.mark.skipif(bool(compiled.why_not()), reason=f"{'' if compiled.wanted() else 'ok: '}of what is compiled")
def test_a_damaged_log_is_refused_or_read() -> None:
    """Whatever is in it: no memory is read that is not of the log."""
    from udbad.inodes import cunread

    record = Record.create()
    top = Dir(ROOT_ID, [Layer(BRANCH, 1, 1, 2, -1)])
    table = InodeTable(top, 10)
    Journal(record, table, HandleTable(), InoMap(), list)
    for number in range(2, 22):
        above = table.nodes[number // 2]
        assert type(above) is Dir
        node = Node(number, S_IFREG, BRANCH, 1, number)
        if number <= 11:
            node = Dir(number, [Layer(BRANCH, 1, number, 2, -1)])
        table.add(node)
        node.nlookup = 1
        table.attach(node, above, b"n%d" % number)
    record.rewrite()
    log = record.scan(lambda memory, size: bytes(memory[:size]))
    record.close()

    def read(log: bytes) -> byid.ById:
        again = InodeTable(Dir(ROOT_ID, [Layer(BRANCH, 1, 1, 2, -1)]), 10)

        def other(payload: bytes, count: int) -> Node:
            if payload[0] == DIRECTORY and payload[6:].startswith(pack(ROOT_ID)):
                return again.root
            raise ValueError("not for here")

        unread = cunread.Unread(log, len(log), again, {BRANCH.id: BRANCH}, other, lambda fd, identity: -1)
        unread.scan(lambda payload, count: None)
        for number in (21, 5, 1, 999):
            unread.find(number)
        assert not unread.some(1000)
        return again.nodes

    assert {number: node.names() for number, node in read(log).items()}.keys() == set(table.nodes)
    rng = random.Random(1)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(log)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(log))] = rng.choice((0, 1, 0x28, 0x5B, 0x69, 0x6C, 0x73, 0x7F, 0xFF))
        try:
            read(bytes(damaged[: rng.choice((len(log), rng.randrange(len(log))))]))
        except (ValueError, OverflowError, EOFError, TypeError, MemoryError, KeyError, OSError):
            refused += 1
    assert 100 < refused < 2000
