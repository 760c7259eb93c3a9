"""Simulate how often `vlmzip tune` certifies a loss that is too high.

    python -m recipes.benchmarks.certified_by_chance

In every simulated try, a candidate loses a fiftieth more than is allowed, and six questions about each image decide.
The questions about an image are lost together: all at once, or with a probability per image that follows a Beta
distribution whose two parameters add up to 1. `tune` certifies the candidate if the upper bound on its loss is within
the limit. The script counts these mistakes; the first try may make them in 1.25 % of cases. It also prints the lowest
loss that each number of images can certify, which is the bound if no question is lost. It writes
benchmarks/results/certified-by-chance.csv, in about ten minutes.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import numpy as np

from recipes.benchmarks import RESULTS
from vlmzip.files import write_csv
from vlmzip.lab.stats import DRAWS
from vlmzip.lab.table import print_table
from vlmzip.lab.tune.search import FAR_OUT, bound, error_of

IMAGES = (40, 100, 285)
QUESTIONS = 6
LIMITS = (0.03, 0.05, 0.1)
TOGETHER = ("all at once", "Beta")
#: The simulated loss, as a multiple of the limit.
TOO_HIGH = 1.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS / "certified-by-chance.csv")
    args = parser.parse_args()
    rows = []
    for images, limit, together in product(IMAGES, LIMITS, TOGETHER):
        wrong = wrongly_certified(images, limit, together, args.tries)
        rows.append({"images": images, "limit": 100 * limit, "together": together, "tries": args.tries, "wrong": wrong})
        print(f"{images} images, limit {100 * limit:g}, {together}: {wrong} of {args.tries} certified", flush=True)
    write_csv(args.out, rows)
    lowest = [[str(images), f"{100 * upper_bound(np.zeros(images * QUESTIONS)):.1f}"] for images in IMAGES]
    print_table(["images", "lowest loss that can be certified"], lowest)


def wrongly_certified(images: int, limit: float, together: str, tries: int) -> int:
    """Return how many of the tries, all with a loss above the limit, are certified."""
    rng = np.random.default_rng(0)
    return sum(is_certified(draw_losses(rng, images, TOO_HIGH * limit, together), limit) for _ in range(tries))


def draw_losses(rng: np.random.Generator, images: int, loss: float, together: str) -> np.ndarray:
    """Draw which questions are lost: 1 or 0 for each, the questions about an image side by side."""
    if together == "Beta":
        chances = rng.beta(loss, 1 - loss, images)
        return (rng.random((images, QUESTIONS)) < chances[:, None]).astype(float).ravel()
    return np.repeat((rng.random(images) < loss).astype(float), QUESTIONS)


def is_certified(losses: np.ndarray, limit: float) -> bool:
    # The bound is above the mean, so most tries need no bootstrap.
    return bool(losses.mean() <= limit) and upper_bound(losses) <= limit


def upper_bound(losses: np.ndarray) -> float:
    """Return the bound that `tune` computes for the first try."""
    about = [str(number // QUESTIONS) for number in range(len(losses))]
    return bound(losses, about, error_of(1), 0, FAR_OUT * DRAWS)


if __name__ == "__main__":
    main()
