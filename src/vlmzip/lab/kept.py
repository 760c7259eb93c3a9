"""Resumable answers for analyses that ask in other ways than `Study`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vlmzip.errors import UserError
from vlmzip.keep import AS_SET
from vlmzip.lab.answers import question, wrong_layers
from vlmzip.lab.configurations import plain_json
from vlmzip.lab.names import named
from vlmzip.lab.records import Record
from vlmzip.lab.study import Study
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
    settings, beside = plain_json(dict(settings)), plain_json({"": list(beside) or [None] * len(samples)})[""]
    beside_by_sample = {sample.id: more for sample, more in zip(samples, beside, strict=True)}
    layers = study.adapter.profile().layers

    def check_record(sample: Sample, record: Record) -> str:
        if record["beside"] != beside_by_sample[sample.id]:
            raise UserError(
                f"{str(series.folder)!r} has an answer for the sample {sample.id!r} that was given beside another"
                " question or another image: the task has changed; give another --out"
            )
        return wrong_layers(record, layers) or check(record)

    def ask(places: range) -> list[Record]:
        answers = zip(places, answer(places), strict=True)
        return [_record(study, task, settings, samples[place], beside[place], own) for place, own in answers]

    series = study.store.series(task, named(name, settings), ("beside",), check_record)
    if series.is_open(samples, study.batch):
        series.fill(samples, study.batch, ask)
    study.processes.together({})
    records = series.read(samples)
    return [records[sample.id] for sample in samples]


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
