"""Answers that an analysis gets in ways of its own: a record for each, and what was answered is not asked again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmzip.errors import UserError
from vlmzip.evaluation.configurations import AS_SET, plain_json
from vlmzip.evaluation.records import Record, Shard, read_records
from vlmzip.evaluation.study import Study, slug
from vlmzip.evaluation.task import Sample, Task

#: Given the places of some samples, the answers to them: records of at least `given` and `visual_tokens_by_layer`.
Answerer = Callable[[Sequence[int]], Sequence[Record]]


def kept(
    study: Study, task: Task, name: str, settings: Mapping[str, Any], samples: Sequence[Sample], answer: Answerer
) -> list[Record]:
    """The record of each sample, in their order; `answer` is asked for those that the study's folder has not.

    `name` and `settings` (JSON) tell what is asked from all else; `settings["compressor"]` goes into the records. As in
    `Study`, batches are cut from all samples, and shared among the processes.

    Raises `UserError` where the folder holds answers of another model, or to other questions.
    """
    study.configure([task], [], [AS_SET])
    told = plain_json(dict(settings))
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    stem = study.folder / "records" / slug(task.name) / f"{name}-{digest}"
    starts = range(0, len(samples), study.batch)[study.processes.rank :: study.processes.count]
    batches = [range(start, min(start + study.batch, len(samples))) for start in starts]
    if any(_open(batch, samples, _read(stem, samples)) for batch in batches):
        with Shard(stem.with_name(f"{stem.name}.{study.processes.rank}.jsonl")) as shard:
            done = _read(stem, samples)  # once more: now nobody else can write here
            for batch in (batch for batch in batches if _open(batch, samples, done)):
                whole = [
                    _record(study, task, told, samples[place], record)
                    for place, record in zip(batch, answer(batch), strict=True)
                ]
                shard.append([record for record in whole if record["sample"] not in done])
    study.processes.together({})
    found = _read(stem, samples)
    return [found[sample.id] for sample in samples]


def _open(batch: Sequence[int], samples: Sequence[Sample], done: Mapping[str, Record]) -> bool:
    return any(samples[place].id not in done for place in batch)


def _record(study: Study, task: Task, settings: Mapping[str, Any], sample: Sample, own: Record) -> Record:
    return {
        "task": task.name,
        "sample": sample.id,
        "picture": sample.picture,
        "question": sample.question,
        "answers": list(sample.answers),
        "score": task.metric.score(own["given"], sample.answers),
        **settings,
        **own,
        **study.conditions,
    }


def _read(stem: Path, samples: Sequence[Sample]) -> dict[str, Record]:
    found = read_records(sorted(stem.parent.glob(f"{stem.name}.*.jsonl")))
    for sample in samples:
        record = found.get(sample.id)
        if record is not None and (record["question"], record["answers"]) != (sample.question, list(sample.answers)):
            raise UserError(
                f"{str(stem.parent)!r} has another question or other answers for the sample {sample.id!r}: the task has"
                " changed; give another --out"
            )
    return found
