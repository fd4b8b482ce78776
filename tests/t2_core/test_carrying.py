"""sync and mvdown without a kernel: at every step, after a crash at every system call, and amid other operations."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import carry_tree
from tests.helpers.carry_tree import LAYERS, listing
from tests.helpers.merge import MAX_NAME, OVERLAY, diff, merge, temporary_names
from tests.helpers.merge import Tree as Snapshot
from tests.helpers.profile import scaled
from tests.t2_core.core import Core, core
from tests.t2_core.killed import swept
from udbad.branch import datacalls, syscalls
from udbad.errors import ExitCode, UserError
from udbad.inodes.node import Dir
from udbad.tools import carry, mvdown, syncdown
from udbad.tools.carry import Halt
from udbad.union.fs import SetAttr

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="ok: branches need root")
pytestmark = [needs_root, pytest.mark.usefixtures("_no_waiting")]

CRASHED = 77
CHANGING = ("create_file_at", "mkdir_at", "mknod_at", "symlink_at", "link_at", "unlink_at", "rmdir_at", "rename_at")


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here changes twice within a tick, and no power fails: nobody has to wait for clocks and disks."""
    monkeypatch.setattr(datacalls, "sync_fs", lambda dirfd: None)
    monkeypatch.setattr(carry, "is_racy", lambda branch, st: False)
    monkeypatch.setattr(logging.getLogger("udbad.union.view"), "disabled", True)  # it warns of the pairs


def build(top: Path, whiteouts: str = "aufs") -> None:
    carry_tree.build(*(top / name for name in LAYERS))
    if whiteouts == "overlay":
        for name in LAYERS:
            carry_tree.as_overlay(top / name)


def merged(top: Path, layers: Sequence[str] = (*LAYERS,)) -> Snapshot:
    return merge([(top / name, OVERLAY) for name in layers])


notations = pytest.mark.parametrize("whiteouts", ["aufs", "overlay"])


def run(steps: Generator[carry.Work | None, None, Any], between: Callable[[int], None] | None = None) -> Any:
    """What the mount process does, in this thread; between: called before and after each work, counting up."""
    error: OSError | None = None
    number = 0
    while True:
        try:
            work = next(steps) if error is None else steps.throw(error)
        except StopIteration as end:
            return end.value
        error = None
        if between is not None:
            between(number)
        try:
            if work is not None:
                work()
        except OSError as raised:
            error = raised
        if between is not None:
            between(number + 1)
        number += 2


def sync(union: Core, move: bool, between: Callable[[int], None] | None = None) -> syncdown.Sync:
    src, dst = syncdown.check(union.sb, os.fsencode(union["src"]), os.fsencode(union["dst"]), move)
    job = syncdown.Sync(union.sb, src, dst, move, Halt())
    run(job.steps(), between)
    return job


Shown = dict[bytes, tuple[int, int, int, str | None, int]]


def seen(union: Core) -> Shown:
    """What the union itself says, asked name by name: path -> type, mode, owner, content, inode number."""
    found: Shown = {}
    todo = [""]
    while todo:
        directory = todo.pop()
        for name in union.names(directory):
            path = f"{directory}/{name}" if directory else name
            node = union.find(path)
            st = union.sb.stat(node)
            content = None
            if stat.S_ISREG(st.st_mode):
                content = union.content(path).hex()
            elif stat.S_ISDIR(st.st_mode):
                todo.append(path)
            found[os.fsencode(path)] = (stat.S_IFMT(st.st_mode), st.st_mode, st.st_uid, content, node.id)
    return found


@notations
@pytest.mark.parametrize("udba", ["none", "reval"])
@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_the_union_is_the_same_at_every_step(
    tmp_path: Path, udba: str, move: bool, known: bool, whiteouts: str
) -> None:
    """known: whether the daemon has all names in its tables when it begins."""
    build(tmp_path, whiteouts)
    before = merged(tmp_path)
    with core(tmp_path, LAYERS, udba, whiteouts=whiteouts) as union:
        at_first = seen(union) if known else None
        job = sync(union, move, lambda number: _same(before, merged(tmp_path), f"at step {number}"))
        assert not job.progress.left
        _same(before, merged(tmp_path), "at the end")
        if at_first is not None:
            assert seen(union) == at_first
        else:
            assert {path: entry[0] for path, entry in seen(union).items()} == {p: e.type for p, e in before.items()}
        union.forget_all()
    assert not [name for branch in ("src", "dst") for name in listing(tmp_path / branch) if ".wh..wh.." in name
                and not name.endswith(".opq")]  # fmt: skip
    if move:
        assert listing(tmp_path / "src") == []
    # Without the upper branch the others show the same.
    _same(before, merged(tmp_path, ("dst", "low")), "without the upper branch")
    assert (tmp_path / "dst" / "mixed" / "one").stat().st_nlink == 3
    assert (tmp_path / "dst" / "mixed" / "sparse").stat().st_blocks < 100
    whited = ["both/deep/gone", "both/gone", "gone", "gone_dir"]
    assert whiteouts_of(tmp_path / "dst") == {"aufs": [], "overlay": []} | {whiteouts: whited}


def whiteouts_of(branch: Path) -> dict[str, list[str]]:
    """The names that a branch hides, by the notation that it does so in."""
    found: dict[str, list[str]] = {"aufs": [], "overlay": []}
    for name in listing(branch):
        path = branch / name
        if path.name.startswith(".wh.") and not path.name.endswith(".opq"):
            found["aufs"].append(str(Path(name).with_name(path.name.removeprefix(".wh."))))
        elif path.is_char_device():
            found["overlay"].append(name)
    return {key: sorted(names) for key, names in found.items()}


def _same(before: Snapshot, after: Snapshot, when: str) -> None:
    found = diff(before, after)
    assert not found, (when, found)


@notations
def test_a_copy_leaves_the_upper_branch_as_it_was(tmp_path: Path, whiteouts: str) -> None:
    build(tmp_path, whiteouts)
    with core(tmp_path, LAYERS, whiteouts=whiteouts) as union:
        before = listing(tmp_path / "src"), merged(tmp_path, ["src"])
        sync(union, move=False)
        assert (listing(tmp_path / "src"), merged(tmp_path, ["src"])) == before
        # Again: everything is there already, but the opaque directories are made anew.
        twice = sync(union, move=False)
        assert twice.progress.synced == len([name for name in before[0] if not name.endswith((".opq", "nothing"))]) - 1
    _same(merged(tmp_path), merged(tmp_path, ("dst", "low")), "without the upper branch")


# -- crashes --------------------------------------------------------------------------------------------


class Crash:
    """Ends the process at the `at`th change of a branch, before it is made."""

    def __init__(self, at: int) -> None:
        self.left = at

    def install(self) -> None:
        for name in CHANGING:
            setattr(syscalls, name, self._wrapped(getattr(syscalls, name)))

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                os._exit(CRASHED)
            return call(*arguments)

        return wrapped


def crash(top: Path, at: int, work: Callable[[Core], object], whiteouts: str = "aufs") -> bool:
    """Whether a process that does `work` was ended by the crash; it must do it well otherwise."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with core(top, LAYERS, whiteouts=whiteouts) as union:
                Crash(at).install()
                work(union)
                code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, CRASHED), code
    return code == CRASHED


@pytest.mark.usefixtures("in_memory")
@notations
@pytest.mark.parametrize("move", [False, True])
def test_a_crash_at_any_change_leaves_the_same_union_and_the_next_run_finishes(
    tmp_path: Path, move: bool, whiteouts: str
) -> None:
    build(tmp_path / "model", whiteouts)
    before = merged(tmp_path / "model")
    at = crashes = 0
    while True:
        top = tmp_path / "now"
        shutil.copytree(tmp_path / "model", top, symlinks=True, copy_function=_copy_special)
        _link_again(top)
        if not crash(top, at, lambda union: sync(union, move), whiteouts):
            break
        crashes += 1
        _same(_unlinked(before), _unlinked(merged(top)), f"after a crash at change {at}")
        for branch in ("src", "dst"):
            swept(top / branch, whiteouts == "overlay")
        with core(top, LAYERS, whiteouts=whiteouts) as union:
            job = sync(union, move)
            assert not job.progress.left, (at, job.progress.left)
        _same(_unlinked(before), _unlinked(merged(top)), f"finished after a crash at change {at}")
        if move:
            assert listing(top / "src") == [], at
        shutil.rmtree(top)
        often = move and whiteouts == "aufs"
        at += scaled(2, 1, 6) if often else scaled(6, 3, 12)
    assert crashes > scaled(10, 10, 4)


def _copy_special(source: str, target: str) -> None:
    info = os.lstat(source)
    if stat.S_ISFIFO(info.st_mode) or stat.S_ISCHR(info.st_mode):
        os.mknod(target, info.st_mode, info.st_rdev)
        shutil.copystat(source, target)
    else:
        shutil.copy2(source, target)
    st = os.lstat(source)
    os.chown(target, st.st_uid, st.st_gid)
    os.chmod(target, stat.S_IMODE(st.st_mode))


def _link_again(top: Path) -> None:
    """copytree knows no hard links."""
    for name in ("both/two", "new/three"):
        (top / "src" / name).unlink()
        os.link(top / "src" / "mixed" / "one", top / "src" / name)


def _unlinked(sb: Snapshot) -> Snapshot:
    """Without link counts: a crash may fall between two names of one file."""
    from dataclasses import replace

    return {path: replace(entry, nlink=None) for path, entry in sb.items()}


# -- other operations meanwhile -----------------------------------------------------------------------------


def _overwrite(path: str) -> Callable[[Core], None]:
    def act(union: Core) -> None:
        handle = union.open(path, os.O_RDWR)
        union.write(handle, b"WRITTEN MEANWHILE")
        union.fs.release(handle.fh)

    return act


def _create(path: str) -> Callable[[Core], None]:
    def act(union: Core) -> None:
        union.fs.release(union.create(path, b"made meanwhile").fh)

    return act


def _replace_directory(path: str) -> Callable[[Core], None]:
    def act(union: Core) -> None:
        for name in union.names(path):
            union.unlink(f"{path}/{name}")
        union.rmdir(path)
        union.mkdir(path)

    return act


OPERATIONS: dict[str, Callable[[Core], object]] = {
    "write": _overwrite("both/src"),
    "write below": _overwrite("both/dst"),
    "write in an opaque directory": _overwrite("opaque/sub/mine"),
    "write to a linked file": _overwrite("both/two"),
    "chmod": lambda union: union.run(
        lambda: union.fs.setattr(union.find("both/src").id, SetAttr(mode=0o600), None, union.caller)
    ),
    "chmod of a directory": lambda union: union.run(
        lambda: union.fs.setattr(union.find("new/er").id, SetAttr(mode=0o700), None, union.caller)
    ),
    "setxattr": lambda union: union.run(
        lambda: union.fs.setxattr(union.find("mixed/one").id, b"user.word", b"another", union.caller)
    ),
    "unlink of a file that is only there": lambda union: union.unlink("both/src"),
    "unlink": lambda union: union.unlink("everywhere"),
    "unlink in an opaque directory": lambda union: union.unlink("opaque/mine"),
    "unlink a linked file": lambda union: union.unlink("new/three"),
    "create where a whiteout is": _create("gone"),
    "create where a deep whiteout is": _create("both/deep/gone"),
    "create": _create("new/er/meanwhile"),
    "create in an opaque directory": _create("opaque/deep"),
    "mkdir where a whiteout is": lambda union: union.mkdir("gone_dir"),
    "replace a directory": _replace_directory("becomes_dir"),
    "rename over": lambda union: union.rename("both/src", "everywhere"),
    "rename out of an opaque directory": lambda union: union.rename("opaque/mine", "both/mine"),
    "rename into place": lambda union: union.rename("both/dst", "becomes_file"),
    "link": lambda union: union.link("both/src", "new/link"),
}


EVERYWHERE = ("unlink of a file that is only there", "write")
"""Operations that meet every point by themselves."""


@pytest.mark.usefixtures("in_memory")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("move", [False, True])
def test_an_operation_at_any_step_is_as_good_as_without_a_sync(tmp_path: Path, operation: str, move: bool) -> None:
    act = OPERATIONS[operation]
    build(tmp_path / "alone")
    with core(tmp_path / "alone", LAYERS, "none") as union:
        act(union)
        union.forget_all()
    wanted = merged(tmp_path / "alone")
    # All points are met by all operations together; a copy takes nothing away, so there is less to go wrong.
    stride = (scaled(1, 1, 6) if operation in EVERYWHERE else scaled(6, 2, 18)) if move else scaled(18, 6, 36)
    at, steps = list(OPERATIONS).index(operation) % stride, stride
    while at < steps:
        top = tmp_path / str(at)
        build(top)
        with core(top, LAYERS, "none") as union:
            seen(union)  # the daemon believes what it knows, for ever
            count = 0

            def meanwhile(number: int, at: int = at, union: Core = union) -> None:
                nonlocal count
                count = number + 1
                if number == at:
                    act(union)

            job = sync(union, move, meanwhile)
            steps = count
            if at >= steps:  # of this run, which may have fewer than the one before
                union.forget_all()
                break
            found = diff(wanted, merged(top), ignore=("mtime_ns",))
            assert not found, (at, found, job.progress.left)
            shown = {path: entry[0] for path, entry in seen(union).items()}
            assert shown == {path: entry.type for path, entry in wanted.items()}, at
            for path, entry in wanted.items():
                if stat.S_ISREG(entry.type) and entry.size and entry.size < 1000:
                    assert len(union.content(os.fsdecode(path))) == entry.size
            union.forget_all()
        shutil.rmtree(top)
        at += stride
    assert steps > len(OPERATIONS), "each has met a point"


@pytest.mark.usefixtures("in_memory")
@pytest.mark.parametrize("path", ["new/er", "new", "both/deep"])
def test_a_directory_that_is_renamed_at_any_step(tmp_path: Path, path: str) -> None:
    """Or refuses to be, once it is on the lower branch, too: nothing of it is lost or seen twice."""
    outcomes = set()
    stride = scaled(2, 1) if path == "new" else scaled(2, 1, 8)
    at, steps = 0, 1
    while at < steps:
        top = tmp_path / str(at)
        build(top)
        before = merged(top)
        with core(top, LAYERS, "none") as union:
            seen(union)
            count = 0
            outcome = "renamed"

            def meanwhile(number: int, at: int = at, union: Core = union) -> None:
                nonlocal count, outcome
                count = number + 1
                if number == at:
                    try:
                        union.rename(path, "elsewhere")
                    except OSError as error:
                        outcome = errno.errorcode[error.errno or 0]

            sync(union, True, meanwhile)
            steps = count
            outcomes.add(outcome)
            wanted = before
            if outcome == "renamed":
                old = os.fsencode(path)
                wanted = {
                    b"elsewhere" + name[len(old) :] if name == old or name.startswith(old + b"/") else name: entry
                    for name, entry in before.items()
                }
            found = diff(wanted, merged(top))
            assert not found, (at, outcome, found)
            assert {name: entry[0] for name, entry in seen(union).items()} == {
                name: entry.type for name, entry in wanted.items()
            }
            union.forget_all()
        shutil.rmtree(top)
        at += stride
    # Only "new" has a directory in it that is on both branches for a while.
    assert outcomes == ({"renamed", "EXDEV"} if path == "new" else {"renamed"})


@pytest.mark.parametrize("leases", [True, False])
def test_open_files_follow_and_a_writer_keeps_its_file(
    tmp_path: Path, leases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """leases: whether the file system tells who has a file open."""
    if not leases:
        monkeypatch.setattr(syscalls, "is_being_written", lambda dirfd, name: False)
    build(tmp_path)
    with core(tmp_path, LAYERS, "none") as union:
        reader = union.open("both/src")
        writer = union.open("becomes_file", os.O_RDWR)
        number = reader.node.id
        moved = union.find("new/er")  # the kernel will not ask again
        job = sync(union, move=True)
        assert job.progress.left == {b"becomes_file": "is open for writing"}
        assert union.read(reader) == b"only here"
        assert union.find("both/src") is reader.node
        assert reader.node.id == number
        assert reader.node.branch.path == os.fsencode(tmp_path / "dst")
        other = union.open("both/src", os.O_RDWR)
        union.write(other, b"CHANGED")
        assert union.read(reader) == b"CHANGEDre"
        union.fs.release(other.fh)
        union.write(writer, b"more")
        assert union.content("becomes_file")[:4] == b"more"
        assert listing(tmp_path / "src") == ["becomes_file"]
        assert type(moved) is Dir
        assert [layer.branch.path for layer in moved.layers] == [os.fsencode(tmp_path / "dst")]
        _create("new/er/after")(union)
        union.fs.release(writer.fh)
        assert not sync(union, move=True).progress.left
        assert listing(tmp_path / "src") == []
        assert union.content("becomes_file")[:4] == b"more"
        union.fs.release(reader.fh)


def test_a_file_that_somebody_writes_to_directly_stays(tmp_path: Path) -> None:
    build(tmp_path)
    with core(tmp_path, LAYERS) as union, open(tmp_path / "src" / "both" / "src", "ab", buffering=0) as direct:
        job = sync(union, move=True)
        assert job.progress.left == {b"both/src": "is open for writing"}
        direct.write(b" and more")
        assert union.content("both/src") == b"only here and more"


def test_long_names_are_carried_and_what_may_not_go_stays(tmp_path: Path) -> None:
    src = tmp_path / "src"
    build(tmp_path)
    long = "n" * (MAX_NAME + 1)
    (src / long).write_text("long")
    (src / f".wh.{'w' * (MAX_NAME + 1)}").touch()
    (tmp_path / "dst" / ("w" * (MAX_NAME + 1))).write_text("hidden")
    if subprocess.run(["chattr", "+i", str(src / "same")], check=False, capture_output=True).returncode:
        pytest.skip("ok: a file system without attributes")
    try:
        with core(tmp_path, LAYERS) as union:
            before = merged(tmp_path)
            job = sync(union, move=True)
            assert job.progress.left == {b"same": "Operation not permitted"}
            assert (tmp_path / "dst" / long).read_text() == "long"
            _same(before, merged(tmp_path), "at the end")
    finally:
        subprocess.run(["chattr", "-i", str(src / "same")], check=True)


@pytest.mark.parametrize(
    ("intruder", "when"),
    [
        ("opaque/intruder", lambda dst: os.listdir(dst / "opaque") == [".wh..wh..opq"]),
        ("gone", lambda dst: not (dst / "gone").exists()),
        ("gone_here", lambda dst: not (dst / "gone_here").exists()),
    ],
)
def test_what_somebody_puts_where_it_is_hidden_does_not_appear(
    tmp_path: Path, intruder: str, when: Callable[[Path], bool]
) -> None:
    """Written directly to the lower branch just after that was emptied, and before the upper mark or whiteout goes."""
    build(tmp_path)
    before = merged(tmp_path)
    intrusions = 0

    def intrude(_: int) -> None:
        nonlocal intrusions
        if not intrusions and when(tmp_path / "dst"):
            (tmp_path / "dst" / intruder).write_text("hidden")
            intrusions += 1
        _same(before, merged(tmp_path), "with an intruder")

    with core(tmp_path, LAYERS) as union:
        job = sync(union, True, intrude)
    assert intrusions
    assert not job.progress.left
    assert listing(tmp_path / "src") == []
    _same(before, merged(tmp_path), "at the end")


def test_a_pseudo_linked_file_stays(tmp_path: Path) -> None:
    build(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "low" / name).unlink(missing_ok=True)
    (tmp_path / "low" / "one").write_text("linked")
    os.link(tmp_path / "low" / "one", tmp_path / "low" / "two")
    with core(tmp_path, {"src": "rw", "dst": "rw", "low": "ro"}) as union:
        _overwrite("one")(union)
        before = union.content("two")
        job = sync(union, move=True)
        assert job.progress.left == {b"one": "has names elsewhere, or is pseudo-linked"}
        assert union.content("one") == union.content("two") == before


def test_below_a_branch_that_hides_things(tmp_path: Path) -> None:
    """With a branch on top, what it hides is merged down as well, and stays hidden."""
    layers = {"top": "rw", **LAYERS}
    build(tmp_path)
    top = tmp_path / "top"
    (top / "opaque").mkdir(parents=True)
    (top / "opaque" / ".wh..wh..opq").touch()
    (top / ".wh.becomes_dir").touch()
    (top / "new").write_text("a file over a directory")
    (top / "everywhere").write_text("top")
    branches = [(tmp_path / name, True) for name in layers]
    before = merge(branches)
    with core(tmp_path, layers, "none") as union:
        at_first = seen(union)
        job = sync(union, True, lambda number: _same(before, merge(branches), f"at step {number}"))
        assert not job.progress.left
        assert seen(union) == at_first
        union.forget_all()
    assert listing(tmp_path / "src") == []
    _same(before, merge(branches), "at the end")


def test_an_error_ends_it_with_the_path_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path)
    before = merged(tmp_path)
    original = syscalls.create_file_at

    def full(dirfd: int, name: bytes, flags: int, mode: int) -> int:
        if b"sparse" in name:
            raise OSError(28, "No space left on device")
        return original(dirfd, name, flags, mode)

    monkeypatch.setattr(syscalls, "create_file_at", full)
    with core(tmp_path, LAYERS) as union:
        src, dst = syncdown.check(union.sb, os.fsencode(union["src"]), os.fsencode(union["dst"]), True)
        job = syncdown.Sync(union.sb, src, dst, True, Halt())
        with pytest.raises(OSError, match="No space left"):
            run(job.steps())
        assert job.progress.current == b"mixed/sparse"
        monkeypatch.undo()
        _same(before, merged(tmp_path), "after the error")
        assert not temporary_names(tmp_path)


def test_stopped_amid(tmp_path: Path) -> None:
    build(tmp_path)
    before = merged(tmp_path)
    with core(tmp_path, LAYERS) as union:
        src, dst = syncdown.check(union.sb, os.fsencode(union["src"]), os.fsencode(union["dst"]), True)
        for stop_at in range(24):
            halt = Halt()
            job = syncdown.Sync(union.sb, src, dst, True, halt)

            def stop(number: int, stop_at: int = stop_at, halt: Halt = halt) -> None:
                halt.asked = number >= stop_at

            with pytest.raises(OSError, match="cancel"):
                run(job.steps(), stop)
            _same(before, merged(tmp_path), f"stopped at {stop_at}")
        assert not temporary_names(tmp_path)
        sync(union, True)
        assert listing(tmp_path / "src") == []


@pytest.mark.parametrize(
    ("source", "target", "move", "words"),
    [
        ("src", "low", False, "is between the two"),
        ("dst", "src", False, "is not below"),
        ("dst", "low", False, "low is ro; udbad branch mod MOUNT"),
        ("src", "src", True, "is not below"),
        ("src", "nowhere", True, "is not a branch"),
    ],
)
def test_branches_that_cannot_be_merged(tmp_path: Path, source: str, target: str, move: bool, words: str) -> None:
    with core(tmp_path, LAYERS) as union, pytest.raises(UserError, match=words) as caught:
        syncdown.check(union.sb, os.fsencode(tmp_path / source), os.fsencode(tmp_path / target), move)
    assert caught.value.code in (ExitCode.REFUSED, ExitCode.OPTION)


# -- mvdown -------------------------------------------------------------------------------------------------


def move(union: Core, path: str, **options: Any) -> dict[str, Any]:
    parts = [os.fsencode(part) for part in path.split("/")]
    answer: dict[str, Any] = run(mvdown.steps(union.sb, parts, mvdown.Options(**options), Halt()))
    return answer


def test_a_crash_amid_mvdown_leaves_the_file(tmp_path: Path) -> None:
    build(tmp_path / "model")
    before = merged(tmp_path / "model")
    at = 0
    while True:
        top = tmp_path / "now"
        build(top)
        before = merged(top)
        if not crash(top, at, lambda union: move(union, "new/er/file")):
            break
        _same(before, merged(top), f"after a crash at change {at}")
        shutil.rmtree(top)
        at += 1
    assert at > 5
    assert not (top / "src" / "new" / "er" / "file").exists()
    assert (top / "dst" / "new" / "er" / "file").read_text() == "deep"


def test_a_file_that_is_written_to_while_it_is_moved_stays_as_written(tmp_path: Path) -> None:
    build(tmp_path)
    with core(tmp_path, LAYERS, "none") as union:
        steps = mvdown.steps(union.sb, [b"both", b"src"], mvdown.Options(), Halt())
        run(steps, lambda number: _overwrite("both/src")(union) if number in (1, 6) else None)
        assert union.content("both/src") == b"WRITTEN MEANWHILE"
        assert (tmp_path / "dst" / "both" / "src").read_bytes() == b"WRITTEN MEANWHILE"
        union.forget_all()


# -- what is on disk before a source goes ----------------------------------------------------------


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("tool", ["mvdown", "sync"])
def test_a_copy_is_on_disk_before_its_source_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, local: bool
) -> None:
    """By one syncfs, whose descriptor is older than the first copy, or it may miss an error; what a server writes
    that does not reach, so there each copy is synced when it is made."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src/file").write_bytes(b"data")
    steps: list[str] = []
    opened: dict[int, int] = {}

    def record(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **words: Any) -> Any:
            steps.append(name)
            result = original(*args, **words)
            if name == "open_listing":
                opened[result] = len(steps) - 1
            return result

        monkeypatch.setattr(owner, name, call)

    def sync_fs(fd: int) -> None:
        steps.append("sync_fs")
        assert "create_file_at" not in steps[: opened[fd]]

    with core(tmp_path, {"src": "rw", "dst": "rw"}, "reval", plink=False) as union:
        object.__setattr__(union.sb.branches[1], "local", local)
        monkeypatch.setattr(datacalls, "sync_fs", sync_fs)
        for owner, name in ((os, "fsync"), *((syscalls, name) for name in ("open_listing", "create_file_at"))):
            record(owner, name)
        unlink, upper = syscalls.unlink_at, (tmp_path / "src").stat().st_ino

        def unlink_at(dirfd: int, name: bytes) -> None:
            if os.fstat(dirfd).st_ino == upper:
                steps.append("unlink_at")
            unlink(dirfd, name)

        monkeypatch.setattr(syscalls, "unlink_at", unlink_at)
        if tool == "mvdown":
            run(mvdown.steps(union.sb, [b"file"], mvdown.Options(), Halt()))
        else:
            sync(union, True)
    done = [step for step in steps if step != "open_listing"]
    expected = ["create_file_at", *([] if local else ["fsync"]), "sync_fs", "unlink_at"]
    assert done[: len(expected)] == expected
    assert not (tmp_path / "src/file").exists()
    assert (tmp_path / "dst/file").read_bytes() == b"data"
