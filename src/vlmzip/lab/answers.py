"""Store answers in a folder, so that no question is asked twice.

A header, `study.json` or `suite.json`, says which model the folder is about. Each way of asking a task's questions has
a series of records, with one file per process: records/TASK/NAME.PROCESS.jsonl. `records` defines the file format."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmzip.errors import UserError
from vlmzip.files import write_text
from vlmzip.json_text import read_json
from vlmzip.lab.names import slug
from vlmzip.lab.records import Record, Shard, read_records
from vlmzip.lab.tasks.task import Sample, Task
from vlmzip.processes import Processes
from vlmzip.runtime.fingerprint import refuse_changed

RECORDS = "records"
AGAIN = "delete the line and run the same command again: its question will be asked again"


@dataclass(frozen=True)
class AnswerStore:
    """A folder of answers about one model."""

    folder: Path
    header: str
    """The name of the file that identifies the model."""
    processes: Processes
    content: str = RECORDS
    """The subfolder with the answers."""

    def open(self, identity: Mapping[str, object], refusal: str) -> dict[str, Any]:
        """Keep other runs out of the folder, and return its header, which is empty for a new folder.

        Raise `UserError` if another run writes there, if the folder has answers without a header, or if the answers
        belong to another identity. `refusal` says what the folder holds in that case.
        """
        self.processes.hold(self.folder)
        path = self.folder / self.header
        if not path.exists():
            if (self.folder / self.content).exists():
                raise UserError(
                    f"{str(self.folder)!r} has {self.content} but no {self.header}, so their model is unknown;"
                    " give another --out"
                )
            return {}
        header = self.read_json(self.header, "give another --out")
        if not isinstance(header.get("tasks", {}), dict):
            raise UserError(f"{str(path)!r} is not a {self.header} of vlmzip; give another --out")
        refuse_changed(f"{str(self.folder)!r} holds {refusal}", header, identity)
        return header

    def note(self, header: Mapping[str, object]) -> None:
        """Write the header."""
        self.write_json(self.header, header)

    def read_json(self, name: str, advice: str) -> dict[str, object]:
        """Return the JSON object in a file of the folder.

        Raise `UserError`, which ends in `advice`, if the file contains anything else.
        """
        path = self.folder / name
        content = read_json(path, advice)
        if not isinstance(content, dict):
            raise UserError(f"{str(path)!r} was not written by vlmzip; {advice}")
        return content

    def write_json(self, name: str, content: Mapping[str, object]) -> None:
        """Write a JSON object into a file of the folder, completely or not at all."""
        write_text(self.folder / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def series(
        self, task: Task, name: str, fields: Collection[str], check: Callable[[Sample, Record], str]
    ) -> AnswerSeries:
        """Return the series of answers that one way of asking gives; `name` identifies it.

        Records must have `fields`. `check` returns what is wrong with a record, or "".
        """
        return AnswerSeries(self.folder / self.content / slug(task.name), name, task, self.processes, fields, check)


@dataclass(frozen=True)
class AnswerSeries:
    """The answers to a task's questions that were asked in one way."""

    folder: Path
    name: str
    task: Task
    processes: Processes
    fields: Collection[str]
    check: Callable[[Sample, Record], str]

    def read(self, samples: Sequence[Sample]) -> dict[str, Record]:
        """Return the existing records, by sample.

        Raise `UserError` for a line that is not a record, for a record about another question, and for one that fails
        `check`.
        """
        records = read_records(sorted(self.folder.glob(f"{self.name}.*.jsonl")), self.fields)
        for sample in samples:
            record = records.get(sample.id)
            if record is None:
                continue
            refuse_other_question(self.folder, self.task, sample, record)
            if wrong := self.check(sample, record):
                raise UserError(f"{str(self.folder)!r}, sample {sample.id!r}: {wrong}; {AGAIN}")
        return records

    def open_questions(self, samples: Sequence[Sample], batch: int) -> int:
        """Return how many questions this process has left to ask."""
        return sum(map(len, self._open_batches(samples, batch, self.read(samples))))

    def fill(self, samples: Sequence[Sample], batch: int, answer: Callable[[range], Sequence[Record]]) -> int:
        """Ask this process's share of the questions without a record, and return the number of added records.

        `answer` gets the indices of a batch's samples and returns their records.
        """
        count = 0
        with Shard(self.folder / f"{self.name}.{self.processes.rank}.jsonl") as shard:
            done = self.read(samples)
            for places in self._open_batches(samples, batch, done):
                records = [record for record in answer(places) if record["sample"] not in done]
                shard.append(records)
                count += len(records)
        return count

    def _open_batches(self, samples: Sequence[Sample], batch: int, done: Mapping[str, Record]) -> list[range]:
        """Return this process's batches in which a record is missing.

        Batches are cut from all questions, not only from the open ones. So interruptions and the number of processes
        change neither which questions share a batch nor the rounding errors.
        """
        starts = range(0, len(samples), batch)[self.processes.rank :: self.processes.count]
        batches = [range(start, min(start + batch, len(samples))) for start in starts]
        return [places for places in batches if any(samples[place].id not in done for place in places)]


def question(task: Task, sample: Sample) -> Record:
    """Return the fields of a record that say what was asked. A record is used again only if they are unchanged."""
    return {
        "task": task.name,
        "sample": sample.id,
        "image": sample.image,
        "pixels": sample.pixels,
        "groups": dict(sample.groups),
        "question": sample.question,
        "answers": list(sample.answers),
    }


def refuse_other_question(folder: Path, task: Task, sample: Sample, record: Record) -> None:
    """Raise `UserError` if a record is about another question, or if its score does not follow from its answer."""
    now = question(task, sample)
    if other := [name for name, value in now.items() if record.get(name) != value]:
        what = {
            "image": f"an image other than {sample.image!r}",
            "pixels": f"an earlier version of the image {sample.image!r}",
            "groups": "another type",
            "task": "another task",
        }.get(other[0], "another question or other reference answers")
        raise UserError(
            f"{str(folder)!r} holds an answer for {what}: sample {sample.id!r} of {task.name} has changed;"
            " give another --out"
        )
    score = task.metric.score(record["given"], sample.answers)
    if record["score"] != score:
        raise UserError(
            f"{str(folder)!r}, sample {sample.id!r}: its score is {record['score']}, and {task.metric.name} gives"
            f" {score} for its answer; {AGAIN}"
        )


def wrong_layers(record: Record, layers: int) -> str:
    """Return what is wrong with a record's number of layers, or ""."""
    count = len(record["visual_tokens_by_layer"])
    return (
        "" if count == layers else f"its visual_tokens_by_layer are {count} numbers, and the model has {layers} layers"
    )
