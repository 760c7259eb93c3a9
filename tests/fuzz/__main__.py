"""Break the input of every command for a minute, and report each wrong ending (a find): `make fuzz`.

    python -m tests.fuzz --seconds 600 --seed 1
    python -m tests.fuzz --only images --first 812 --cases 1     # repeat one case

The seed, the target and the number determine a case. The files of a find are written to runs/fuzz, with only the
changes that it needs. The exit code is 1 if there is a find.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shlex
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")

from tests.fuzz.process import FORK, Case, Outcome, run, write
from tests.fuzz.targets import ASK, PHOTO, TARGETS, Target
from vlmzip.cli.main import COMMANDS, main

LIMIT = 60.0
KINDS = ("traceback", "hang", "exit code", "noise")


@dataclass
class Tally:
    """The outcomes of one target's cases."""

    target: Target
    bases: list[Case]
    number: int
    """The number of the next case."""
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    reported: set[tuple[str, str]] = field(default_factory=set)
    """The finds so far, by kind and cause; only the first of each is reported."""


def case_of(tally: Tally, seed: int, number: int, kept: set[int] | None = None) -> tuple[Case, int]:
    """Return case `number` of a target and the number of its changes. `kept` selects the changes to make, default: all.

    The first cases are the valid ones, without changes.
    """
    rng = random.Random(f"{seed}/{tally.target.name}/{number}")
    valid = number < len(tally.bases)
    base = tally.bases[number] if valid else rng.choice(tally.bases)
    case = Case(list(base.arguments), dict(base.files))
    seeds = [] if valid else [rng.random() for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    for place, change_seed in enumerate(seeds):
        if kept is None or place in kept:
            tally.target.change(random.Random(change_seed), case)
    return case, len(seeds)


def fewest(tally: Tally, seed: int, number: int, found: Outcome) -> Case:
    """Return the case with only the changes that the find needs."""
    case, changes = case_of(tally, seed, number)
    kept = set(range(changes))
    for place in range(changes):
        smaller, _ = case_of(tally, seed, number, kept - {place})
        with run(smaller, LIMIT) as outcome:
            if (outcome.find, outcome.where) == (found.find, found.where):
                case, kept = smaller, kept - {place}
    return case


def try_case(tally: Tally, seed: int, out: Path) -> None:
    began = time.monotonic()
    case, changes = case_of(tally, seed, tally.number)
    with run(case, LIMIT) as outcome:
        find = outcome.find or ("exit code" if changes == 0 and outcome.code != 0 else "")
        tally.counts.update(["cases", "done" if outcome.code == 0 else "refused" if outcome.code == 2 else "other"])
        if find:
            tally.counts[find] += 1
            if (find, outcome.where) not in tally.reported:
                tally.reported.add((find, outcome.where))
                report(tally, seed, tally.number, find, outcome, out)
    tally.seconds += time.monotonic() - began


def report(tally: Tally, seed: int, number: int, find: str, outcome: Outcome, out: Path) -> None:
    """Write the smallest case of a find, and print how to repeat it."""
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
    """Import what the commands import, once for all cases."""
    commands = (f"vlmzip.cli.{name}" for name in COMMANDS)
    modules = ("accelerate", "transformers.trainer", "matplotlib.figure", *commands)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for name in modules:
            import_module(name)
        main(["ask", str(PHOTO), *ASK[2:], "--baseline"])


def table(totals: dict[str, Counter[str]]) -> str:
    """Return a table of the counts by target, with a last row for all targets."""
    names = ("cases", "done", "refused", *KINDS)
    lines = [f"{'':<16}" + "".join(f"{name:>12}" for name in names)]
    for target, counts in {**totals, "all": sum(totals.values(), Counter())}.items():
        lines.append(f"{target:<16}" + "".join(f"{counts[name]:>12,}" for name in names))
    return "\n".join(lines)


def work(tallies: list[Tally], end: float, last: float, seed: int, jobs: int, out: Path) -> dict[str, Counter[str]]:
    """Return the counts by target. Each case is of the target that has had the least time."""
    while unfinished := [tally for tally in tallies if tally.number < last and time.monotonic() < end]:
        tally = min(unfinished, key=lambda tally: tally.seconds)
        try_case(tally, seed, out)
        tally.number += jobs
    return {tally.target.name: tally.counts for tally in tallies}


def fuzz(seconds: float, cases: int | None, seed: int, only: list[str], first: int, jobs: int, out: Path) -> bool:
    """Try cases of the targets and print a table of the outcomes. Return whether there is no find."""
    warm()
    chosen = [(target, target.bases()) for target in TARGETS if not only or target.name in only]
    end, last = (time.monotonic() + seconds, math.inf) if cases is None else (math.inf, first + cases)
    totals: dict[str, Counter[str]] = {target.name: Counter() for target, _ in chosen}
    with ProcessPoolExecutor(jobs, FORK) as pool:
        shares = [[Tally(target, bases, first + job) for target, bases in chosen] for job in range(jobs)]
        futures = [pool.submit(work, share, end, last, seed, jobs, out) for share in shares]
        for future in futures:
            for name, counts in future.result().items():
                totals[name] += counts
    print(f"seed {seed}\n{table(totals)}")
    return not any(counts[kind] for counts in totals.values() for kind in KINDS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, help="cases of each target, however long they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], choices=[target.name for target in TARGETS])
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="number of the first case")
    parser.add_argument("--jobs", type=int, default=1, help="processes that try cases; the cases are the same")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    sys.exit(0 if fuzz(**vars(parser.parse_args())) else 1)
