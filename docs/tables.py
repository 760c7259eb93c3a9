"""Puts the README's table of results together from committed results: `python docs/tables.py`, or `--check` in CI.

The table stands between two comments, `<!-- results -->` and `<!-- end of results -->`. It comes from
benchmarks/results/mini-study.csv, the results.csv of the full study on mini:

    vlmzip eval --methods METHODS --keep 75%,50%,25%,11%,5.6% --batch 60 --out runs/eval/mini
    cp runs/eval/mini/results.csv benchmarks/results/mini-study.csv

with METHODS as in docs/results.md.
"""

import argparse
import csv
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->"
NOTHING = "—"
NEAR = 0.05


def study_table(rows: list[dict[str, str]]) -> list[str]:
    """Methods down, budgets across, the uncompressed model first: score in percent ± half of its 95 % interval.

    What was really kept stands beside it where that is off by more than a twentieth of the budget.
    """
    rows = [row for row in rows if row["task"] == "mini"]
    plain = next(row for row in rows if row["method"] == "no_compression")
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row is not plain))
    lines = [f"| method | {' | '.join(budgets)} |", "| --- " * (len(budgets) + 1) + "|"]
    lines.append(f"| `no_compression`, all tokens | {score(plain)} |" + " |" * (len(budgets) - 1))
    for method in dict.fromkeys(row["method"] for row in rows if row is not plain):
        by_budget = {row["budget"]: row for row in rows if row["method"] == method}
        if any(row["score"] for row in by_budget.values()):
            lines.append(f"| `{method}` | " + " | ".join(score(by_budget[budget]) for budget in budgets) + " |")
    return lines


def score(row: dict[str, str]) -> str:
    if not row["score"]:
        return NOTHING
    shown = f"{float(row['score']):.1f} ± {(float(row['high']) - float(row['low'])) / 2:.1f}"
    reached, wanted = float(row["reached"]), float(row["budget"].rstrip("%")) / 100
    return shown if abs(reached - wanted) <= NEAR * wanted else f"{shown} ({reached:.1%})"


def table(folder: Path) -> str:
    """The table as the README should have it."""
    with (folder / "mini-study.csv").open(encoding="utf-8", newline="") as file:
        return "\n".join(study_table(list(csv.DictReader(file)))) + "\n"


def replaced(text: str, new: str) -> str:
    """The text with what stands between the comments replaced. Raises `ValueError` where they are not there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"there should be one {BEGIN.strip()} and one {END} after it")
    before, rest = text.split(BEGIN)
    return before + BEGIN + new + END + rest.split(END)[1]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the README differs")
    check = parser.parse_args(arguments).check
    path = root / "README.md"
    now = path.read_text(encoding="utf-8")
    then = replaced(now, table(root / "benchmarks" / "results"))
    if not check:
        path.write_text(then, encoding="utf-8")
    elif now != then:
        difference = difflib.unified_diff(now.splitlines(), then.splitlines(), "README.md", "the results", lineterm="")
        print("\n".join(difference))
        print("README.md differs from the committed results: python docs/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
