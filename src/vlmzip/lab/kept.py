"""Answers that an analysis gets in ways of its own: a record for each, and what was answered is not asked again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from vlmzip.errors import UserError
from vlmzip.keep import AS_SET
from vlmzip.lab.configurations import plain_json
from vlmzip.lab.records import Record, Shard, read_records
from vlmzip.lab.study import AGAIN, Study, question, refuse_other_question, slug, wrong_layers
from vlmzip.lab.tasks.task import Sample, Task

#: Given the places of some samples, the answers to them: records of at least `given` and `visual_tokens_by_layer`.
Answerer = Callable[[Sequence[int]], Sequence[Record]]


#: Return what is wrong with the fields that an analysis added to a record; an empty text if nothing is.
Check = Callable[[Record], str]


def kept(
    study: Study,
    task: Task,
    name: str,
    settings: Mapping[str, object],
    samples: Sequence[Sample],
    answer: Answerer,
    beside: Sequence[object] = (),
    check: Check = lambda record: "",
) -> list[Record]:
    """The record of each sample, in their order; `answer` is asked for those that the study's folder has not.

    `name` and `settings` (JSON) tell what is asked from all else; `settings["compressor"]` goes into the records. As in
    `Study`, batches are cut from all samples, and shared among the processes. `beside` (JSON) has, for each sample,
    what its answer depends on beside its own question and image.

    Raises `UserError` where the folder holds answers of another model, or to other questions, or what fails `check`.
    """
    study.configure([task], [], [AS_SET])
    told = plain_json(dict(settings))
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    stem = study.folder / "records" / slug(task.name) / f"{name}-{digest}"
    starts = range(0, len(samples), study.batch)[study.processes.rank :: study.processes.count]
    batches = [range(start, min(start + study.batch, len(samples))) for start in starts]
    beside = plain_json({"beside": list(beside) or [None] * len(samples)})["beside"]
    layers = study.adapter.profile().layers
    read = partial(_read, task, stem, samples, beside, layers, check)
    if any(_open(batch, samples, read()) for batch in batches):
        with Shard(stem.with_name(f"{stem.name}.{study.processes.rank}.jsonl")) as shard:
            done = read()  # once more: now nobody else can write here
            for batch in (batch for batch in batches if _open(batch, samples, done)):
                whole = [
                    _record(study, task, told, samples[place], beside[place], record)
                    for place, record in zip(batch, answer(batch), strict=True)
                ]
                shard.append([record for record in whole if record["sample"] not in done])
    study.processes.together({})
    found = read()
    return [found[sample.id] for sample in samples]


def _open(batch: Sequence[int], samples: Sequence[Sample], done: Mapping[str, Record]) -> bool:
    return any(samples[place].id not in done for place in batch)


def _record(
    study: Study, task: Task, settings: Mapping[str, object], sample: Sample, beside: object, own: Record
) -> Record:
    return {
        **question(task, sample),
        "beside": beside,
        "score": task.metric.score(own["given"], sample.answers),
        **settings,
        **own,
        **study.conditions,
    }


def _read(
    task: Task, stem: Path, samples: Sequence[Sample], beside: Sequence[object], layers: int, check: Check
) -> dict[str, Record]:
    found = read_records(sorted(stem.parent.glob(f"{stem.name}.*.jsonl")), ("beside",))
    for sample, more in zip(samples, beside, strict=True):
        record = found.get(sample.id)
        if record is None:
            continue
        refuse_other_question(stem.parent, task, sample, record)
        if record["beside"] != more:
            raise UserError(
                f"{str(stem.parent)!r} has an answer for the sample {sample.id!r} that was given beside another"
                " question or another image: the task has changed; give another --out"
            )
        if wrong := wrong_layers(record, layers) or check(record):
            raise UserError(f"{str(stem.parent)!r}, sample {sample.id!r}: {wrong}; {AGAIN}")
    return found
