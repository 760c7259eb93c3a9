"""Recomputes the averages that papers print from the columns that they print."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from vlmzip.lab.papers.published import Published, published

#: Whose columns a paper's averages are of, where it reprints another paper's.
COLUMNS_OF = {"mmtok": "visionzip"}
#: Which columns are averaged, where a row has more. VisionZip averages seven of LLaVA-NeXT-7B's nine and does not say
#: which: these are the only seven that give its six averages (`sets_that_fit`).
AVERAGED = {
    ("visionzip", "LLaVA-NeXT-7B"): ("GQA", "MMBench", "MME", "ScienceQA", "VQAv2", "TextVQA", "MMMU"),
    ("mmtok", "averages"): ("GQA", "MMBench", "MME", "POPE", "ScienceQA", "VQAv2", "TextVQA", "MMMU", "SEED-Bench"),
}
#: LLaVolta counts MME, whose score goes up to 2,000, in percent of that.
MME_FULL = 2000
#: Rows whose average does not follow from their columns: the papers' own mistakes.
KNOWN = {
    ("llavolta", "Table 3", "kmeans", "layer=2; retrained"): "a misprint in the average or in a column",
}


@dataclass(frozen=True)
class Average:
    """A printed average and the columns of its row."""

    row: Published
    parts: dict[str, float]
    """What each benchmark contributes, in percent."""
    error: float
    """How far rounding alone can put the printed average from `mean`."""

    @property
    def of(self) -> int:
        """Over how many benchmarks the paper averages."""
        return int(self.row.benchmark.rpartition(" ")[2])

    @property
    def mean(self) -> float:
        return sum(self.parts.values()) / len(self.parts)

    @property
    def complete(self) -> bool:
        return len(self.parts) == self.of

    @property
    def agrees(self) -> bool:
        """Whether the columns give the average, as far as rounding lets one see. Only for complete rows."""
        return abs(self.mean - self.row.value) <= self.error

    @property
    def missing(self) -> float:
        """The mean of the columns that are not here, if the printed average is right. Only for incomplete rows."""
        return (self.of * self.row.value - sum(self.parts.values())) / (self.of - len(self.parts))

    @property
    def known(self) -> str:
        """What is known about an average that does not agree, else empty."""
        row = self.row
        return KNOWN.get((row.paper, row.table, row.method, row.setting), "")


def averages(paper: str) -> list[Average]:
    """The paper's averages over a stated number of benchmarks, where at least one column of the row is here.

    Raises `UserError` for a paper of which no numbers are here.
    """
    rows = published(paper)
    columns = published(COLUMNS_OF[paper]) if paper in COLUMNS_OF else rows
    found = (_average(row, columns) for row in rows if row.benchmark.startswith("average of"))
    return [average for average in found if average is not None]


def weight(benchmark: str) -> float:
    """How many percent a unit of a benchmark's score counts in LLaVolta's averages."""
    return 100 / MME_FULL if benchmark == "MME" else 1.0


def sets_that_fit(rows: Iterable[Average]) -> list[tuple[str, ...]]:
    """Every choice of as many columns as these averages count that gives each of them within rounding.

    Takes averages with all their columns: `every_column`.
    """
    rows = list(rows)
    return [
        chosen
        for chosen in itertools.combinations(rows[0].parts, rows[0].of)
        if all(Average(a.row, {name: a.parts[name] for name in chosen}, a.error).agrees for a in rows)
    ]


def every_column(paper: str, table: str) -> list[Average]:
    """Averages of a table with all the columns that their rows have, whether the paper averages them or not."""
    rows = published(paper)
    averaged = [row for row in rows if row.table == table and row.benchmark.startswith("average of")]
    found = (_average(row, rows, choose=False) for row in averaged)
    return [average for average in found if average is not None]


def _average(row: Published, columns: list[Published], choose: bool = True) -> Average | None:
    """None where no column of the row is here, or the row is no average of scores."""
    if row.metric not in ("score", "relative score"):
        return None
    own = [c for c in columns if _same_row(c, row) and _is_column(c)]
    if choose and (chosen := AVERAGED.get((row.paper, row.table))):
        own = [c for c in own if c.benchmark in chosen]
    if not own:
        return None
    parts, errors = {}, []
    for column in own:
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
    """What a column contributes, in percent, and how far rounding may have moved it."""
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
