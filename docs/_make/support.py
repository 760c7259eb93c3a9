"""Write docs/support.md from the test results in each version of transformers: `make support`."""

import json
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "support.md"
#: Several tests can prove one cell; the worst result counts.
WORST = ["works", "plain model fails", "refused", "not run", "fails"]

HEAD = """# What works

Look up here whether a feature works with your model and your transformers. `make support` writes this page from runs of
`tests/runtime/test_promises.py`, whose tests prove each cell on tiny models with random weights, on a CPU
({versions}).

- *works*: in every listed version, unless the cell names versions. The tests' compressors act before the LLM. Inside
  it, static caches, chunked prefill, prompt lookup and LLMs with sliding-window, linear-attention or convolution layers
  are refused.
- *refused*: a `UserError` says in one sentence why, and what to do instead.
- *plain model fails*: transformers itself cannot do this here, with or without vlmzip.
  [What may surprise](surprises.md) lists more such cases.
"""


def table(runs: list[dict]) -> list[str]:
    """Return the lines of the table. A cell names the versions if their results differ."""
    newest = runs[-1]["cells"]
    families = list(dict.fromkeys(family for row in newest.values() for family in row))
    lines = ["| | " + " | ".join(families) + " |", "| --- " * (len(families) + 1) + "|"]
    for promise in newest:
        cells = [cell([(run["transformers"], found(run, promise, family)) for run in runs]) for family in families]
        lines.append(f"| {promise} | " + " | ".join(cells) + " |")
    return lines


def found(run: dict, promise: str, family: str) -> str:
    return max(run["cells"].get(promise, {}).get(family, ["not run"]), key=WORST.index)


def cell(by_version: list[tuple[str, str]]) -> str:
    """Return the result, with the versions if results differ, the newest first."""
    versions: dict[str, list[str]] = {}
    for version, word in reversed(by_version):
        versions.setdefault(word, []).append(version)
    if len(versions) == 1:
        return by_version[-1][1]
    return "; ".join(f"{', '.join(those)}: {word}" for word, those in versions.items())


def counts(run: dict, promises: list[str]) -> str:
    """Return the number of cells of each kind, in one version."""
    families = {family for row in run["cells"].values() for family in row}
    count = Counter(found(run, promise, family) for promise in promises for family in families)
    return f"transformers {run['transformers']}: " + ", ".join(f"{count[word]} {word}" for word in WORST if count[word])


def main(paths: list[str]) -> int:
    """Write the page. Return the exit code: 1 if a cell fails in any version."""
    runs = [json.loads(Path(path).read_text()) for path in paths]
    runs.sort(key=lambda run: [int(part) for part in run["transformers"].split(".")[:3] if part.isdigit()])
    versions = "; ".join(
        f"torch {torch} with transformers {', '.join(run['transformers'] for run in those)}"
        for torch, those in groupby(reversed(runs), lambda run: run["torch"])
    )
    totals = "".join(f"\n- {counts(run, list(runs[-1]['cells']))}" for run in reversed(runs))
    text = [HEAD.format(versions=versions), *table(runs), "", f"Cells:\n{totals}"]
    PAGE.write_text("\n".join(text) + "\n")
    return int(any("fails" in words for run in runs for row in run["cells"].values() for words in row.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
