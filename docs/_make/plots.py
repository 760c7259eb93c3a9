"""Draw the plots of docs/studies.md and docs/results.md from the committed CSV files: `make figures`."""

import csv
import re
from argparse import Namespace
from pathlib import Path

from vlmzip.lab.analyses import NAMES, find
from vlmzip.lab.curves import COSTS, TITLES, draw_curve, plot_title
from vlmzip.lab.tasks.catalogue import read_one_task

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
#: Scores and the bounds of their intervals are in percent there.
PERCENT = 100


def main() -> None:
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    for name in NAMES:
        (limit,) = re.findall(rf"^    vlmzip study {name} --limit (\d+)$", page, flags=re.M)
        rows = read(RESULTS / "study" / f"{name}.csv")
        analysis, task = find(name), read_one_task(rows[0]["task"], int(limit), None)
        title = plot_title(analysis.TITLE, rows[0]["model"], task)
        analysis.draw(rows, title).savefig(FIGURES / "study" / f"{name}.png")
    rows = read(RESULTS / "mini-study.csv")
    task = read_one_task("mini", None, None)
    for cost in COSTS:
        draw_curve(
            [result(row) for row in rows if row["task"] == "mini"], cost, plot_title(TITLES[cost], "mini", task)
        ).savefig(FIGURES / f"mini_{cost}.png")


def read(path: Path) -> list[dict]:
    """Return the rows of a CSV file, with numbers as numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: number(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def number(cell: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def result(row: dict) -> Namespace:
    """Return what `draw_curve` reads of a result."""
    ran = row["score"] != ""
    value, low, high = (row[name] / PERCENT if ran else None for name in ("score", "low", "high"))
    return Namespace(
        configuration=Namespace(method=row["method"]),
        score=Namespace(value=value, low=low, high=high) if ran else None,
        reached=row["reached"],
        flops=row["prefill_flops_share"],
    )


if __name__ == "__main__":
    main()
