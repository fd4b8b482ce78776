"""Policies: every rule of semantics 7 by example, and what holds for all of them by property."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udbad.branch.policy import COPYUP_POLICIES, CREATE_POLICIES, Facts, parse_copyup, parse_create
from udbad.errors import ExitCode, UserError

CREATE_TEXTS = [
    "tdp",
    "top-down-parent",
    "tdmfs:50",
    "rr",
    "round-robin",
    "mfs",
    "most-free-space",
    "mfsrr:50",
    "pmfs",
    "pmfsrr:50",
]


def free_of(values: Sequence[int]) -> Callable[[int], int]:
    return lambda index: values[index]


def snap(
    writable: str,
    parent: set[int],
    *,
    name_top: int | None = None,
    whiteout: int | None = None,
    opaque: int | None = None,
    floor: int | None = None,
    free: Sequence[int] = (),
    is_dir: bool = False,
) -> Facts:
    """`writable`: one letter a branch, w or r, top first."""
    return Facts(
        writable=tuple(letter == "w" for letter in writable),
        parent=frozenset(parent),
        parent_top=min(parent),
        name_top=name_top,
        whiteout=whiteout,
        opaque=opaque,
        floor=len(writable) - 1 if floor is None else floor,
        free=free_of(free or [0] * len(writable)),
        is_dir=is_dir,
    )


def create(text: str, facts: Facts) -> int | None:
    """The chosen branch, None for EROFS."""
    return _or_none(lambda: parse_create(text).select(facts))


def copyup(text: str, facts: Facts) -> int | None:
    return _or_none(lambda: parse_copyup(text).select(facts))


def _or_none(select: Callable[[], int]) -> int | None:
    try:
        return select()
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return None


# -- tdp ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        pytest.param(snap("ww", {0, 1}), 0, id="parent's top is writable"),
        pytest.param(snap("www", {1, 2}), 1, id="parent's top, not the top branch"),
        pytest.param(snap("wwrw", {2, 3}), 1, id="read-only parent's top: nearest above"),
        pytest.param(snap("wrr", {2}), 0, id="nearest above skips read-only ones"),
        pytest.param(snap("rww", {0, 1, 2}), None, id="only lower branches are writable"),
        pytest.param(snap("rr", {0}), None, id="nothing writable"),
        pytest.param(snap("ww", {0, 1}, name_top=1), 1, id="an existing entry stays where it is"),
        pytest.param(snap("wwwr", {1, 2, 3}, name_top=3), 1, id="above a read-only entry: highest with the parent"),
        pytest.param(snap("wwrr", {2, 3}, name_top=3), 1, id="above a read-only entry without the parent: nearest"),
        pytest.param(snap("wr", {1}, whiteout=1), 0, id="ro+wh whiteout"),
        pytest.param(snap("ww", {0, 1}, whiteout=0), 0, id="whiteout on the target itself"),
    ],
)
def test_tdp(facts: Facts, expected: int | None) -> None:
    assert create("tdp", facts) == expected


# -- the others ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "facts", "expected"),
    [
        pytest.param("tdmfs:50", snap("www", {0, 1, 2}, free=[10, 60, 90]), 1, id="tdmfs: first above the mark"),
        pytest.param("tdmfs:50", snap("www", {0, 1, 2}, free=[50, 51, 90]), 1, id="tdmfs: more than the mark"),
        pytest.param("tdmfs:50", snap("rww", {0, 1, 2}, free=[90, 60, 90]), 1, id="tdmfs: read-only never"),
        pytest.param("tdmfs:50", snap("www", {0, 1}, free=[10, 20, 90]), 2, id="tdmfs: ends at the tail, then mfs"),
        pytest.param("tdmfs:50", snap("www", {0, 1, 2}, free=[10, 20, 30]), 2, id="tdmfs: none has enough: mfs"),
        pytest.param("tdmfs:50", snap("www", {0, 1}, whiteout=1, free=[10, 20, 90]), 1, id="tdmfs: mfs not below bwh"),
        pytest.param("tdmfs:5", snap("www", {0, 1, 2}, whiteout=2, free=[10, 20, 90]), 0, id="tdmfs: no exception"),
        pytest.param("mfs", snap("www", {0}, free=[10, 30, 20]), 1, id="mfs: most free"),
        pytest.param("mfs", snap("www", {0}, free=[30, 30, 20]), 1, id="mfs: tie goes to the lower"),
        pytest.param("mfs", snap("wrw", {0}, free=[10, 90, 5]), 0, id="mfs: read-only never"),
        pytest.param("mfs", snap("www", {0}, floor=1, free=[10, 30, 90]), 1, id="mfs: not below an opaque ancestor"),
        pytest.param("mfs", snap("www", {0, 1, 2}, name_top=1, free=[10, 5, 90]), 0, id="mfs: not below the entry"),
        pytest.param("mfs", snap("www", {0}, free=[0, 0, -1]), 1, id="mfs: failed statfs comes last"),
        pytest.param("mfs", snap("rrw", {0}, free=[0, 0, -1]), 2, id="mfs: failed statfs is better than EROFS"),
        pytest.param("mfs", snap("www", {0, 1}, whiteout=1, free=[90, 10, 90]), 1, id="mfs: the whiteout decides"),
        pytest.param("mfs", snap("www", {0, 1}, opaque=1, free=[90, 10, 90]), 1, id="mfs: the opaque mark decides"),
        pytest.param("mfs", snap("www", {0}, whiteout=2, opaque=0, free=[1, 9, 9]), 0, id="mfs: the upper of both"),
        pytest.param("mfs", snap("www", {0}, whiteout=2, floor=1, free=[9, 1, 9]), 1, id="mfs: clamped by ancestors"),
        pytest.param("mfs", snap("wwrw", {0}, whiteout=2, free=[90, 1, 9, 9]), 1, id="mfs: ro+wh: nearest above"),
        pytest.param("mfs", snap("rrw", {0}, whiteout=1, free=[9, 9, 9]), None, id="mfs: ro+wh with none above"),
        pytest.param("mfsrr:50", snap("www", {0}, free=[10, 60, 20]), 1, id="mfsrr: enough left"),
        pytest.param("mfsrr:50", snap("www", {0}, free=[10, 50, 20]), 1, id="mfsrr: just enough"),
        pytest.param("mfsrr:50", snap("www", {0}, free=[10, 49, 20]), 2, id="mfsrr: too little: rr"),
        pytest.param("pmfs", snap("www", {0, 1}, free=[10, 20, 90]), 1, id="pmfs: only where the parent is"),
        pytest.param("pmfs", snap("www", {0, 1}, free=[20, 20, 90]), 0, id="pmfs: tie goes to the upper"),
        pytest.param("pmfs", snap("wwr", {2}, free=[90, 10, 90]), 1, id="pmfs: no writable parent: as tdp"),
        pytest.param("pmfs", snap("wrw", {1, 2}, free=[10, 0, 20]), 2, id="pmfs: tdp's branch against a parent's"),
        pytest.param("pmfs", snap("rww", {0}, free=[90, 10, 20]), 2, id="pmfs: where tdp finds none: mfs"),
        pytest.param("pmfsrr:50", snap("www", {0, 1}, free=[10, 60, 90]), 1, id="pmfsrr: enough at the parent's"),
        pytest.param("pmfsrr:50", snap("www", {0, 1}, free=[10, 40, 90]), 2, id="pmfsrr: too little: mfs anywhere"),
        pytest.param("pmfsrr:95", snap("wwr", {0, 1}, free=[10, 40, 0]), 1, id="pmfsrr: too little anywhere: rr"),
    ],
)
def test_create(text: str, facts: Facts, expected: int | None) -> None:
    assert create(text, facts) == expected


def test_round_robin_goes_up_and_mkdir_does_not_advance() -> None:
    policy = parse_create("rr")
    file, directory = snap("wwrw", {0}), snap("wwrw", {0}, is_dir=True)
    assert [policy.select(file) for _ in range(4)] == [3, 1, 0, 3]
    assert [policy.select(directory) for _ in range(3)] == [1, 1, 1]
    assert policy.select(file) == 1


def test_round_robin_survives_a_smaller_branch_set() -> None:
    policy = parse_create("rr")
    assert [policy.select(snap("wwww", {0})) for _ in range(2)] == [3, 2]
    assert [policy.select(snap("ww", {0})) for _ in range(2)] == [1, 0]


def test_the_exceptions_leave_the_round_robin_where_it_was() -> None:
    policy = parse_create("rr")
    assert policy.select(snap("www", {0}, whiteout=0)) == 0
    assert policy.select(snap("www", {0})) == 2


def test_round_robin_of_pmfsrr_advances() -> None:
    policy = parse_create("pmfsrr:50")
    full = snap("www", {0, 1, 2})
    assert [policy.select(full) for _ in range(4)] == [2, 1, 0, 2]


# -- cpup= --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "tdp", "bup", "bu"),
    [
        pytest.param(snap("wwwr", {0, 1, 3}, name_top=3), 0, 1, 2, id="one answer each"),
        pytest.param(snap("wwrr", {2, 3}, name_top=3), 1, 1, 1, id="the parent is nowhere writable"),
        pytest.param(snap("rrwr", {0, 1, 3}, name_top=3), 2, None, 2, id="bup looks above the parent's top only"),
        pytest.param(snap("wrwr", {1, 3}, name_top=3), 2, 0, 2, id="writable between the parents"),
        pytest.param(snap("rr", {0, 1}, name_top=1), None, None, None, id="nothing writable"),
        pytest.param(snap("rw", {0, 1}, name_top=0), None, None, None, id="never downwards"),
        pytest.param(snap("ww", {0, 1}, name_top=1), 0, 0, 0, id="never onto itself"),
        pytest.param(snap("w", {0}, name_top=0), None, None, None, id="nothing above"),
    ],
)
def test_copyup(facts: Facts, tdp: int | None, bup: int | None, bu: int | None) -> None:
    assert (copyup("tdp", facts), copyup("bup", facts), copyup("bu", facts)) == (tdp, bup, bu)


# -- properties ---------------------------------------------------------------------------------


@st.composite
def factss(draw: st.DrawFn, positive: bool | None = None) -> Facts:
    """A state that lookup can produce: nothing positive lies below what hides it."""
    count = draw(st.integers(1, 6))
    indices = st.integers(0, count - 1)
    writable = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    parent = draw(st.sets(indices, min_size=1))
    top = min(parent)
    below_top = st.integers(top, count - 1)
    opaque = draw(st.none() | below_top)
    if opaque is not None:
        parent = {index for index in parent if index <= opaque}
    floor = draw(below_top)
    parent = {index for index in parent if index <= floor}
    existing = draw(st.booleans()) if positive is None else positive
    name_top = draw(st.sampled_from(sorted(parent))) if existing else None
    whiteout = draw(st.none() | st.integers(top if name_top is None else name_top, count - 1))
    return Facts(
        writable=tuple(writable),
        parent=frozenset(parent),
        parent_top=top,
        name_top=name_top,
        whiteout=whiteout,
        opaque=opaque,
        floor=floor,
        free=free_of(draw(st.lists(st.integers(-1, 100), min_size=count, max_size=count))),
        is_dir=draw(st.booleans()),
    )


def allowed(facts: Facts) -> set[int]:
    """Independently of the code under test: writable, and nothing above or beside hides the object."""
    bounds = [facts.floor]
    bounds += [b for b in (facts.whiteout, facts.opaque, facts.name_top) if b is not None]
    return {i for i, writable in enumerate(facts.writable) if writable and all(i <= b for b in bounds)}


@pytest.mark.parametrize("text", [text for text in CREATE_TEXTS if text not in ("tdp", "top-down-parent")])
@given(st.lists(factss(), min_size=1, max_size=4))
def test_create_is_writable_and_never_hidden(text: str, sequence: list[Facts]) -> None:
    policy = parse_create(text)
    for facts in sequence:
        chosen = _or_none(partial(policy.select, facts))
        if chosen is None:
            assert allowed(facts) == set()
        else:
            assert chosen in allowed(facts)


@given(factss())
def test_tdp_fails_exactly_when_nothing_at_or_above_the_entry_is_writable(facts: Facts) -> None:
    own = facts.parent_top if facts.name_top is None else facts.name_top
    chosen = create("tdp", facts)
    if chosen is None:
        assert not any(facts.writable[: own + 1])
    else:
        assert chosen in allowed(facts)
        assert chosen <= own
        if facts.writable[own]:
            assert chosen == own


@pytest.mark.parametrize("text", sorted(COPYUP_POLICIES))
@given(factss(positive=True))
def test_copyup_goes_up(text: str, facts: Facts) -> None:
    assert facts.name_top is not None
    above = {index for index in range(facts.name_top) if facts.writable[index]}
    chosen = copyup(text, facts)
    if chosen is not None:
        assert chosen in above
    elif text in ("bup", "bottom-up-parent"):
        assert not {index for index in above if index < facts.parent_top or index in facts.parent}
    else:
        assert above == set()


@pytest.mark.parametrize("text", CREATE_TEXTS)
@given(factss(), st.integers(0, 5))
def test_a_damaged_facts_still_hides_nothing(text: str, facts: Facts, floor: int) -> None:
    """A branch set that changed under the lookup may give marks above the parent's top."""
    damaged = facts._replace(floor=min(floor, len(facts.writable) - 1))
    chosen = create(text, damaged)
    assert chosen is None or chosen in allowed(damaged)


# -- option text --------------------------------------------------------------------------------


def test_every_name_of_the_table_parses() -> None:
    assert {text.partition(":")[0] for text in CREATE_TEXTS} == set(CREATE_POLICIES)
    for text in CREATE_TEXTS:
        assert type(parse_create(text)) is CREATE_POLICIES[text.partition(":")[0]]
    for text, policy in COPYUP_POLICIES.items():
        assert type(parse_copyup(text)) is policy


@pytest.mark.parametrize(
    ("text", "low", "seconds"),
    [
        ("tdp", 0, 30),
        ("mfs", 0, 30),
        ("mfs:0", 0, 0),
        ("most-free-space:3600", 0, 3600),
        ("mfsrr:1000", 1000, 30),
        ("mfsrr:2K:5", 2048, 5),
        ("tdmfs:3m", 3 << 20, 30),
        ("pmfsrr:4G:60", 4 << 30, 60),
        ("tdmfs:1T:0", 1 << 40, 0),
        ("pmfs:7", 0, 7),
    ],
)
def test_arguments(text: str, low: int, seconds: int) -> None:
    policy = parse_create(text)
    assert (policy.low, policy.cache_seconds) == (low, seconds)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mfss", ["'mfss'", "'mfs'"]),
        ("top-down", ["'top-down'", "'top-down-parent'"]),
        ("", ["''"]),
        ("MFS", ["'MFS'"]),
        ("tdp:1", ["'tdp'"]),
        ("rr:1", ["'rr'"]),
        ("mfs:1:2", ["'mfs[:SEC]'"]),
        ("tdmfs", ["'tdmfs:LOW[:SEC]'"]),
        ("mfsrr:1:2:3", ["'mfsrr:LOW[:SEC]'"]),
        ("mfs:3601", ["'3601'", "3600"]),
        ("mfs:-1", ["'-1'"]),
        ("mfs:", ["''"]),
        ("mfs:1K", ["'1K'"]),
        ("mfsrr:", ["''"]),
        ("mfsrr:1.5G", ["'1.5G'"]),
        ("mfsrr:1_0", ["'1_0'"]),
        ("mfsrr: 10", ["' 10'"]),
        ("mfsrr:٣", ["'٣'"]),
        ("mfsrr:1P", ["'1P'"]),
        ("mfsrr:10:x", ["'x'"]),
        ("mfsrr:" + "9" * 5000, ["bytes"]),
        ("mfs:1\n2", ["1\\n2"]),
    ],
)
def test_bad_create(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_create(text)
    assert caught.value.code is ExitCode.OPTION
    assert caught.value.message.startswith("create=")
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("text", "closest"),
    [
        ("botom-up", "bottom-up"),
        ("tpd", "tdp"),
        ("bup:1", "bup"),
        ("mfs", "known are 'bottom-up', "),
        ("", "known are "),
    ],
)
def test_bad_copyup(text: str, closest: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_copyup(text)
    assert caught.value.code is ExitCode.OPTION
    assert caught.value.message.startswith(f"cpup={text}:")
    assert closest in caught.value.message.removeprefix(f"cpup={text}:")
