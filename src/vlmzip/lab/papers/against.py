"""Compare measured numbers with published ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlmzip.errors import UserError
from vlmzip.lab.papers.published import Published, published
from vlmzip.lab.table import Column, Table

#: Budgets that differ by at most this fraction count as equal: 11 % of 576 tokens is 63, the papers have 64.
SAME_BUDGET = 0.02
#: Names of models in the papers, by checkpoint name without organisation and without an ending as in `FORMAT`.
MODELS = {"llavav16vicuna7b": "llavanext7b", "llavav16vicuna13b": "llavanext13b", "videollava7b": "videollava"}
FORMAT = re.compile(r"(-hf|-instruct)+$")
#: Names of benchmarks, by their usual abbreviations.
BENCHMARKS = {
    "sqa": "scienceqa",
    "mmb": "mmbench",
    "mmbcn": "mmbenchcn",
    "seed": "seedbench",
    "seedi": "seedimage",
    "llavaw": "llavabench",
    "llavabenchinthewild": "llavabench",
}


@dataclass(frozen=True)
class MeasuredScore:
    """A score that you have measured. Raise `UserError` if the budget is missing or invalid."""

    model: str
    """The papers' name of the model, or the checkpoint: `LLaVA-1.5-7B`, `llava-hf/llava-1.5-7b-hf`."""
    method: str
    benchmark: str
    value: float
    """The score in the paper's unit, such as percent instead of a fraction."""
    tokens: float | None = None
    """Visual tokens per image, averaged over the LLM's layers. Give this or `retention`."""
    retention: float | None = None
    """The fraction of the visual tokens that remains, in (0, 1]."""
    metric: str = "score"

    def __post_init__(self) -> None:
        if self.tokens is None and self.retention is None:
            raise UserError(f"{self.method} on {self.benchmark}: give the tokens that it kept, or the retention")
        if self.retention is not None and not 0 < self.retention <= 1:
            raise UserError(f"retention must be in (0, 1], got {self.retention!r}; write 0.25 for a quarter")


@dataclass(frozen=True)
class PaperComparison:
    """A measured number with a published one, or with the reason why there is none."""

    measured: MeasuredScore
    published: Published | None = None
    reason: str = ""

    @property
    def difference(self) -> float | None:
        """Return measured minus published score in the paper's unit, or `None` without a published number."""
        return None if self.published is None else self.measured.value - self.published.value


def against(paper: str, measured: Iterable[MeasuredScore]) -> list[PaperComparison]:
    """Compare each measured number with every published one for its model, method, budget and benchmark.

    Several published numbers can differ in setting (tuned or not) or source; numbers measured by others come last. A
    measured number without a published one is listed with the reason. Averages are only compared with averages over the
    same number of benchmarks, such as "average of 11". Raise `UserError` for a paper without published numbers here.
    """
    rows = published(paper)
    return [comparison for mine in measured for comparison in _compared(mine, rows)]


def show(comparisons: Sequence[PaperComparison], markdown: bool = False) -> str:
    """Return a table of published and measured numbers, followed by the measured ones without a published number."""
    matched = [comparison for comparison in comparisons if comparison.published is not None]
    table = Table(COLUMNS, matched)
    lines = (table.markdown() if markdown else table.text()).splitlines() if matched else []
    if unmatched := [comparison for comparison in comparisons if comparison.published is None]:
        lines += [*([""] if matched else []), "Without a published number:", *([""] if markdown else [])]
        lines += [f"- {_named(comparison.measured)}: {comparison.reason}" for comparison in unmatched]
    return "\n".join(lines)


def _compared(mine: MeasuredScore, rows: Sequence[Published]) -> list[PaperComparison]:
    """Compare one number. Filter the rows step by step; the step that leaves no row gives the reason."""
    full = _full_count(rows, mine.model)
    paper = rows[0].paper
    rows = [row for row in rows if row.metric == mine.metric]
    for what, matches in (
        ("model", lambda row: _model(row.model) == _model(mine.model)),
        ("method", lambda row: _plain(row.method) == _plain(mine.method)),
        ("benchmark", lambda row: _benchmark(row.benchmark) == _benchmark(mine.benchmark)),
        ("keep", lambda row: _same_budget(row.keep, mine, full)),
    ):
        there = list(dict.fromkeys(getattr(row, what) or "not stated" for row in rows))
        rows = [row for row in rows if matches(row)]
        if not rows:
            what = "budget" if what == "keep" else what
            listed = f"; it has {', '.join(there)}" if there else ""
            return [PaperComparison(mine, reason=f"{paper} has no {mine.metric} for this {what}{listed}")]
    own_first = sorted(rows, key=lambda row: row.certainty == "measured by others")
    return [PaperComparison(mine, row) for row in own_first]


def _same_budget(keep: str, mine: MeasuredScore, full: float | None) -> bool:
    """Return whether a printed budget, a count or a percentage, equals the measured one."""
    if not keep:
        return False
    if keep.endswith("%"):
        kept = mine.retention if mine.retention is not None or not full or mine.tokens is None else mine.tokens / full
        printed, least = float(keep[:-1]) / 100, 0.0
    else:
        kept = mine.tokens if mine.tokens is not None or not full or mine.retention is None else mine.retention * full
        printed, least = float(keep), 0.5
    return kept is not None and abs(kept - printed) <= max(SAME_BUDGET * printed, least)


def _full_count(rows: Iterable[Published], model: str) -> float | None:
    """Return the visual tokens of the uncompressed model, or `None` if the paper does not state them."""
    for row in rows:
        if not row.compressed and _model(row.model) == _model(model) and row.keep and not row.keep.endswith("%"):
            return float(row.keep)
    return None


def _model(name: str) -> str:
    plain = _plain(FORMAT.sub("", name.rpartition("/")[2].lower()))
    return MODELS.get(plain, plain)


def _benchmark(name: str) -> str:
    return BENCHMARKS.get(_plain(name), _plain(name))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _printed(name: str) -> Column[PaperComparison]:
    """Return a column with a field of the published number."""
    return Column(lambda comparison: getattr(comparison.published, name), "tokens" if name == "keep" else name)


def _paper(comparison: PaperComparison) -> str:
    assert comparison.published is not None  # `show` lists the others below the table
    return f"{comparison.published.value:.{comparison.published.decimals}f}"


def _mine(comparison: PaperComparison) -> str:
    return f"{comparison.measured.value:.{_places(comparison)}f}"


def _difference(comparison: PaperComparison) -> str:
    return f"{comparison.difference:+.{_places(comparison)}f}"


def _places(comparison: PaperComparison) -> int:
    """Return the decimals of a measured number: those of the paper, but at least 1."""
    return max(comparison.published.decimals if comparison.published else 0, 1)


def _source(comparison: PaperComparison) -> str:
    row = comparison.published
    assert row is not None
    return f"{row.source} ({'; '.join(filter(None, (row.certainty, row.note)))})"


#: The table of comparisons that have a published number.
COLUMNS: list[Column[PaperComparison]] = [
    *map(_printed, ("model", "method", "setting", "keep", "benchmark")),
    Column(_paper, "paper"),
    Column(_mine, "measured"),
    Column(_difference, "difference"),
    Column(_source, "source"),
]


def _named(mine: MeasuredScore) -> str:
    budget = f"{mine.tokens:g} tokens" if mine.tokens is not None else f"{mine.retention:.1%}"
    return f"{mine.model}, {mine.method}, {budget}, {mine.benchmark} = {mine.value:g}"
