"""Every kind of direct change × branch × mode × what the kernel had cached, on real mounts.

What is promised: reval, seen by every access that starts after the change (a mapping that exists is exempt:
it is right after the next read of the file); notify, the same after flush(); none, after a remount, and nothing is
asserted before. What must be seen comes from an independent merge of the branches.
Counters of requests prove what the kernel had cached: in notify and none the names are answered without the
daemon before the change, and in notify a file that the change does not concern still is afterwards.

There is one mount per mode and state, and in it a directory for each case.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.helpers.merge import Tree, diff, read_entry, snapshot
from tests.helpers.mount import Mount, mounted
from tests.helpers.profile import scaled
from tests.t4_coherence.changes import CASES, OVERLAY_CASES, PERMISSIONS, QUIET, Case, build_cases

pytestmark = pytest.mark.fuse

MODES = ("none", "reval", "notify")
STATES = ("positive", "negative", "listed", "open", "mapped", "inside")
USUAL = tuple((mode, state) for mode in MODES for state in (scaled(STATES[:1], STATES) if mode == "none" else STATES))
"""After the remount that `none` waits for, it does not matter much what the kernel had cached before."""
OPENED = tuple((mode, state) for mode in ("reval", "notify") for state in ("open", "mapped"))
PORTABLE = (("reval", "open"), ("notify", "negative"), ("notify", "mapped"))
MARKED = tuple(("notify", state) for state in scaled(("listed", "open", "inside"), STATES))
UNTOLD = tuple(scene for scene in USUAL if scene[0] != "reval")
SCENES = (
    *(("", *scene) for scene in USUAL),
    *(("edge=pyfuse3", *scene) for scene in scaled(PORTABLE[:2], PORTABLE)),
    *(("watch=fanotify", *scene) for scene in MARKED),
)
"""Options, mode and state."""
READ_BY_THE_KERNEL = (
    *(("io=passthrough", *scene) for scene in scaled(OPENED, USUAL)),
    *(("io=cached", *scene) for scene in scaled(OPENED[2:], UNTOLD)),
)
"""io=cached is not for reval; who reads a file matters where it is open."""
OVERLAY_TOP = (
    *(("whiteouts=overlay", *scene) for scene in scaled((("reval", "negative"), ("notify", "listed")), USUAL)),
    *(("whiteouts=overlay,io=passthrough", *scene) for scene in scaled((("reval", "open"),), OPENED)),
    *(
        ("whiteouts=overlay,io=cached", *scene)
        for scene in scaled((("notify", "positive"), ("none", "listed")), UNTOLD)
    ),
    *(("whiteouts=overlay,watch=fanotify", *scene) for scene in scaled((), MARKED)),
)
WAYS = {"watch=inotify": ("rw+watch=fanotify", "ro+wh", "ro+watch=fanotify")}
"""Options, and the permissions of the branches with them, where they are not PERMISSIONS."""
OF_FILES = [case for case in CASES if scaled(bool(case.change.files), True)]
"""The others change nothing that can be open as a file: who reads files has no part in them."""
NEVER = "d/never"
"""A name that no change makes."""


def asked(mount: Mount) -> int:
    """How often the kernel has asked for a name or for attributes."""
    requests = mount.requests()
    return requests.get("lookup", 0) + requests.get("getattr", 0)


def lstat_each(paths: Iterable[str]) -> None:
    """lstat(2) whatever is there, negative answers too."""
    for path in paths:
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue


def walk(root: str) -> set[bytes]:
    """Every name below a directory, as listings show them."""
    found = set()
    for directory, directories, files in os.walk(root):
        found |= {os.fsencode(os.path.relpath(os.path.join(directory, name), root)) for name in directories + files}
    return found


def probe(root: str, names: Iterable[str]) -> Tree:
    """What is found under these names, asked for by name; absent ones are left out."""
    tree: Tree = {}
    for name in names:
        try:
            tree[os.fsencode(name)] = read_entry(os.fsencode(os.path.join(root, name)))
        except (FileNotFoundError, NotADirectoryError):
            continue
    return tree


def relative(name: str, directory: str) -> str:
    """A name of the case as seen from one of its directories (os.path.relpath would ask for the current one)."""
    return os.path.relpath(f"/{name}", f"/{directory}")


def children(tree: Tree, directory: str) -> set[str]:
    """The names in one directory of a tree."""
    return {os.path.basename(name) for name in map(os.fsdecode, tree) if os.path.dirname(name) == directory}


@dataclass
class Held:
    """A file open through the mount and natively on the branch, perhaps mapped, before the change."""

    name: str
    union: int
    native: int
    mapping: mmap.mmap | None

    def check(self, exempt: bool) -> None:
        """An old descriptor shows what one on the branch object does. exempt: a read may come before the mapping."""
        of_mapping = None if exempt else self._mapped()
        mine, real = os.fstat(self.union), os.fstat(self.native)
        for attribute in ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_nlink"):
            assert getattr(mine, attribute) == getattr(real, attribute), f"{self.name}: {attribute} of the descriptor"
        content = os.pread(self.native, 1 << 20, 0)
        assert os.pread(self.union, 1 << 20, 0) == content, f"{self.name}: read of the descriptor"
        if self.mapping is not None:
            seen = self._mapped() if of_mapping is None else of_mapping
            assert seen == content[: len(self.mapping)], f"{self.name}: the mapping"

    def _mapped(self) -> bytes | None:
        """The mapping up to the end of the file.

        Copied by write(2), which answers EFAULT where a page cannot be had; touching it would be SIGBUS.
        """
        if self.mapping is None:
            return None
        size = min(os.fstat(self.native).st_size, len(self.mapping))
        reader, writer = os.pipe()
        try:
            with memoryview(self.mapping) as view, view[:size] as part:
                assert os.write(writer, part) == size  # at most three pages, which any pipe holds
            return os.read(reader, size) if size else b""
        finally:
            os.close(reader)
            os.close(writer)


@dataclass
class Scene:
    """One mount in one mode, with every case's directory warmed in one way."""

    mount: Mount
    mode: str
    state: str
    errors: dict[str, BaseException] = field(default_factory=dict)
    looks: int = 0
    """Requests that a change may cost beside those for what it is about."""

    def expected(self, case: Case) -> Tree:
        """What must be visible below the case's directory now."""
        return case.expected(self.mount.branches)

    def path(self, case: Case, name: str = "") -> str:
        return str(self.mount.path / case.id / name)

    @contextmanager
    def warmed(self, case: Case) -> Iterator[Callable[[], None]]:
        """Bring the case's names into the state; gives the check of what was held while the change happened."""
        branches = self.mount.branches
        change = case.change
        before = self.expected(case)
        visible = [name for name in change.names if os.fsencode(name) in before]
        names = [*visible, QUIET]
        if self.state == "negative":
            names = [name for name in (*change.names, NEVER) if name not in visible] + [QUIET]
        held: list[Held] = []
        with ExitStack() as stack:
            listing = native = -1
            root = self.path(case)
            if self.state == "listed":
                names = [os.fsdecode(name) for name in snapshot(Path(root))]
            elif self.state == "inside":
                native = os.open(case.winner(branches, change.cwd), os.O_RDONLY)
                stack.callback(os.close, native)
                stack.enter_context(chdir(self.path(case, change.cwd)))
                root = ""
                names = [relative(name, change.cwd) for name in names]
            elif self.state in ("open", "mapped"):
                listing = os.open(self.path(case, "d"), os.O_RDONLY)
                stack.callback(os.close, listing)
                held = [self._hold(stack, case, name) for name in (*change.files, QUIET) if name in names]
            probe(root, names)
            self._prove_cached([os.path.join(root, name) for name in names])

            def check() -> None:
                for one in held:
                    one.check(exempt=self.mode == "reval")
                if listing >= 0:
                    assert set(os.listdir(listing)) == children(self.expected(case), "d")
                if native >= 0:
                    self._check_inside(case, names, native)

            yield check

    def _hold(self, stack: ExitStack, case: Case, name: str) -> Held:
        native = os.open(case.winner(self.mount.branches, name), os.O_RDONLY)
        stack.callback(os.close, native)
        union = os.open(self.path(case, name), os.O_RDONLY)
        stack.callback(os.close, union)
        mapping = None
        if self.state == "mapped":
            mapping = stack.enter_context(mmap.mmap(union, 0, mmap.MAP_SHARED, mmap.PROT_READ))
        held = Held(name, union, native, mapping)
        held.check(exempt=False)
        return held

    def _prove_cached(self, paths: list[str]) -> None:
        lstat_each(paths)  # a READ has marked the times of access old
        before = asked(self.mount)
        lstat_each(paths)
        requests = asked(self.mount) - before
        if self.mode == "reval":
            assert requests >= len(paths), "reval must ask for everything"
        else:
            assert requests == 0, "the kernel should have known all of it"

    def _check_inside(self, case: Case, names: list[str], native: int) -> None:
        """From the current directory: the names in it; when it lost its own, what a native process would see."""
        expected = self.expected(case)
        cwd = case.change.cwd
        entry = expected.get(os.fsencode(cwd))
        if entry is not None and entry.is_dir:
            by_name = {os.fsencode(relative(os.fsdecode(name), cwd)): expected[name] for name in expected}
            wanted = {name: by_name[name] for name in map(os.fsencode, names) if name in by_name}
            assert diff(wanted, probe("", names)) == []
            assert set(os.listdir()) == children(expected, cwd)
            assert os.getcwd() == self.path(case, cwd)
        else:
            try:
                assert set(os.listdir()) == set(os.listdir(native))
            except FileNotFoundError:
                pass  # the directory is gone for good

    def settle(self) -> None:
        """Wait for what the mode promises, and no longer."""
        if self.mode == "notify":
            self.mount.flush()

    def check_quiet(self, case: Case) -> None:
        if self.mode == "notify":
            before = asked(self.mount)
            lstat_each([self.path(case, QUIET)])
            assert asked(self.mount) <= before + self.looks, "something that had not changed was forgotten"

    def check(self, case: Case) -> None:
        """The case's directory as it must be now: by name and listed, in the order that its state does not spoil."""
        expected = self.expected(case)
        names = case.change.names
        root = self.path(case)
        if self.state == "listed":
            assert diff(expected, snapshot(Path(root))) == []
        wanted = {os.fsencode(name) for name in names}
        for _ in range(2):  # the second answer may come from the cache
            assert diff({name: expected[name] for name in wanted & expected.keys()}, probe(root, names)) == []
        assert walk(root) == set(expected)


@pytest.fixture(scope="module")
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    options, mode, state = request.param
    root = tmp_path_factory.mktemp("matrix")
    cases = OVERLAY_CASES if "whiteouts=overlay" in options else CASES
    branches = build_cases(root, cases)
    permissions = WAYS.get(options, PERMISSIONS)
    words = [f"{branch}={permission}" for branch, permission in zip(branches, permissions, strict=True)]
    with mounted(words, root / "mnt", mode, options) as mount:
        scene = Scene(mount, mode, state)
        if mode == "none":
            # Nothing is promised before the remount, so one is enough for all cases.
            for case in cases:
                try:
                    with scene.warmed(case):
                        case.act(branches)
                except (AssertionError, OSError) as error:
                    scene.errors[case.id] = error
            mount.remount()
        yield scene


def scenes(*params: tuple[str, str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "scene", params, indirect=True, ids=lambda scene: "-".join(filter(None, scene)), scope="module"
    )


@scenes(*SCENES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_direct_change_is_seen(scene: Scene, case: Case) -> None:
    check(scene, case)


@scenes(*((options, "notify", state) for options in WAYS for state in scaled(("listed",), STATES)))
@pytest.mark.parametrize("case", scaled(CASES[::4], CASES), ids=lambda case: case.id)
def test_a_direct_change_is_seen_by_the_way_of_its_branch(scene: Scene, case: Case) -> None:
    found = scene.mount.control({"op": "stats"})["coherence"]
    assert min(found["watches"], found["handles"]) > 0
    check(scene, case)


@scenes(*READ_BY_THE_KERNEL)
@pytest.mark.parametrize("case", OF_FILES, ids=lambda case: case.id)
def test_a_direct_change_of_files_that_the_kernel_reads_is_seen(scene: Scene, case: Case) -> None:
    check(scene, case)


@scenes(*OVERLAY_TOP)
@pytest.mark.parametrize("case", OVERLAY_CASES, ids=lambda case: case.id)
def test_a_direct_change_of_a_top_branch_of_overlayfs_is_seen(scene: Scene, case: Case) -> None:
    check(scene, case)


def check(scene: Scene, case: Case) -> None:
    if scene.mode == "none":
        if case.id in scene.errors:
            raise scene.errors[case.id]
    else:
        with scene.warmed(case) as check_held:
            case.act(scene.mount.branches)
            scene.settle()
            scene.check_quiet(case)
            check_held()
    scene.check(case)
