"""The oracles against each other and against real directories: a wrong oracle would prove nothing.

Lookup: random layers written to disk and merged from there are what the model says is visible.
Operations: a union behaves like one plain directory that holds what is visible, EXDEV for merged
directories aside, so the same operations on a native directory must give the same errno and tree.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import model as m
from tests.helpers import model_ops as ops
from tests.helpers.merge import InconsistentBranch, diff, merge, snapshot
from tests.helpers.model import Layer, Model, Node
from tests.helpers.model_ops import Op
from tests.helpers.posix import EXCHANGE
from tests.helpers.profile import scaled

LAYOUTS = (
    ("rw",),
    ("rw", "ro"),
    ("rw", "ro+wh", "ro"),
    ("rw", "rw"),
    ("rw", "ro+wh", "rw"),
    ("rw", "ro", "ro+wh", "ro", "ro+wh"),
)

unions = st.sampled_from(LAYOUTS).flatmap(lambda perms: st.tuples(*(ops.layers(perm) for perm in perms)))


@contextmanager
def scratch() -> Iterator[Path]:
    """A new directory per hypothesis example (tmp_path is one per test)."""
    path = Path(tempfile.mkdtemp(prefix="udbad-model-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def write_out(layers: Sequence[Layer], root: Path) -> list[tuple[Path, bool]]:
    branches = []
    for i, layer in enumerate(layers):
        directory = root / f"layer{i}"
        directory.mkdir()
        layer.materialise(directory)
        branches.append((directory, layer.whable))
    return branches


@settings(max_examples=scaled(60, 300))
@given(unions)
def test_model_lookup_is_the_merge_of_real_directories(layers: tuple[Layer, ...]) -> None:
    with scratch() as root:
        assert m.tree_view(merge(write_out(layers, root))) == Model(layers).visible()


@settings(max_examples=scaled(60, 300))
@given(unions, st.integers(1, 30), st.data())
def test_model_operations_are_those_of_a_plain_directory(
    layers: tuple[Layer, ...], steps: int, data: st.DataObject
) -> None:
    model = Model(layers)
    with scratch() as root:
        native = root / "native"
        native.mkdir()
        plain_copy(model, native)
        for _ in range(steps):
            op = data.draw(ops.op_for(model))
            expected = op.on_model(model)
            if expected == errno.EXDEV:
                assert op.name == "rename"
                continue
            assert op.on_disk(native) == expected, op
            assert m.tree_view(snapshot(native)) == model.visible(), op
        # The model's layers are no private matter: written out, they merge to the same tree.
        assert m.tree_view(merge(write_out(final_layers(model), root))) == model.visible()


def plain_copy(model: Model, root: Path) -> None:
    """What is visible as one native directory, hard links between visible names kept."""
    layer = Layer.of("rw")
    todo: list[m.PathT] = [()]
    while todo:
        parent = todo.pop()
        for name in model.names(parent):
            node = model.get((*parent, name))
            assert node is not None
            layer.nodes[(*parent, name)] = node
            if node.is_dir:
                todo.append((*parent, name))
    layer.materialise(root)


def final_layers(model: Model) -> list[Layer]:
    """The layers with every pseudo-link given its data, as a flush at unmount leaves it to be seen."""
    return [
        Layer(
            layer.writable,
            layer.whable,
            {path: node.final() for path, node in layer.nodes.items()},
            layer.whiteouts,
            layer.opaque,
        )
        for layer in model.layers
    ]


def file(text: bytes = b"x") -> Node:
    return Node(stat.S_IFREG, data=text)


def directory() -> Node:
    return Node(stat.S_IFDIR, 0o755)


def three() -> tuple[Layer, Layer, Layer]:
    return Layer.of("rw"), Layer.of("ro+wh"), Layer.of("ro")


N = (b"n",)
M = (b"m",)
NX = (b"n", b"x")


def test_rename_of_a_lower_directory_with_a_child_is_exdev() -> None:
    a, b, c = three()
    c.nodes |= {N: directory(), NX: file()}
    model = Model((a, b, c))
    assert Op("rename", N, M).on_model(model) == errno.EXDEV
    assert Op("unlink", NX).on_model(model) == 0
    assert Op("rename", N, M).on_model(model) == 0
    assert model.visible().keys() == {b"m"}
    assert N in a.whiteouts


def test_directory_renamed_over_a_whiteout_becomes_opaque() -> None:
    a, b, c = three()
    a.nodes[N] = directory()
    a.whiteouts.add(M)
    c.nodes |= {M: directory(), (b"m", b"old"): file()}
    model = Model((a, b, c))
    assert Op("rename", N, M).on_model(model) == 0
    assert a.opaque == {M}
    assert a.whiteouts == set()
    assert model.visible().keys() == {b"m"}


def test_hard_links_of_a_lower_branch_stay_one_file_after_copy_up() -> None:
    a, b, c = three()
    c.nodes[N] = c.nodes[M] = file(b"old")
    model = Model((a, b, c))
    assert Op("write", M, arg=0).on_model(model) == 0
    assert model.visible()[b"n"] == model.visible()[b"m"]
    assert N not in a.nodes


def test_lower_writable_branch_is_changed_in_place() -> None:
    top, low = Layer.of("rw"), Layer.of("rw")
    low.nodes[N] = file(b"old")
    model = Model((top, low))
    assert Op("write", N, arg=0).on_model(model) == 0
    assert low.nodes[N].data == ops.payload(0)
    assert Op("unlink", N).on_model(model) == 0
    assert top.nodes == {}
    assert top.whiteouts == set()


@pytest.mark.parametrize(("flags", "expected"), [(0, errno.ENOTEMPTY), (EXCHANGE, errno.EINVAL)])
def test_rename_onto_an_ancestor(flags: int, expected: int) -> None:
    a, b, c = three()
    a.nodes |= {N: directory(), NX: file()}
    assert Op("rename", NX, N, flags).on_model(Model((a, b, c))) == expected


def test_diff_names_every_difference(tmp_path: Path) -> None:
    for side, text in (("one", "aa"), ("two", "ab")):
        (tmp_path / side).mkdir()
        (tmp_path / side / "same").symlink_to("t")
        (tmp_path / side / "changed").write_text(text)
    (tmp_path / "two" / "new").mkdir()
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    for name in ("changed", "same"):
        times = (0, 1_000_000_000)
        for side in ("one", "two"):
            os.utime(tmp_path / side / name, times, follow_symlinks=False)
    lines = diff(snapshot(tmp_path / "one"), snapshot(tmp_path / "two"))
    assert lines[0] == "only in the second: b'new'"
    assert [line.split()[1] for line in lines[1:]] == ["sha"]
    assert diff(one, one) == []
    assert diff(one, two, ignore=("mtime_ns", "sha")) == ["only in the second: b'new'"]


def test_merge_refuses_a_whiteout_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / ".wh.n").mkdir()
    (tmp_path / "n").touch()
    with pytest.raises(InconsistentBranch):
        merge([(tmp_path, True)])
    assert merge([(tmp_path, False)]).keys() == {b"n"}
