"""Recompute the averages in the papers' tables from the tables' columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from vlmzip.lab.papers.published import Published, published

#: For papers that reprint another paper's numbers: the paper with the columns of their averages.
COLUMNS_OF = {"mmtok": "visionzip"}
#: The averaged columns of rows that have more columns. VisionZip averages seven of LLaVA-NeXT-7B's nine columns and
#: does not say which; only these seven give its six averages (`sets_that_fit`).
AVERAGED = {
    ("visionzip", "LLaVA-NeXT-7B"): ("GQA", "MMBench", "MME", "ScienceQA", "VQAv2", "TextVQA", "MMMU"),
    ("mmtok", "averages"): ("GQA", "MMBench", "MME", "POPE", "ScienceQA", "VQAv2", "TextVQA", "MMMU", "SEED-Bench"),
}
#: LLaVolta's averages have MME in percent of its largest score.
MME_FULL = 2000
#: Rows whose average does not follow from their columns, because of a mistake in the paper.
KNOWN = {
    ("llavolta", "Table 3", "kmeans", "layer=2; retrained"): "a misprint in the average or in a column",
}


@dataclass(frozen=True)
class Average:
    """A printed average and the columns of its row."""

    row: Published
    parts: dict[str, float]
    """The contribution of each benchmark, in percent."""
    error: float
    """The largest difference between the printed average and `mean` that rounding can cause."""

    @property
    def of(self) -> int:
        """Return the number of benchmarks in the paper's average."""
        return int(self.row.benchmark.rpartition(" ")[2])

    @property
    def mean(self) -> float:
        return sum(self.parts.values()) / len(self.parts)

    @property
    def complete(self) -> bool:
        return len(self.parts) == self.of

    @property
    def agrees(self) -> bool:
        """Return whether the columns give the printed average within rounding. Only for complete rows."""
        return abs(self.mean - self.row.value) <= self.error

    @property
    def missing(self) -> float:
        """Return the mean of the missing columns, assuming the printed average is right. Only for incomplete rows."""
        return (self.of * self.row.value - sum(self.parts.values())) / (self.of - len(self.parts))

    @property
    def known(self) -> str:
        """Return the known reason why the average does not agree, or ""."""
        row = self.row
        return KNOWN.get((row.paper, row.table, row.method, row.setting), "")


def averages(paper: str) -> list[Average]:
    """Return the paper's averages over a stated number of benchmarks that have at least one column here.

    Raise `UserError` for a paper without published numbers here.
    """
    rows = published(paper)
    columns = published(COLUMNS_OF[paper]) if paper in COLUMNS_OF else rows
    candidates = (_average(row, columns) for row in rows if row.benchmark.startswith("average of"))
    return [average for average in candidates if average is not None]


def weight(benchmark: str) -> float:
    """Return the percent points that one unit of a benchmark's score contributes to LLaVolta's averages."""
    return 100 / MME_FULL if benchmark == "MME" else 1.0


def sets_that_fit(rows: Iterable[Average]) -> list[tuple[str, ...]]:
    """Return every set of columns that gives all of these averages within rounding.

    A set has as many columns as the paper averages. The averages must have all columns of their rows; see
    `every_column`.
    """
    rows = list(rows)
    return [
        chosen
        for chosen in itertools.combinations(rows[0].parts, rows[0].of)
        if all(Average(a.row, {name: a.parts[name] for name in chosen}, a.error).agrees for a in rows)
    ]


def every_column(paper: str, table: str) -> list[Average]:
    """Return the averages of a table with all columns of their rows, whether the paper averages them or not."""
    rows = published(paper)
    averaged = [row for row in rows if row.table == table and row.benchmark.startswith("average of")]
    candidates = (_average(row, rows, choose=False) for row in averaged)
    return [average for average in candidates if average is not None]


def _average(row: Published, columns: list[Published], choose: bool = True) -> Average | None:
    """Return the average of a row. Return `None` if it has no columns here, or is not an average of scores."""
    if row.metric not in ("score", "relative score"):
        return None
    row_columns = [c for c in columns if _same_row(c, row) and _is_column(c)]
    if choose and (chosen := AVERAGED.get((row.paper, row.table))):
        row_columns = [c for c in row_columns if c.benchmark in chosen]
    if not row_columns:
        return None
    parts, errors = {}, []
    for column in row_columns:
        parts[column.benchmark], error = _part(column, row, columns)
        errors.append(error)
    return Average(row, parts, sum(errors) / len(errors) + row.half_unit)


def _same_row(column: Published, row: Published) -> bool:
    same_table = column.paper != row.paper or column.table == row.table
    return same_table and all(
        getattr(column, name) == getattr(row, name) for name in ("model", "method", "setting", "keep")
    )


def _is_column(row: Published) -> bool:
    return row.metric == "score" and not row.benchmark.startswith("average") and row.certainty != "unconfirmed"


def _part(column: Published, row: Published, columns: list[Published]) -> tuple[float, float]:
    """Return a column's contribution to the average and its largest rounding error, both in percent."""
    if row.metric == "score":
        scale = weight(column.benchmark)
        return scale * column.value, scale * column.half_unit
    base = next(
        c
        for c in columns
        if not c.compressed
        and (c.table, c.model, c.benchmark) == (column.table, column.model, column.benchmark)
        and _is_column(c)
    )
    share = 100 * column.value / base.value
    return share, (100 * column.half_unit + share * base.half_unit) / base.value
