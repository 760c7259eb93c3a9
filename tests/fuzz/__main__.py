"""Breaks the input of every command for a minute, and says what did not end as it should: `make fuzz`.

    python -m tests.fuzz --seconds 600 --seed 1
    python -m tests.fuzz --only images --first 812 --cases 1     # one case again

Every case follows from the seed, its target and its number. A find's files are left in runs/fuzz, with the fewest
changes that show it. The exit code is 1 if there is a find.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")

from tests.fuzz.process import Case, Outcome, run, write
from tests.fuzz.targets import ASK, EXAMPLES, Target, targets
from vlmzip.cli.main import COMMANDS, main

LIMIT = 60.0
KINDS = ("traceback", "hang", "exit code", "noise")


@dataclass
class Tally:
    """What became of one target's cases."""

    target: Target
    bases: list[Case]
    first: int
    seconds: float = 0.0
    counts: Counter = field(default_factory=Counter)
    known: Counter = field(default_factory=Counter)
    """Finds by their cause; the first of each is told."""

    @property
    def cases(self) -> int:
        return self.counts["cases"]


def case_of(tally: Tally, seed: int, number: int, kept: set[int] | None = None) -> tuple[Case, int]:
    """Case `number` of a target and how many changes it has; `kept` are the ones made, all by default.

    The first cases are the valid ones as they are.
    """
    rng = random.Random(f"{seed}/{tally.target.name}/{number}")
    valid = number < len(tally.bases)
    base = tally.bases[number] if valid else rng.choice(tally.bases)
    case = Case(list(base.arguments), dict(base.files))
    seeds = [] if valid else [rng.random() for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    for place, one in enumerate(seeds):
        if kept is None or place in kept:
            tally.target.change(random.Random(one), case)
    return case, len(seeds)


def fewest(tally: Tally, seed: int, number: int, found: Outcome) -> Case:
    """The case without the changes that the find does not need."""
    case, changes = case_of(tally, seed, number)
    kept = set(range(changes))
    for place in range(changes):
        smaller, _ = case_of(tally, seed, number, kept - {place})
        with run(smaller, LIMIT) as outcome:
            if (outcome.find, outcome.where) == (found.find, found.where):
                case, kept = smaller, kept - {place}
    return case


def try_case(tally: Tally, seed: int, number: int, out: Path) -> None:
    began = time.monotonic()
    case, changes = case_of(tally, seed, number)
    with run(case, LIMIT) as outcome:
        find = outcome.find or ("exit code" if changes == 0 and outcome.code != 0 else "")
        tally.counts.update(["cases", "done" if outcome.code == 0 else "refused" if outcome.code == 2 else "other"])
        if find:
            tally.counts[find] += 1
            tally.known[find, outcome.where] += 1
            if tally.known[find, outcome.where] == 1:
                tell(tally, seed, number, find, outcome, out)
    tally.seconds += time.monotonic() - began


def tell(tally: Tally, seed: int, number: int, find: str, outcome: Outcome, out: Path) -> None:
    name = tally.target.name
    folder = out / f"{seed}-{name}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    case = fewest(tally, seed, number, outcome)
    write(case, folder)
    print(f"{find}: {outcome.where}")
    print(f"  python -m tests.fuzz --seed {seed} --only {name} --first {number} --cases 1")
    command = shlex.join(case.arguments).encode(errors="backslashreplace").decode()
    print(f"  (cd {folder} && vlmzip {command})")
    print("".join(f"  | {line[:160]}\n" for line in outcome.stderr.splitlines()[-3:]), flush=True)


def warm() -> None:
    """Imports what commands import, once for all cases."""
    for name in ("accelerate", "transformers.trainer", "matplotlib.figure", *(f"vlmzip.cli.{one}" for one in COMMANDS)):
        import_module(name)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        main(["ask", str(EXAMPLES / "flat.png"), *ASK[2:], "--baseline"])


def table(tallies: list[Tally]) -> str:
    names = ("cases", "done", "refused", *KINDS)
    lines = [" ".join([f"{'':<16}", *(f"{name:>10}" for name in names), f"{'s':>7}"])]
    for tally in tallies:
        cells = [f"{tally.counts[name]:>10,}" for name in names]
        lines.append(" ".join([f"{tally.target.name:<16}", *cells, f"{tally.seconds:>7.0f}"]))
    sums = [f"{sum(tally.counts[name] for tally in tallies):>10,}" for name in names]
    return "\n".join([*lines, " ".join([f"{'all':<16}", *sums, f"{sum(tally.seconds for tally in tallies):>7.0f}"])])


def fuzz(seconds: float, cases: int | None, seed: int, only: list[str], first: int, out: Path) -> bool:
    """Whether there is no find. Of all targets the one that had least time is next."""
    warm()
    tallies = [Tally(target, target.bases(), first) for target in targets() if not only or target.name in only]
    end = time.monotonic() + seconds
    for _ in count():
        open_ones = [tally for tally in tallies if cases is None or tally.cases < cases]
        if not open_ones or (cases is None and time.monotonic() > end):
            break
        tally = min(open_ones, key=lambda one: one.seconds)
        try_case(tally, seed, tally.first + tally.cases, out)
    print(f"seed {seed}\n{table(tallies)}")
    return not any(tally.known for tally in tallies)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, help="cases of each target, however long they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="TARGET")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="number of the first case")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    sys.exit(0 if fuzz(**vars(parser.parse_args())) else 1)
