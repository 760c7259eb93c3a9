"""Records summed up: a row for each configuration, beside the uncompressed model on the same questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlmzip import spec
from vlmzip.files import write_csv
from vlmzip.lab.configurations import Configuration
from vlmzip.lab.papers import MeasuredScore
from vlmzip.lab.records import Record
from vlmzip.lab.stats import Bootstrap, Estimate, estimate
from vlmzip.lab.study import Study
from vlmzip.lab.tasks.task import Task
from vlmzip.runtime.report import compact


@dataclass(frozen=True)
class Result:
    """What came of one configuration. Scores and shares are from 0 to 1."""

    configuration: Configuration
    records: Sequence[Record] = ()
    """In the order of the questions; none where it could not run to its end, and then `note` says why."""
    note: str = ""
    score: Estimate | None = None
    against_plain: Estimate | None = None
    """The difference from the uncompressed model, paired."""
    shares: dict[str, Estimate] = field(default_factory=dict)
    """What the metric has beside the score, such as F1."""
    reached: float = 0.0
    """Retention ratio over all layers and questions."""
    flops: float = 0.0
    """Prefill FLOPs of the LLM, as a share of what it takes without compression."""
    changed: Sequence[int] = ()
    """Places of the records whose answer is another one than without compression."""
    groups: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    """Score and number of questions by group, such as ("type", "count")."""

    @property
    def tokens(self) -> str:
        """Visual tokens at the layers of the LLM, the mean over all questions, in few words."""
        layers = zip(*(record["visual_tokens_by_layer"] for record in self.records), strict=True)
        return compact(round(sum(counts) / len(self.records)) for counts in layers)


def results(study: Study, task: Task, configurations: Sequence[Configuration], seed: int) -> Iterator[Result]:
    """A result for each configuration of a task, the uncompressed model's first."""
    mine = [one for one in configurations if one.task == task.name]
    plain = next(one for one in mine if one.is_plain)
    base = study.records(task, plain)
    bootstrap = Bootstrap([record["image"] for record in base], seed)
    for one in mine:
        if one.compressor is None:
            yield Result(one, note=one.note)
            continue
        records = base if one is plain else study.records(task, one)
        if len(records) < len(task.samples):
            reason = study.failure(one) or "unfinished"
            yield Result(one, note=f"{reason} ({len(records):,} of {len(task.samples):,} questions were answered)")
            continue
        yield _result(task, one, records, base, bootstrap)


def _result(
    task: Task, one: Configuration, records: Sequence[Record], base: Sequence[Record], bootstrap: Bootstrap
) -> Result:
    scores, ones = bootstrap.share(_scores(records), np.ones(len(records))), np.ones(len(base))
    plain = bootstrap.share(_scores(base), ones)
    shares = {
        name: estimate(bootstrap.share(*np.array([share(r["given"], r["answers"]) for r in records]).T))
        for name, share in task.metric.shares.items()
    }
    return Result(
        one,
        records,
        "; ".join(filter(None, [one.note, _beyond_positions(records)])),
        estimate(scores),
        estimate(scores - plain),
        shares,
        reached=sum(record["retention"] for record in records) / len(records),
        flops=sum(r["prefill_flops"] for r in records) / sum(r["prefill_flops"] for r in base),
        changed=[place for place, (a, b) in enumerate(zip(records, base, strict=True)) if a["given"] != b["given"]],
        groups=_groups(records),
    )


def _beyond_positions(records: Sequence[Record]) -> str:
    """What to say about prompts that took more positions than the LLM has; older records do not tell."""
    beyond = sum(bool(record.get("beyond_positions")) for record in records)
    return f"{beyond:,} of {len(records):,} prompts took more positions than the LLM has" if beyond else ""


def difference(records: Sequence[Record], others: Sequence[Record], seed: int) -> Estimate:
    """The mean score of some records minus that of others, which answer the same questions: paired."""
    bootstrap, ones = Bootstrap([record["image"] for record in records], seed), np.ones(len(records))
    return estimate(bootstrap.share(_scores(records), ones) - bootstrap.share(_scores(others), ones))


def _scores(records: Sequence[Record]) -> np.ndarray:
    return np.array([record["score"] for record in records], dtype=float)


def _groups(records: Sequence[Record]) -> dict[tuple[str, str], tuple[float, int]]:
    found: dict[tuple[str, str], list[float]] = {}
    for record in records:
        for group in record["groups"].items():
            found.setdefault(group, []).append(record["score"])
    return {group: (sum(scores) / len(scores), len(scores)) for group, scores in found.items()}


def measured(result: Result, model: str) -> MeasuredScore:
    """A result as papers print theirs; what the papers call the benchmark is the task's name or its folder's."""
    one = result.configuration
    assert one.compressor is not None  # the caller has those that ran
    assert result.score is not None
    tokens = sum(record["visual_tokens"] * record["retention"] for record in result.records) / len(result.records)
    return MeasuredScore(
        model=model,
        method=one.compressor.name(),
        benchmark=Path(one.task.partition(":")[0]).name,
        value=100 * result.score.value,
        tokens=tokens,
        retention=result.reached,
    )


# ---------------------------------------------------------------- as text


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points (cost, score) that no other one beats in both, cheapest first."""
    order = sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1]))
    front: list[int] = []
    for place in order:
        if not front or points[place][1] > points[front[-1]][1]:
            front.append(place)
    return front


def as_json(result: Result) -> dict[str, object]:
    """A result without its records."""
    one = result.configuration
    out: dict[str, object] = {"task": one.task, "method": one.method, "budget": one.budget, "note": result.note or None}
    if result.score is None or result.against_plain is None:
        return out
    return out | {
        "compressor": one.settings,
        "calibrated_on": one.calibrated_on or None,
        "questions": len(result.records),
        "score": vars(result.score),
        "against_plain": vars(result.against_plain),
        **{name: vars(share) for name, share in result.shares.items()},
        "reached": result.reached,
        "tokens": result.tokens,
        "prefill_flops_share": result.flops,
        "changed": len(result.changed),
        "groups": {f"{name} {value}": score for (name, value), (score, _) in result.groups.items()},
    }


def write_table(path: Path, all_results: Sequence[Result]) -> None:
    """Every result as a line of CSV, scores in percent; what a line has not is empty."""
    rows = [_line(result) for result in all_results]
    columns = dict.fromkeys(name for row in rows for name in row)
    write_csv(path, [{name: row.get(name, "") for name in columns} for row in rows])


def _line(result: Result) -> dict[str, object]:
    one = result.configuration
    row: dict[str, object] = {"task": one.task, "budget": one.budget, "method": one.method}
    if result.score is None or result.against_plain is None:
        return row | {"note": result.note}
    row |= {"score": _percent(result.score.value), "low": _percent(result.score.low)}
    row |= {"high": _percent(result.score.high), "difference": _percent(result.against_plain.value)}
    row |= {"difference_low": _percent(result.against_plain.low)}
    row |= {"difference_high": _percent(result.against_plain.high)}
    for name, share in result.shares.items():
        row |= {name: _percent(share.value), f"{name}_low": _percent(share.low), f"{name}_high": _percent(share.high)}
    row |= {"reached": f"{result.reached:.4f}", "tokens": result.tokens, "prefill_flops_share": f"{result.flops:.4f}"}
    row |= {"changed": len(result.changed), "questions": len(result.records)}
    row |= {f"{name} {value}": _percent(score) for (name, value), (score, _) in sorted(result.groups.items())}
    row |= {"note": result.note, "calibrated_on": one.calibrated_on}
    assert one.compressor is not None
    last = result.records[-1]
    return row | {
        "compressor": spec.write(one.compressor),
        **{name: last[name] for name in ("model", "dtype", "device", "vlmzip", "torch", "transformers", "commit")},
    }


def _percent(share: float) -> str:
    return f"{100 * share:.4f}"  # what reads it rounds, and should not round what is rounded
