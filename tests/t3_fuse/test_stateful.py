"""Random operations through a real mount against the model of layers (tests/helpers/model.py).

One mount per example: random layers are written to disk and mounted, each operation must give the errno
the model predicts, and from time to time, at the end, and again after a remount, the tree seen through
the mount, the model, and an independent merge of the branch directories must be the same tree.
Read-only branches must keep every byte.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.helpers import model as m
from tests.helpers import model_ops as ops
from tests.helpers.merge import OVERLAY, Tree, diff, merge, snapshot, temporary_names
from tests.helpers.model import Model, Node, PathT
from tests.helpers.model_ops import Op
from tests.helpers.mount import Mount, mounted
from tests.helpers.profile import scaled

LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("rw",),
    ("rw", "ro"),
    ("rw", "ro+wh", "ro"),
    ("rw", "rw"),
    ("rw", "ro+wh", "rw"),
    ("rw", "ro+wh", "ro", "ro+wh"),
)

MODES = ("none", "reval", "notify")
STORM = 20
"""Operations in a row of the rule `storm`."""


class Union(RuleBasedStateMachine):
    """A mounted union beside its model."""

    permissions: tuple[str, ...] = ("rw",)
    udba = "none"
    options = ""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.held: list[tuple[int, Node]] = []

    @initialize(data=st.data())
    def mount_random_layers(self, data: st.DataObject) -> None:
        linked = "overlay" not in self.options  # without pseudo-links a copy-up parts the names of a lower file
        self.model = Model(
            [data.draw(ops.layers(permission, linked)) for permission in self.permissions],
            "dirren=auto" in self.options,
            self.options.removeprefix("io="),
        )
        self.root = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="udbad-state-")))
        self.branches = [self.root / f"{i}-{permission}" for i, permission in enumerate(self.permissions)]
        for branch, layer in zip(self.branches, self.model.layers, strict=True):
            branch.mkdir()
            layer.materialise(branch)
        self.read_only = {
            branch: snapshot(branch)
            for branch, layer in zip(self.branches, self.model.layers, strict=True)
            if not layer.writable
        }
        words = [f"{branch}={perm}" for branch, perm in zip(self.branches, self.permissions, strict=True)]
        options = ",".join(filter(None, ("dirren=off", self.options)))
        # A name beside its whiteout, which random layers may have, is rightly warned about.
        self.mount: Mount = self.stack.enter_context(
            mounted(
                words,
                self.root / "mnt",
                self.udba,
                options,
                allow_log=r"whiteout|\.wh\.",
            )
        )

    @rule(data=st.data())
    def operation(self, data: st.DataObject) -> None:
        self.perform(data.draw(ops.op_for(self.model)))

    @rule(seed=st.integers(0, 1 << 32))
    def storm(self, seed: int) -> None:
        """Many operations that cost hypothesis one choice; what it notes is the sequence to repeat."""
        pick = random.Random(seed).choice
        for _ in range(STORM):
            op = ops.random_op(pick, self.model)
            note(f"  {op}")
            self.perform(op)

    def perform(self, op: Op) -> None:
        expected, came = op.on_model(self.model), op.on_disk(self.mount.path)
        assert came == expected, f"{op}: {name_of(came)}, expected {name_of(expected)}"
        for path in (op.path, op.other):
            self.check_name(path)

    def check_name(self, path: PathT) -> None:
        """One name at once, by name: what the operation left in the caches of the kernel must be right."""
        want = ops.outcome(lambda: self.model.existing(path))
        came = ops.outcome(lambda: os.lstat(ops.real(self.mount.path, path)))
        assert came == want, f"lstat {path}: {name_of(came)}, expected {name_of(want)}"

    @rule(data=st.data())
    @precondition(lambda self: len(self.held) < 4)
    def hold(self, data: st.DataObject) -> None:
        """Open a file for reading and keep it, so that a copy-up or unlink happens underneath."""
        files = [path for path, view in self.model.visible().items() if view[0] == stat.S_IFREG]
        if not files:
            return
        path = data.draw(st.sampled_from(sorted(files)))
        fd = os.open(os.path.join(os.fsencode(self.mount.path), path), os.O_RDONLY)
        self.held.append((fd, self.model.hold(tuple(path.split(b"/")))))

    @rule()
    @precondition(lambda self: bool(self.held))
    def release(self) -> None:
        fd, node = self.held.pop(0)
        try:
            self.check_held(fd, node)
        finally:
            os.close(fd)
            self.model.release(node)

    def check_held(self, fd: int, node: Node) -> None:
        """A descriptor sees the file's present data, whatever happened to its name and branch (semantics 10.4)."""
        data = node.final().data
        assert os.pread(fd, len(data) + 1, 0) == data
        assert os.fstat(fd).st_size == len(data)

    @rule()
    def compare(self) -> None:
        seen = snapshot(self.mount.path)
        assert m.tree_view(seen) == self.model.visible()
        assert diff(self.merged(), seen) == []
        for fd, node in self.held:
            self.check_held(fd, node)

    def teardown(self) -> None:
        with self.stack:
            if hasattr(self, "mount"):  # else drawing the layers failed
                self.finish()

    def finish(self) -> None:
        try:
            self.compare()
        finally:
            for fd, _ in self.held:
                os.close(fd)
        self.mount.flush()
        before = snapshot(self.mount.path)
        self.mount.remount()
        after = snapshot(self.mount.path)
        assert diff(before, after) == []
        assert diff(self.merged(), after) == []
        for branch, tree in self.read_only.items():
            assert diff(tree, snapshot(branch)) == []
        for branch in self.branches:
            assert not temporary_names(branch), "temporary names left"

    def merged(self) -> Tree:
        overlay = "whiteouts=overlay" in self.options
        return merge(
            [
                (branch, OVERLAY if overlay and layer.writable else layer.whable)
                for branch, layer in zip(self.branches, self.model.layers, strict=True)
            ]
        )


def name_of(number: int) -> str:
    return errno.errorcode.get(number, "success")


@pytest.mark.fuse
@pytest.mark.parametrize("io", ["requests", "cached", "passthrough"])
def test_set_user_id_and_new_content(tmp_path: Path, io: str) -> None:
    """What root's new content costs, by the model and on the branch. held: a file that was opened without the bit."""
    branch = tmp_path / "branch"
    branch.mkdir()
    model = Model([m.Layer.of("rw")], io=io)
    with mounted([f"{branch}=rw"], tmp_path / "mnt", "none", f"io={io}") as mount:

        def perform(*operations: Op) -> None:
            for op in operations:
                assert op.on_model(model) == op.on_disk(mount.path) == 0

        perform(*(Op("create", (name,), (), 1) for name in (b"source", b"closed", b"held")))
        model.hold((b"held",))
        with (mount.path / "held").open("rb"):
            for name in (b"closed", b"held"):
                for op in (
                    Op("fallocate", (name,)),
                    Op("write", (name,)),
                    Op("copy range", (name,), (b"source",)),
                    Op("truncate", (name,), (), 3),
                    Op("open trunc", (name,)),
                ):
                    perform(Op("chmod", (name,), (), 0o4711), op)
                    assert m.tree_view(merge([(branch, True)])) == model.visible(), op


@pytest.mark.fuse
@pytest.mark.stress
@pytest.mark.parametrize(
    ("permissions", "udba", "options"),
    [
        *((layout, udba, "") for layout in LAYOUTS for udba in ("none", "reval")),
        (LAYOUTS[0], "notify", "edge=pyfuse3"),
        *(
            (layout, udba, "dirren=auto")
            for layout in LAYOUTS[1:5]
            for udba in scaled(("none",), ("none", "reval", "notify"))
        ),
        *((layout, "none", "io=cached") for layout in scaled(LAYOUTS[2:3], LAYOUTS)),
        *((layout, udba, "whiteouts=overlay") for layout in LAYOUTS[1:3] for udba in ("none", "reval", "notify")),
        # An open file is not copied up then, which only a second writable branch makes a difference.
        *((layout, "notify", "io=passthrough") for layout in scaled(LAYOUTS[1:2], LAYOUTS) if layout.count("rw") == 1),
    ],
    ids=lambda value: value if isinstance(value, str) else ":".join(value),
)
def test_random_operations(permissions: tuple[str, ...], udba: str, options: str) -> None:
    machine = type("Machine", (Union,), {"permissions": permissions, "udba": udba, "options": options})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=scaled(1, 10),
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            # No shrinking: every attempt would mount a union. The operations of the failed example are printed.
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
