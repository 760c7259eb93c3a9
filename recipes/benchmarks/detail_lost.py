"""Measure the threshold of `ask`'s warning about lost detail on mini's reading questions.

    python -m recipes.benchmarks.detail_lost

The script asks the reading questions of mini's validation split with several methods and budgets, and sorts the answers
into bins by the `detail_lost` of their images. The threshold is the start of the first bin from which all bins keep
less than three quarters of the accuracy without compression. It writes benchmarks/results/detail-lost.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import vlmzip
from recipes.benchmarks import RESULTS
from recipes.mini.evaluate import ModelAnswer, accuracy
from vlmzip import NoCompression, Pool2d, RandomTokens, VisionZip
from vlmzip.files import write_csv
from vlmzip.mini import load
from vlmzip.mini.splits import validation_split

METHODS = [
    *(VisionZip(keep=k) for k in (16, 24, 36, 72, 108)),
    *(RandomTokens(keep=k) for k in (16, 36, 72, 108, 130)),
    *(Pool2d(factor=f) for f in (2, 3)),
]
BIN = 0.1
KEEPS_AT_LEAST = 0.75


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "detail-lost.csv")
    args = parser.parse_args()
    model, processor = load()
    samples = [sample for sample in validation_split() if sample.type == "read"]
    plain = accuracy(ModelAnswer(vlmzip.attach(model, NoCompression()), processor), samples)
    base = sum(record.right for record in plain) / len(plain)
    answers: list[tuple[float, bool]] = []
    for method in METHODS:
        compressed = vlmzip.attach(model, method)
        records = accuracy(ModelAnswer(compressed, processor), samples, batch=len(samples))
        lost = [image.detail_lost for image in compressed.report.images]
        answers += zip(lost, [record.right for record in records], strict=True)
    rows = table(answers, base)
    write_csv(args.out, rows)
    for row in rows:
        print(f"{row['from']:.1f} to {row['to']:.1f} lost: reading {row['accuracy']:.3f} of {row['answers']} answers")
    print(f"without compression: {base:.3f} of {len(plain)}; threshold: {threshold(rows, base):.1f}")
    print(f"written to {args.out}")


def table(answers: list[tuple[float, bool]], base: float) -> list[dict[str, float]]:
    rows = []
    for number in range(12):
        low, high = number * BIN, (number + 1) * BIN
        right = [is_right for lost, is_right in answers if low <= lost < high]
        if right:
            rows.append(
                {"from": low, "to": high, "answers": len(right), "accuracy": sum(right) / len(right), "plain": base}
            )
    return rows


def threshold(rows: list[dict[str, float]], base: float) -> float:
    """Return the start of the first bin from which every bin keeps less than KEEPS_AT_LEAST of the plain accuracy."""
    low = [row["accuracy"] < KEEPS_AT_LEAST * base for row in rows]
    return next(row["from"] for n, row in enumerate(rows) if all(low[n:]))


if __name__ == "__main__":
    main()
