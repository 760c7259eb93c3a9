"""Results of a suite as rows: each benchmark with the uncompressed model's score, and the paper's average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmzip.files import write_csv
from vlmzip.lab.configurations import Configuration
from vlmzip.lab.lmms.suites import GUESSES, Benchmark, Suite, has_judge
from vlmzip.lab.papers import MeasuredScore


@dataclass(frozen=True)
class ScoreRow:
    """A benchmark under a configuration."""

    benchmark: Benchmark
    score: float | None = None
    """The score in the papers' unit: percent, or MME's points."""
    plain: float | None = None
    """The uncompressed model's score."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """The content of the result file."""
    note: str = ""

    @property
    def difference(self) -> float | None:
        return None if self.score is None or self.plain is None else self.score - self.plain

    @property
    def relative(self) -> float | None:
        """Return the score as a share of the uncompressed model's, in percent."""
        return None if self.score is None or not self.plain else 100 * self.score / self.plain


@dataclass(frozen=True)
class Column:
    """A configuration with all its benchmarks."""

    configuration: Configuration
    rows: Sequence[ScoreRow] = ()
    """Empty if the configuration cannot run; then its note says why."""
    average: float | None = None
    plain_average: float | None = None

    @property
    def averaged(self) -> int:
        """Return the number of benchmarks in the average."""
        return sum(row.score is not None for row in self.rows)


Look = Callable[[Benchmark, Configuration], Mapping[str, Any] | None]


def columns(
    suite: Suite, configurations: Sequence[Configuration], look: Look, left_out: Callable[[Benchmark], str]
) -> list[Column]:
    """Return a column for each configuration, the uncompressed model's first.

    `look` returns a result; `left_out` returns why a benchmark was not run.
    """
    plain = {one.name: _score(one, look(one, configurations[0])) for one in suite.benchmarks if not left_out(one)}
    return [_column(suite, one, look, left_out, plain) for one in configurations]


def _score(benchmark: Benchmark, found: Mapping[str, Any] | None) -> float | None:
    return None if found is None else benchmark.score(found["results"])


def _column(
    suite: Suite,
    one: Configuration,
    look: Look,
    left_out: Callable[[Benchmark], str],
    plain: Mapping[str, float | None],
) -> Column:
    if one.compressor is None:
        return Column(one)
    rows = []
    for benchmark in suite.benchmarks:
        reason = left_out(benchmark)
        found = None if reason else look(benchmark, one)
        score = _score(benchmark, found)
        rows.append(
            ScoreRow(benchmark, score, plain.get(benchmark.name), found or {}, reason or _note(benchmark, found))
        )
    scores = {row.benchmark.name: row.score for row in rows if row.score is not None}
    base = {name: score for name, score in plain.items() if score is not None and name in scores}
    return Column(one, rows, suite.mean(scores, base), suite.mean(base, base))


def _note(benchmark: Benchmark, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not run yet"
    if benchmark.score(found["results"]) is None:
        wanted = " and ".join(benchmark.metrics) or "number"
        return f"lmms-eval gave no {wanted}; with --limit, there may be no question of that kind"
    guessed = GUESSES if benchmark.judge == "sometimes" and not has_judge() else ""
    return "; ".join(filter(None, [benchmark.note, guessed]))


def measured(suite: Suite, column: Column, model: str) -> list[MeasuredScore]:
    """Return a column as papers print it: each benchmark, and the suite's average."""
    if column.configuration.compressor is None:
        return []
    method = column.configuration.compressor.name()
    ran = [row for row in column.rows if row.score is not None and row.found.get("retention") is not None]
    found = [MeasuredScore(model, method, row.benchmark.name, row.score or 0.0, *_kept([row])) for row in ran]
    if column.average is not None and ran:
        metric = "relative score" if suite.average == "relative scores" else "score"
        name = f"average of {column.averaged}"
        found.append(MeasuredScore(model, method, name, column.average, *_kept(ran), metric=metric))
    return found


def _kept(rows: Sequence[ScoreRow]) -> tuple[float, float]:
    """Return the number of visual tokens kept per question and their share, as means over benchmarks."""
    shares = [row.found["retention"] for row in rows]
    tokens = [row.found["visual_tokens"] * row.found["retention"] for row in rows]
    return sum(tokens) / len(rows), sum(shares) / len(rows)


def write_table(path: Path, suite: Suite, found: Sequence[Column]) -> None:
    """Write a CSV row for each benchmark under each configuration, then the averages. Missing values are empty."""
    rows = [line for column in found for line in lines(suite, column)]
    names = dict.fromkeys(name for row in rows for name in row)
    write_csv(path, [{name: _cell(row.get(name)) for name in names} for row in rows])


def _cell(value: object) -> object:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else value


def lines(suite: Suite, column: Column) -> list[dict[str, Any]]:
    """Return a column as rows of a table, one for each benchmark and one for the average."""
    one = column.configuration
    head = {"suite": suite.name, "method": one.method, "budget": one.budget}
    if one.compressor is None:
        return [head | {"note": one.note}]
    out = []
    for row in column.rows:
        found = row.found
        out.append(
            head
            | {"benchmark": row.benchmark.name, "task": row.benchmark.task, "score": row.score, "plain": row.plain}
            | {"difference": row.difference, "relative": row.relative}
            | {name: found.get(name) for name in ("questions", "visual_tokens", "retention")}
            | {"note": "; ".join(filter(None, [one.note, row.note])), "compressor": found.get("method")}
            | {name: found.get(name) for name in ("model", "dtype", "device", "vlmzip", "lmms_eval", "commit")}
        )
    if column.average is not None:
        average = {"score": column.average, "plain": column.plain_average}
        average["difference"] = column.average - (column.plain_average or 0.0)
        out.append(head | {"benchmark": f"average of {column.averaged}"} | average)
    return out
