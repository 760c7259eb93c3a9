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
from vlmzip.progress import working

#: Answer the samples at the given indices. Returned records have at least `given` and `visual_tokens_by_layer`.
Answerer = Callable[[Sequence[int]], Sequence[Record]]
#: Return what is wrong with the fields that an analysis added to a record; an empty text if nothing is.
Check = Callable[[Record], str]


def resumable_records(
    study: Study,
    task: Task,
    name: str,
    settings: Mapping[str, object],
    samples: Sequence[Sample],
    answer: Answerer,
    beside: Sequence[object] = (),
    check: Check = lambda record: "",
) -> list[Record]:
    """Return the record of each sample, in the order of the samples. Call `answer` for samples without a record.

    `name` and `settings` (JSON) identify the series of records in the study's folder. Each record contains `settings`,
    so they need a key "compressor". As in `Study`, batches are cut from all samples and shared among the processes.
    `beside` (JSON) has one entry per sample: everything else that its answer depends on, such as the other images in
    the prompt.

    Raise `UserError` if the folder holds answers of another model or to other questions, or if a record fails `check`.
    """
    study.configure([task], [], [AS_SET])
    settings, beside = plain_json(dict(settings)), plain_json({"": list(beside) or [None] * len(samples)})[""]
    beside_by_sample = {sample.id: more for sample, more in zip(samples, beside, strict=True)}
    layers = study.family.profile().layers

    def check_record(sample: Sample, record: Record) -> str:
        if record["beside"] != beside_by_sample[sample.id]:
            raise UserError(
                f"{str(series.folder)!r} has an answer for the sample {sample.id!r} from a prompt with other"
                " questions or images: the task has changed; give another --out"
            )
        return wrong_layers(record, layers) or check(record)

    def ask(places: range) -> list[Record]:
        answers = zip(places, answer(places), strict=True)
        records = [_record(study, task, settings, samples[place], beside[place], record) for place, record in answers]
        work.advance(len(places))
        return records

    series = study.store.series(task, named(name, settings), ("beside",), check_record)
    if count := series.open_questions(samples, study.batch):
        with working(f"asking {task.name}: {name}", count) as work:
            series.fill(samples, study.batch, ask)
    study.processes.together({})
    records = series.read(samples)
    return [records[sample.id] for sample in samples]


def _record(
    study: Study, task: Task, settings: Mapping[str, object], sample: Sample, beside: object, answer: Record
) -> Record:
    return {
        **question(task, sample),
        "beside": beside,
        "score": task.metric.score(answer["given"], sample.answers),
        **settings,
        **answer,
        **study.conditions,
    }
