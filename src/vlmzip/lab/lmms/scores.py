"""Results of a suite as rows: each benchmark with the uncompressed model's score, and the paper's average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vlmzip.lab.configurations import Configuration
from vlmzip.lab.lmms.run import StoredResult
from vlmzip.lab.lmms.suites import GUESSES, Benchmark, Suite, has_judge
from vlmzip.lab.papers import MeasuredScore
from vlmzip.lab.table import ABSENT, Absent, Column, Table, V


@dataclass(frozen=True)
class ScoreRow:
    """A benchmark under a configuration."""

    benchmark: Benchmark
    score: float | None = None
    """The score in the papers' unit: percent, or MME's points."""
    plain: float | None = None
    """The uncompressed model's score."""
    result: StoredResult = field(default_factory=StoredResult)
    """The content of the result file."""
    note: str = ""

    @property
    def difference(self) -> float | None:
        return _difference(self.score, self.plain)

    @property
    def relative(self) -> float | None:
        """Return the score as a share of the uncompressed model's, in percent."""
        return None if self.score is None or not self.plain else 100 * self.score / self.plain


@dataclass(frozen=True)
class ConfigurationScores:
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


Look = Callable[[Benchmark, Configuration], StoredResult | None]


def suite_scores(
    suite: Suite, configurations: Sequence[Configuration], look: Look, left_out: Callable[[Benchmark], str]
) -> list[ConfigurationScores]:
    """Return the scores of each configuration, the uncompressed model's first.

    `look` returns a result; `left_out` returns why a benchmark was not run.
    """
    plain = {
        benchmark.name: _score(benchmark, look(benchmark, configurations[0]))
        for benchmark in suite.benchmarks
        if not left_out(benchmark)
    }
    return [_scores(suite, configuration, look, left_out, plain) for configuration in configurations]


def _difference(score: float | None, plain: float | None) -> float | None:
    return None if score is None or plain is None else score - plain


def _score(benchmark: Benchmark, result: StoredResult | None) -> float | None:
    return None if result is None else benchmark.score(result["results"])


def _scores(
    suite: Suite,
    configuration: Configuration,
    look: Look,
    left_out: Callable[[Benchmark], str],
    plain: Mapping[str, float | None],
) -> ConfigurationScores:
    if configuration.compressor is None:
        return ConfigurationScores(configuration)
    rows = []
    for benchmark in suite.benchmarks:
        reason = left_out(benchmark)
        result = None if reason else look(benchmark, configuration)
        score = _score(benchmark, result)
        note = reason or _note(benchmark, result)
        rows.append(ScoreRow(benchmark, score, plain.get(benchmark.name), result or {}, note))
    scores = {row.benchmark.name: row.score for row in rows if row.score is not None}
    base = {name: score for name, score in plain.items() if score is not None and name in scores}
    return ConfigurationScores(configuration, rows, suite.mean(scores, base), suite.mean(base, base))


def _note(benchmark: Benchmark, result: StoredResult | None) -> str:
    if result is None:
        return "not run yet"
    if benchmark.score(result["results"]) is None:
        metric = " and ".join(benchmark.metrics) or "number"
        return f"lmms-eval gave no {metric}; with --limit, there may be no question of that kind"
    guessed = GUESSES if benchmark.judge == "sometimes" and not has_judge() else ""
    return "; ".join(filter(None, [benchmark.note, guessed]))


def measured(suite: Suite, scores: ConfigurationScores, model: str) -> list[MeasuredScore]:
    """Return scores as papers print them: each benchmark, and the suite's average."""
    if scores.configuration.compressor is None:
        return []
    method = scores.configuration.compressor.name()
    ran = [row for row in scores.rows if row.score is not None and row.result.get("retention") is not None]
    printed = [MeasuredScore(model, method, row.benchmark.name, row.score or 0.0, *_kept([row])) for row in ran]
    if scores.average is not None and ran:
        metric = "relative score" if suite.average == "relative scores" else "score"
        name = f"average of {scores.averaged}"
        printed.append(MeasuredScore(model, method, name, scores.average, *_kept(ran), metric=metric))
    return printed


def _kept(rows: Sequence[ScoreRow]) -> tuple[float, float]:
    """Return the number of visual tokens kept per question and their share, as means over benchmarks."""
    shares = [row.result["retention"] for row in rows]
    tokens = [row.result["visual_tokens"] * row.result["retention"] for row in rows]
    return sum(tokens) / len(rows), sum(shares) / len(rows)


# ---------------------------------------------------------------- as rows

#: Keys of the result file that are columns, before and after the note.
COUNTS = ("questions", "visual_tokens", "retention")
CONDITIONS = ("model", "dtype", "device", "vlmzip", "lmms_eval", "commit")


@dataclass(frozen=True)
class SuiteRow:
    """A row of the table: a benchmark, the average, or a configuration that cannot run."""

    configuration: Configuration
    name: str = ""
    """The benchmark, or "average of 11". Empty if the configuration cannot run."""
    score: float | None = None
    plain: float | None = None
    benchmark: ScoreRow | None = None
    """`None` unless the row is a benchmark's."""

    @property
    def note(self) -> str:
        return "; ".join(filter(None, [self.configuration.note, self.benchmark.note if self.benchmark else ""]))


def table(suite: Suite, scores: Sequence[ConfigurationScores]) -> Table[SuiteRow]:
    """Return a row for each benchmark under each configuration, followed by the configuration's average."""
    columns: list[Column[SuiteRow]] = [
        _column("suite", lambda row: suite.name),
        _column("method", lambda row: row.configuration.method),
        _column("budget", lambda row: row.configuration.budget),
        _column("benchmark", lambda row: row.name or ABSENT, "benchmark"),
        _of_benchmark("task", lambda row: row.benchmark.task),
        _column("score", lambda row: row.score if row.name else ABSENT, "score", _show),
        _column("plain", lambda row: row.plain if row.name else ABSENT, "plain", _show),
        _column(
            "difference", lambda row: _difference(row.score, row.plain) if row.name else ABSENT, "difference", _signed
        ),
        _of_benchmark("relative", lambda row: row.relative),
        *map(_of_result, COUNTS),
        _column("note", lambda row: ABSENT if row.name and not row.benchmark else row.note),
        _of_benchmark("compressor", lambda row: row.result.get("method")),
        *map(_of_result, CONDITIONS),
    ]
    rows = [row for of_one in scores for row in _rows(of_one)]
    return Table(columns, rows, ["benchmark", "score", "plain", "difference", "tokens kept"])


def _rows(scores: ConfigurationScores) -> list[SuiteRow]:
    configuration = scores.configuration
    if configuration.compressor is None:
        return [SuiteRow(configuration)]
    rows = [SuiteRow(configuration, row.benchmark.name, row.score, row.plain, row) for row in scores.rows]
    if scores.average is not None:
        rows.append(SuiteRow(configuration, f"average of {scores.averaged}", scores.average, scores.plain_average))
    return rows


def _column(
    name: str, value: Callable[[SuiteRow], V | Absent | None], heading: str = "", text: Callable[[V], str] = str
) -> Column[SuiteRow]:
    """Return a column with one name for JSON and CSV."""
    return Column(value, heading, text, name, (name,), _cell)


def _of_benchmark(
    name: str, value: Callable[[ScoreRow], V | Absent | None], heading: str = "", text: Callable[[V], str] = str
) -> Column[SuiteRow]:
    """Return a column that only benchmarks have."""
    return _column(name, lambda row: value(row.benchmark) if row.benchmark else ABSENT, heading, text)


def _of_result(name: str) -> Column[SuiteRow]:
    """Return a column with a value of the result file."""
    heading = "tokens kept" if name == "retention" else ""
    return _of_benchmark(name, lambda row: row.result.get(name), heading, "{:.1%}".format)


def _cell(value: object) -> object:
    return f"{value:.4f}" if isinstance(value, float) else value


def _show(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 2 else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.1f}" if abs(value) >= 2 else f"{value:+.3f}"
