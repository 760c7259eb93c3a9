"""Accuracy of the methods on mini's test split, at three budgets, with contiguous and with original positions.

    python benchmarks/first_look.py                # 3,000 and more questions, about 20 configurations

Writes benchmarks/results/first-look.csv (a row a configuration) and prints the table for the documents. mini is a
test-bed: what wins here need not win on a model of seven billion parameters.
"""

from __future__ import annotations

import argparse
import csv
import math
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

import vlmzip
from vlmzip import NoCompression, Pool2d, RandomTokens, VisionZip
from vlmzip.compressor import Compressor, Positions
from vlmzip.mini import load
from vlmzip.mini.evaluate import ModelAnswer, accuracy, by, share_right
from vlmzip.mini.splits import test_split
from vlmzip.mini.words import LEVELS, TYPES
from vlmzip.models import adapter_for

BUDGETS = ("50%", "25%", "11%")
POSITIONS: tuple[Positions, ...] = ("contiguous", "original")


def configurations() -> list[tuple[str, Compressor]]:
    """What was asked for and what answers it; pooling has no factor for 50 %, so it appears at 25 % and 11 %."""
    profile = adapter_for(load()[0]).profile()
    found: list[tuple[str, Compressor]] = [("100%", NoCompression())]
    for budget in BUDGETS:
        for positions in POSITIONS:
            for method in (
                RandomTokens(positions=positions),
                Pool2d(positions=positions),
                VisionZip(positions=positions),
            ):
                chosen, reached = method.at_budget(budget, profile)
                if abs(reached - float(budget[:-1]) / 100) < 0.05:
                    found.append((budget, chosen))
        found.append((budget, VisionZip(keep=budget, merge="mean")))
    return found


def measure(budget: str, method: Compressor, limit: int | None) -> dict[str, object]:
    model, processor = load()
    small = vlmzip.attach(model, method)
    samples = test_split(limit)
    start = time.perf_counter()
    records = accuracy(ModelAnswer(small, processor), samples)
    seconds = time.perf_counter() - start
    right = share_right(records)
    tokens = {picture.after for picture in small.report.pictures}
    return {
        "budget": budget,
        "method": method.name(),
        "merge": getattr(method, "merge", ""),
        "positions": method.positions or "contiguous",
        "tokens": max(tokens),
        "accuracy": f"{100 * right:.1f}",
        "standard_error": f"{100 * math.sqrt(right * (1 - right) / len(records)):.1f}",
        **{f"type_{name}": f"{100 * share:.1f}" for name, share in by(records, "type").items()},
        **{f"level_{name}": f"{100 * share:.1f}" for name, share in by(records, "level").items()},
        "questions": len(records),
        "seconds": f"{seconds:.0f}",
        "compressor": str(method.to_dict()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def commit() -> str:
    out = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return out.stdout.strip() or "unknown"


def markdown(rows: Sequence[dict[str, object]]) -> str:
    columns = ["method", "merge", "positions", "tokens", "accuracy", *(f"type_{t}" for t in TYPES)]
    columns += [f"level_{level}" for level in LEVELS]
    heads = [column.removeprefix("type_").removeprefix("level_") for column in columns]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="ask only the first questions")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "first-look.csv")
    args = parser.parse_args()
    rows = []
    for budget, method in configurations():
        rows.append(measure(budget, method, args.limit))
        print(f"{budget:>5} {method.name():<15}{rows[-1]['positions']!s:<11} {rows[-1]['accuracy']} %", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(markdown(rows))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
