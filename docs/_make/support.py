"""Writes docs/support.md from what the tests found in each version of transformers: `make support`."""

import json
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "support.md"
#: Several tests can prove one cell; the worst of them counts.
WORST = ["works", "plain model fails", "refused", "not run", "fails"]

HEAD = """# What works

Written by `make support` from runs of `tests/runtime/test_promises.py`, whose tests prove each cell on tiny models with
random weights, on a CPU ({versions}).

- *works*: as the row says, in every version of the list, unless the cell names versions. The tests' compressors act
  before the LLM; inside it static caches, chunked prefill, prompt lookup and LLMs with sliding-window layers are
  refused.
- *refused*: a `UserError` says in one sentence why not and what to do.
- *plain model fails*: transformers itself cannot do this here, with or without vlmzip. There are more such cases
  than the table has rows: [what may surprise](using.md#what-may-surprise).
"""


def table(runs: list[dict]) -> list[str]:
    """The lines of the table: a cell says in which version it differs from the newest."""
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
    """What was found, with the versions if they differ, the newest first."""
    versions: dict[str, list[str]] = {}
    for version, word in reversed(by_version):
        versions.setdefault(word, []).append(version)
    if len(versions) == 1:
        return by_version[-1][1]
    return "; ".join(f"{', '.join(those)}: {word}" for word, those in versions.items())


def counts(run: dict, promises: list[str]) -> str:
    """How many cells there are of each kind, in one version."""
    families = {family for row in run["cells"].values() for family in row}
    count = Counter(found(run, promise, family) for promise in promises for family in families)
    return f"transformers {run['transformers']}: " + ", ".join(f"{count[word]} {word}" for word in WORST if count[word])


def main(paths: list[str]) -> int:
    """Writes the page. Returns the exit code: 1 if a cell fails in any version."""
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
