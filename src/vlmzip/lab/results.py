"""Results: a row for each configuration, compared with the uncompressed model on the same questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlmzip import spec
from vlmzip.lab.configurations import Configuration
from vlmzip.lab.papers import MeasuredScore
from vlmzip.lab.records import Record
from vlmzip.lab.stats import Bootstrap, Estimate, estimate
from vlmzip.lab.study import Study
from vlmzip.lab.table import ABSENT, Absent, Column, Table, V
from vlmzip.lab.tasks.task import Task
from vlmzip.runtime.report import compact


@dataclass(frozen=True)
class Result:
    """The result of one configuration. Scores and shares are from 0 to 1."""

    configuration: Configuration
    records: Sequence[Record] = ()
    """In the order of the questions. Empty if not all questions were answered; then `note` says why."""
    note: str = ""
    score: Estimate | None = None
    against_plain: Estimate | None = None
    """The difference from the uncompressed model, paired."""
    shares: dict[str, Estimate] = field(default_factory=dict)
    """Further numbers of the metric, such as F1."""
    reached: float = 0.0
    """Retention ratio over all layers and questions."""
    flops: float = 0.0
    """Prefill FLOPs of the LLM, as a share of those without compression."""
    changed: Sequence[int] = ()
    """Indices of the records whose answer differs from the one without compression."""
    groups: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    """Score and number of questions by group, such as ("type", "count")."""

    @property
    def ran(self) -> bool:
        """Return whether the configuration answered all questions."""
        return self.score is not None and self.against_plain is not None

    @property
    def tokens(self) -> str:
        """Return the visual tokens at the LLM's layers, as means over all questions, in short form."""
        layers = zip(*(record["visual_tokens_by_layer"] for record in self.records), strict=True)
        return compact(round(sum(counts) / len(self.records)) for counts in layers)


def results(study: Study, task: Task, configurations: Sequence[Configuration], seed: int) -> Iterator[Result]:
    """Yield a result for each configuration of a task, the uncompressed model's first."""
    of_task = [configuration for configuration in configurations if configuration.task == task.name]
    plain = next(configuration for configuration in of_task if configuration.is_plain)
    base = study.records(task, plain)
    bootstrap = Bootstrap([record["image"] for record in base], seed)
    for configuration in of_task:
        if configuration.compressor is None:
            yield Result(configuration, note=configuration.note)
            continue
        records = base if configuration is plain else study.records(task, configuration)
        if len(records) < len(task.samples):
            reason = study.failure(configuration) or "unfinished"
            yield Result(
                configuration, note=f"{reason} ({len(records):,} of {len(task.samples):,} questions were answered)"
            )
            continue
        yield _result(task, configuration, records, base, bootstrap)


def _result(
    task: Task, configuration: Configuration, records: Sequence[Record], base: Sequence[Record], bootstrap: Bootstrap
) -> Result:
    scores, ones = bootstrap.share(_scores(records), np.ones(len(records))), np.ones(len(base))
    plain = bootstrap.share(_scores(base), ones)
    shares = {
        name: estimate(bootstrap.share(*np.array([share(r["given"], r["answers"]) for r in records]).T))
        for name, share in task.metric.shares.items()
    }
    return Result(
        configuration,
        records,
        "; ".join(filter(None, [configuration.note, _beyond_positions(records)])),
        estimate(scores),
        estimate(scores - plain),
        shares,
        reached=sum(record["retention"] for record in records) / len(records),
        flops=sum(r["prefill_flops"] for r in records) / sum(r["prefill_flops"] for r in base),
        changed=[place for place, (a, b) in enumerate(zip(records, base, strict=True)) if a["given"] != b["given"]],
        groups=_groups(records),
    )


def _beyond_positions(records: Sequence[Record]) -> str:
    """Return a note about prompts with more positions than the LLM has, or "". Older records lack this field."""
    beyond = sum(bool(record.get("beyond_positions")) for record in records)
    return f"{beyond:,} of {len(records):,} prompts took more positions than the LLM has" if beyond else ""


def difference(records: Sequence[Record], others: Sequence[Record], seed: int) -> Estimate:
    """Return the mean score of some records minus that of others to the same questions, paired."""
    bootstrap, ones = Bootstrap([record["image"] for record in records], seed), np.ones(len(records))
    return estimate(bootstrap.share(_scores(records), ones) - bootstrap.share(_scores(others), ones))


def _scores(records: Sequence[Record]) -> np.ndarray:
    return np.array([record["score"] for record in records], dtype=float)


def _groups(records: Sequence[Record]) -> dict[tuple[str, str], tuple[float, int]]:
    scores_by_group: dict[tuple[str, str], list[float]] = {}
    for record in records:
        for group in record["groups"].items():
            scores_by_group.setdefault(group, []).append(record["score"])
    return {group: (sum(scores) / len(scores), len(scores)) for group, scores in scores_by_group.items()}


def measured(result: Result, model: str) -> MeasuredScore:
    """Return a result as papers print theirs.

    The name of the task, or of its folder, stands for the paper's name of the benchmark.
    """
    configuration = result.configuration
    assert result.score is not None  # the caller has those that ran
    tokens = sum(record["visual_tokens"] * record["retention"] for record in result.records) / len(result.records)
    return MeasuredScore(
        model=model,
        method=configuration.chosen.name(),
        benchmark=Path(configuration.task.partition(":")[0]).name,
        value=100 * result.score.value,
        tokens=tokens,
        retention=result.reached,
    )


# ---------------------------------------------------------------- as text


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, score) that no cheaper or equally cheap point beats, cheapest first."""
    order = sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1]))
    front: list[int] = []
    for place in order:
        if not front or points[place][1] > points[front[-1]][1]:
            front.append(place)
    return front


#: The CSV columns with the conditions of a row, taken from the configuration's last record.
CONDITIONS = ("model", "dtype", "device", "vlmzip", "torch", "transformers", "commit")
#: Headings in a page, and on the terminal, which has no room for the tokens by layer.
COLUMNS = ("method", "budget", "reached", "visual tokens", "prefill FLOPs", "score %", "against plain", "changed")
SHORT_COLUMNS = ("method", "budget", "reached", "FLOPs", "score %", "vs plain", "changed")
Value = Callable[[Result], V | Absent | None]


def table(all_results: Sequence[Result], *, short: bool = True) -> Table[Result]:
    """Return results as rows. CSV has scores in percent, JSON from 0 to 1; `short` intervals are half their width."""
    shares = dict.fromkeys(name for result in all_results for name in result.shares)
    flops = "FLOPs" if short else "prefill FLOPs"
    groups = sorted({group for result in all_results for group in result.groups})
    columns: list[Column[Result]] = [
        Column(lambda result: result.configuration.task, key="task", csv=("task",)),
        Column(lambda result: result.configuration.budget, "budget", key="budget", csv=("budget",)),
        Column(lambda result: result.configuration.method, "method", key="method", csv=("method",)),
        _estimates(lambda result: result.score, "score %", "score", ("score", "low", "high"), short),
        _estimates(lambda result: result.against_plain, "", "against_plain", _bounds("difference"), short),
        _estimates(_unless_plain, "vs plain" if short else "against plain", "", (), short, "+"),
        *(_estimates(_share(name), name, name, _bounds(name), short) for name in shares),
        _ran(lambda result: result.reached, "reached", "{:.1%}".format, "reached", "{:.4f}".format),
        _ran(lambda result: result.tokens, "visual tokens", str, "tokens"),
        _ran(lambda result: result.flops, flops, "{:.1%}".format, "prefill_flops_share", "{:.4f}".format),
        _ran(lambda result: len(result.changed), "changed", "{:,}".format, "changed"),
        _ran(lambda result: len(result.records), key="questions"),
        *(Column(_group(group), csv=(" ".join(group),), cells=_percent) for group in groups),
        Column(_all_groups, key="groups"),
        Column(lambda result: result.note or None, key="note", csv=("note",)),
        _ran(lambda result: result.configuration.calibrated_on or None, key="calibrated_on"),
        Column(lambda result: result.configuration.settings if result.ran else ABSENT, key="compressor"),
        Column(lambda result: spec.write(result.configuration.chosen) if result.ran else ABSENT, csv=("compressor",)),
        *(Column(_condition(name), csv=(name,)) for name in CONDITIONS),
    ]
    return Table(columns, all_results, [*(SHORT_COLUMNS if short else COLUMNS), *shares])


def _ran(
    value: Value[V],
    heading: str = "",
    text: Callable[[V], str] = str,
    key: str = "",
    cell: Callable[[V], object] = lambda value: value,
) -> Column[Result]:
    """Return a column for configurations that answered all questions, with one name for JSON and CSV."""
    return Column(lambda result: value(result) if result.ran else ABSENT, heading, text, key, (key,), cell)


def _estimates(
    value: Value[Estimate], heading: str, key: str, csv: tuple[str, ...], short: bool, sign: str = ""
) -> Column[Result]:
    def text(estimate: Estimate) -> str:
        middle, low, high = (f"{100 * share:{sign}.1f}" for share in (estimate.value, estimate.low, estimate.high))
        return f"{middle} ± {100 * estimate.half:.1f}" if short else f"{middle} [{low}, {high}]"

    def cells(estimate: Estimate) -> tuple[str, ...]:
        return tuple(map(_percent, (estimate.value, estimate.low, estimate.high)))

    return Column(lambda result: value(result) if result.ran else ABSENT, heading, text, key, csv, cells)


def _unless_plain(result: Result) -> Estimate | None:
    return None if result.configuration.is_plain else result.against_plain


def _share(name: str) -> Value[Estimate]:
    return lambda result: result.shares.get(name, ABSENT)


def _group(group: tuple[str, str]) -> Value[float]:
    return lambda result: result.groups[group][0] if group in result.groups else ABSENT


def _all_groups(result: Result) -> object:
    return {f"{name} {value}": score for (name, value), (score, _) in result.groups.items()} if result.ran else ABSENT


def _condition(name: str) -> Value[str]:
    return lambda result: result.records[-1][name] if result.ran else ABSENT


def _bounds(name: str) -> tuple[str, ...]:
    return name, f"{name}_low", f"{name}_high"


def _percent(share: float) -> str:
    return f"{100 * share:.4f}"  # four decimals, so that readers do not round a rounded number
