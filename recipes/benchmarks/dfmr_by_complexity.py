"""Measure whether DFMR keeps more tokens of more complex images, on mini's test images by level.

    python -m recipes.benchmarks.dfmr_by_complexity

The script measures the deviations of mini's 570 test images (a third each flat, patterned and cluttered) with several
settings, and sets the threshold for several budgets in two ways:

* test:       from the test images themselves, which shows how near the average can come to a budget;
* validation: from mini's 180 validation images, applied to the test images, as a user would do.

It writes the mean deviation and the mean token count of every level to benchmarks/results/dfmr-by-complexity.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image

from recipes.benchmarks import RESULTS
from vlmzip import DFMR, mini
from vlmzip.files import write_csv
from vlmzip.lab.machine import about
from vlmzip.mini.assets import shipped_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.scene import make_scene
from vlmzip.mini.splits import TEST, VALIDATION
from vlmzip.mini.words import LEVELS
from vlmzip.runtime.calibration import Calibration, measure, meet

METHODS = [DFMR(), DFMR(normalize="l2"), DFMR(normalize="none"), DFMR(windows="max"), DFMR(measure="pixels")]
BUDGETS = ["75%", "50%", "25%", "15%"]


def images(seeds: Iterable[int], part: str) -> list[Image.Image]:
    return [Image.fromarray(draw(make_scene(seed), shipped_assets(part))) for seed in seeds]


def after(found: Calibration, threshold: float) -> list[int]:
    """Output tokens of the images measured in `found`, under another threshold."""
    counts = []
    for before, deviations in zip(found.before, found.deviations, strict=True):
        factor = max([1, *(factor for factor, value in deviations.items() if value < threshold)])
        counts.append(before // factor**2)
    return counts


def by_level(values: list[float], levels: list[str]) -> dict[str, float]:
    return {level: fmean(v for v, own in zip(values, levels, strict=True) if own == level) for level in LEVELS}


def rows_of(method: DFMR, model: torch.nn.Module, processor: object, splits: dict) -> list[dict[str, object]]:
    levels = [make_scene(seed).level for seed in TEST]
    rows = []
    measured = {name: measure(model, images, method, processor=processor) for name, images in splits.items()}
    for keep in BUDGETS:
        found = {name: meet(method, images, keep) for name, images in measured.items()}
        spread = by_level([fmean(one.values()) for one in found["test"].deviations], levels)
        for source, calibration in found.items():
            threshold = calibration.compressor.tau  # type: ignore[attr-defined]
            counts = after(found["test"], threshold)
            rows.append(
                {
                    **{name: getattr(method, name) for name in ("measure", "normalize", "windows")},
                    "keep": keep,
                    "threshold_from": source,
                    "tau": threshold,
                    "tokens": f"{fmean(counts):.2f}",
                    "reached": f"{fmean(counts) / 144:.4f}",
                    "off_budget": f"{fmean(counts) / 144 / (float(keep[:-1]) / 100) - 1:+.4f}",
                    **{f"tokens_{level}": f"{value:.1f}" for level, value in by_level(counts, levels).items()},
                    **{f"deviation_{level}": f"{value:.4f}" for level, value in spread.items()},
                    **{f"images_factor_{f}": sum(count == 144 // f**2 for count in counts) for f in (1, 2, 3)},
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "dfmr-by-complexity.csv")
    args = parser.parse_args()
    model, processor = mini.load()
    splits = {"test": images(TEST, "test"), "validation": images(VALIDATION, "validation")}
    rows = [row | about() for method in METHODS for row in rows_of(method, model, processor, splits)]
    write_csv(args.out, rows)
    for row in rows:
        words = f"{row['measure']} {row['normalize']} {row['windows']}"
        levels = "  ".join(f"{level} {row[f'tokens_{level}']:>5}" for level in LEVELS)
        print(
            f"{words:<22} {row['keep']} from {row['threshold_from']:<10} tau {row['tau']:<9} {row['tokens']:>6} tokens"
            f" ({row['off_budget']})  {levels}"
        )
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
