"""Storms for as long as you like: `make soak MINUTES=N`, or python -m tests.stress.soak --minutes N.

Each storm has its own seed, mode and layout. The first failure ends the run with exit code 1 and the
words that repeat it. A storm in step is then reduced to the shortest list of operations that still
fails (--repeat SEED does that again); one of processes at the same time can only be tried again.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.stress.storm import LAYOUTS, LOOK, MODES, Arena, Op, arena, fill, operations, perform

STORMS_PER_MOUNT = 4
OPERATIONS = 500
FILLING = 200
"""Operations on each branch before the first mount."""

Turns = list[tuple[int, Op]]


@dataclass(frozen=True)
class Plan:
    """Everything that a seed decides."""

    seed: int
    udba: str
    layout: tuple[str, ...]
    in_step: bool

    @classmethod
    def of(cls, seed: int) -> Plan:
        random_ = random.Random(seed)
        return cls(seed, random_.choice(MODES), random_.choice(LAYOUTS), random_.random() < 0.5)

    def __str__(self) -> str:
        kind = "in step" if self.in_step else "at the same time"
        return f"seed {self.seed}: udba={self.udba}, {':'.join(self.layout)}, {kind}"


def run(plan: Plan) -> list[str]:
    """One mount and its storms; what the judge found."""
    with tempfile.TemporaryDirectory(prefix="udbad-soak-") as text, arena(Path(text), plan.udba, plan.layout) as here:
        fill(here, plan.seed, FILLING)
        for number in range(STORMS_PER_MOUNT):
            seed = plan.seed + 100 * number
            if plan.in_step:
                here.in_step(here.turns(seed, OPERATIONS))
            else:
                here.storm(seed, OPERATIONS)
            if found := here.check(fresh=number == STORMS_PER_MOUNT - 1):
                return found
    return []


def replay(plan: Plan, filling: Turns, turns: Turns) -> list[str]:
    """Exactly these operations: `filling` on the branches before mounting, then `turns` one after the other."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="udbad-soak-")))
        here: Arena = stack.enter_context(arena(directory, plan.udba, plan.layout))
        for index, op in filling:
            perform(op, here.mount.branches[index], True)
        here.mount.remount()
        return here.in_step(turns) or here.check(fresh=True)


def reduced(items: Turns, fails: Callable[[Turns], bool]) -> Turns:
    """Leave out what is not needed to fail: halves first, single ones last."""
    size = max(len(items) // 2, 1)
    while True:
        position = 0
        shorter = False
        while position < len(items):
            fewer = items[:position] + items[position + size :]
            if fails(fewer):
                items, shorter = fewer, True
            else:
                position += size
        if size == 1 and not shorter:
            return items
        size = max(size // 2, 1)


def explain(plan: Plan) -> None:
    """Print the shortest way to the failure of a storm in step."""
    roots = 2 + (0 if plan.udba == "none" else 3)
    filling: Turns = [(n, op) for n in range(3) for op in operations(plan.seed - n, FILLING, True)]
    turns: Turns = []
    with tempfile.TemporaryDirectory(prefix="udbad-soak-") as text, arena(Path(text), plan.udba, plan.layout) as here:
        for number in range(STORMS_PER_MOUNT):
            turns += [*here.turns(plan.seed + 100 * number, OPERATIONS), LOOK]
    if not replay(plan, filling, turns):
        print("does not fail again")
        return
    turns = reduced(turns, lambda fewer: bool(replay(plan, filling, fewer)))
    filling = reduced(filling, lambda fewer: bool(replay(plan, fewer, turns)))
    print("before mounting, on branch number:", *(f"  {index}: {op}" for index, op in filling), sep="\n")
    places = ["mount", "mount", "top", "middle", "base"][:roots]
    print("then:", *("  look" if index < 0 else f"  {places[index]}: {op}" for index, op in turns), sep="\n")
    print("found:", *replay(plan, filling, turns), sep="\n  ")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Storms for a long time.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), help="of the first storm")
    parser.add_argument("--repeat", type=int, metavar="SEED", help="only this one, reduced when it fails in step")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    seed = options.seed if options.repeat is None else options.repeat
    number = 0
    while True:
        plan = Plan.of(seed)
        number += 1
        print(f"{number}: {plan}", flush=True)
        if found := run(plan):
            print(f"FAILED, python -m tests.stress.soak --repeat {seed}", *found, sep="\n  ", flush=True)
            if plan.in_step:
                explain(plan)
            return 1
        if options.repeat is not None or time.monotonic() >= end:
            return 0
        seed += 1000


if __name__ == "__main__":
    sys.exit(main())
