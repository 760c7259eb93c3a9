"""Every configuration asked every question of its task; whatever was answered before is not asked again.

In the output folder, `study.json` says what was asked of which model, and records/TASK/COMPRESSOR.PROCESS.jsonl holds
the answers. Budgets that come out at the same settings share their records.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, collecting_warnings, reason
from vlmzip.files import write_text
from vlmzip.json_text import read_json
from vlmzip.lab.configurations import Configuration, Configurator, plain_json, read_calibrated
from vlmzip.lab.machine import about
from vlmzip.lab.records import Record, Shard, read_records
from vlmzip.lab.tasks.task import Sample, Task
from vlmzip.models import adapter_for
from vlmzip.processes import Processes
from vlmzip.processor import Processor
from vlmzip.runtime.answering import Answer, Answerer
from vlmzip.runtime.attach import attach
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.fingerprint import of_image, of_method, of_model, of_name, refuse_changed
from vlmzip.runtime.positions import llm_positions
from vlmzip.runtime.saving import saved_weights
from vlmzip.spec import Candidate
from vlmzip.version import __version__

FILE = "study.json"
#: What a record has of what it cost.
COSTS = ("method", "visual_tokens", "retention", "text_tokens", "prefill_flops", "beyond_positions")
#: Fields that have one value in all records of a folder.
SAME = ("dtype", "torch", "transformers")
AGAIN = "delete the line and run the same command again: its question will be asked again"


class MethodFailed(Exception):
    """A method broke while it was answering; the others can go on."""


@dataclass
class Study:
    """One model, one output folder."""

    model: nn.Module
    processor: Processor
    name: str
    """Where the model came from, as written."""
    folder: Path
    batch: int
    processes: Processes
    tell: Callable[[str], None] = print
    """Is told, by the first process, what was done."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why a configuration could not be finished, by the folder and name of its records."""

    def __post_init__(self) -> None:
        self.adapter = adapter_for(self.model)
        self.answerer = Answerer(self.adapter, self.processor)
        self.device = self.adapter.model.device
        dtype = str(self.adapter.model.dtype).removeprefix("torch.")
        self.conditions = {"model": self.name, "dtype": dtype, "vlmzip": __version__, **about(self.device)}
        self._methods: dict[str, dict[str, str]] = {}

    @cached_property
    def identity(self) -> dict[str, str]:
        """What all answers in the folder depend on."""
        return {**of_name(self.name), **of_model(self.model, self.processor)}

    def configure(
        self, tasks: Sequence[Task], methods: Sequence[Candidate], budgets: Sequence[str]
    ) -> list[Configuration]:
        """What is to be asked; notes it in the folder, which other runs are kept out of until this one ends.

        Raises `UserError` where another run is writing there, and where the folder holds answers of another model, or
        to other questions.
        """
        for task in tasks:
            for sample in task.samples:
                self.answerer.check(sample.question)
        configurations = self.processes.from_first(lambda: self._configure(tasks, methods, budgets))
        self.processes.hold(self.folder)
        return configurations

    def _configure(
        self, tasks: Sequence[Task], methods: Sequence[Candidate], budgets: Sequence[str]
    ) -> list[Configuration]:
        self.processes.hold(self.folder)
        path = self.folder / FILE
        known = _read_study(path)
        if known:
            refuse_changed(f"{str(self.folder)!r} holds answers of another model", known, self.identity)
        asked = {task.name: {"metric": task.metric.name, "max_new_tokens": task.max_new_tokens} for task in tasks}
        for name, how in asked.items():
            if known.get("tasks", {}).get(name, how) != how:
                raise UserError(f"in {str(self.folder)!r} {name} was asked with {known['tasks'][name]}, not {how}")
        configurator = Configurator(self.model, self.answerer, self.name, read_calibrated(path, known))
        found = [row for task in tasks for row in configurator.rows(task, methods, budgets)]
        content = {
            "model": self.name,
            **self.identity,
            "tasks": known.get("tasks", {}) | asked,
            "calibrated": configurator.calibrated,
        }
        text = json.dumps(content, indent=1) + "\n"
        write_text(path, text)
        return found

    def run(self, tasks: Sequence[Task], configurations: Sequence[Configuration]) -> None:
        """Asks whatever has no record yet. Returns when all processes are done; `failures` has what went wrong.

        Raises `UserError` for records that cannot be read or written, and for images that cannot be read (any more).
        """
        by_name = {task.name: task for task in tasks}
        runs = {_key(one): one for one in configurations if one.compressor is not None}
        mine = {}
        for number, (key, one) in enumerate(runs.items(), 1):
            start = time.perf_counter()
            try:
                count = self._ask_all(by_name[one.task], one)
            except MethodFailed as failure:
                mine[key] = str(failure)
                continue
            if count and self.processes.first:
                spent = time.perf_counter() - start
                told = f"{one.task}, {spec.write(_of(one))}: {count:,} questions in {spent:.0f} s"
                self.tell(f"[{number}/{len(runs)}] {told}")
        self.failures = self.processes.together(mine)

    def records(self, task: Task, one: Configuration) -> list[Record]:
        """The records of a configuration, in the order of the task's questions, as far as there are any."""
        found = self._read(task, one)
        return [found[sample.id] for sample in task.samples if sample.id in found]

    def failure(self, one: Configuration) -> str:
        """Why a configuration could not be finished; empty where it could."""
        return self.failures.get(_key(one), "") if one.compressor else ""

    def attach(self, compressor: Compressor) -> CompressedModel:
        return attach_alike(self.model, compressor, self.name)

    def _ask_all(self, task: Task, one: Configuration) -> int:
        """Asks this process's share of the questions that have no record. Returns how many were asked."""
        if not self._open_batches(task, self._read(task, one)):
            return 0
        count = 0
        with Shard(self._path(one, str(self.processes.rank))) as shard:
            done = self._read(task, one)  # once more: now nobody else can write here
            compressed = _guarded(one, lambda: self.attach(_of(one)))
            self._methods[file_stem(one)] = of_method(compressed)
            try:
                for some in self._open_batches(task, done):
                    images, questions = [sample.load() for sample in some], [sample.question for sample in some]
                    seen = [of_image(image) for image in images]
                    ask = lambda p=images, q=questions: self.answerer.answer(compressed, p, q, task.max_new_tokens)  # noqa: E731
                    answers = _guarded(one, ask)
                    new = [
                        self._record(task, one, sample, answer) | {"pixels": pixels}
                        for sample, answer, pixels in zip(some, answers, seen, strict=True)
                        if sample.id not in done
                    ]
                    shard.append(new)
                    count += len(new)
            finally:
                compressed.detach()
        return count

    def _open_batches(self, task: Task, done: dict[str, Record]) -> list[Sequence[Sample]]:
        """This process's batches in which a record is missing.

        Batches are cut from all questions, never from those left: who stands beside whom, and with it every rounding,
        does not depend on how often a run was interrupted, nor on the number of processes.
        """
        starts = range(0, len(task.samples), self.batch)[self.processes.rank :: self.processes.count]
        batches = [task.samples[start : start + self.batch] for start in starts]
        return [some for some in batches if any(sample.id not in done for sample in some)]

    def _record(self, task: Task, one: Configuration, sample: Sample, answer: Answer) -> Record:
        return {
            **question(task, sample),
            "given": answer.text,
            "score": task.metric.score(answer.text, sample.answers),
            "method": spec.write(_of(one)),
            "compressor": one.settings,
            **self._method(one),
            "visual_tokens": answer.visual_tokens,
            "visual_tokens_by_layer": list(answer.by_layer),
            "retention": round(answer.retention, 6),
            "text_tokens": answer.text_tokens,
            "beyond_positions": answer.positions > (llm_positions(self.adapter) or math.inf),
            "prefill_flops": self.answerer.flops(answer.text_tokens, answer.by_layer),
            **self.conditions,
        }

    def _read(self, task: Task, one: Configuration) -> dict[str, Record]:
        """The records that there are. Raises `UserError` for those of other questions or settings."""
        paths = sorted(self._path(one, "*").parent.glob(self._path(one, "*").name))
        found, settings = read_records(paths, (*COSTS, *self.conditions)), plain_json(_of(one).to_dict())
        for sample in task.samples if found else ():
            record = found.get(sample.id)
            if record is None:
                continue
            refuse_other_question(paths[0].parent, task, sample, record)
            if record["compressor"] != settings:
                raise UserError(f"the records in {str(paths[0])!r} are of other settings than {settings}")
            now = self._method(one) | of_name(self.name) | {name: self.conditions[name] for name in SAME}
            refuse_changed(f"{str(paths[0])!r} holds answers of another {record['method']}", record, now)
            if wrong := wrong_layers(record, self.adapter.profile().layers) or self._disagreeing(record):
                raise UserError(f"{str(paths[0].parent)!r}, sample {sample.id!r}: {wrong}; {AGAIN}")
        return found

    def _method(self, one: Configuration) -> dict[str, str]:
        """What answers depend on beside the settings of a configuration."""
        key = file_stem(one)
        if key not in self._methods:
            compressed = self.attach(_of(one))
            try:
                self._methods[key] = of_method(compressed)
            finally:
                compressed.detach()
        return self._methods[key]

    def _disagreeing(self, record: Record) -> str:
        """Which number of a record does not follow from the others of it; empty where all do."""
        by_layer = tuple(record["visual_tokens_by_layer"])
        answer = Answer(record["given"], record["visual_tokens"], by_layer, record["text_tokens"])
        now = {"retention": round(answer.retention, 6)}
        now["prefill_flops"] = self.answerer.flops(answer.text_tokens, answer.by_layer)
        wrong = [name for name, value in now.items() if record[name] != value]
        return f"its {wrong[0]} is {record[wrong[0]]}, not {now[wrong[0]]}" if wrong else ""

    def _path(self, one: Configuration, process: str) -> Path:
        return self.folder / "records" / f"{_key(one)}.{process}.jsonl"


def attach_alike(model: nn.Module, compressor: Compressor, name: str) -> CompressedModel:
    """The model with a compressor; weights that were never trained are the same at every start."""
    with torch.random.fork_rng(), collecting_warnings():  # configuring the study has told of them
        torch.manual_seed(0)
        return attach(model, compressor, weights=saved_weights(compressor, name))


def question(task: Task, sample: Sample) -> Record:
    """What a record says of its question, all of which must be the same for it to be used again."""
    return {
        "task": task.name,
        "sample": sample.id,
        "image": sample.image,
        "pixels": sample.pixels,
        "groups": dict(sample.groups),
        "question": sample.question,
        "answers": list(sample.answers),
    }


def wrong_layers(record: Record, layers: int) -> str:
    """Return what is wrong with a record's number of layers; an empty text if nothing is."""
    count = len(record["visual_tokens_by_layer"])
    return (
        "" if count == layers else f"its visual_tokens_by_layer are {count} numbers, and the model has {layers} layers"
    )


def refuse_other_question(folder: Path, task: Task, sample: Sample, record: Record) -> None:
    """Raise `UserError` if a record is about another question than the sample's, or its score does not follow."""
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


def _key(one: Configuration) -> str:
    """Folder and name of the records of a configuration."""
    return f"{slug(one.task)}/{file_stem(one)}"


def file_stem(one: Configuration) -> str:
    """A name for files of a configuration, of its settings alone: budgets that come out the same share it."""
    text = json.dumps(one.settings, sort_keys=True)
    return f"{_plain(spec.write(_of(one)))}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def slug(text: str) -> str:
    """What every file system takes as a name: the text itself, or something like it that no other text has."""
    plain = _plain(text)
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.")[:60]


def _of(one: Configuration) -> Compressor:
    assert one.compressor is not None  # others are not run
    return one.compressor


def _guarded(one: Configuration, work: Callable[[], Any]) -> Any:
    """The work's result; whatever breaks in a method ends that method. Without compression, nothing is left to say."""
    try:
        return work()
    except Exception as error:
        if one.is_plain:
            raise
        raise MethodFailed(reason(error)) from error


def _read_study(path: Path) -> dict[str, Any]:
    if not path.exists():
        if (path.parent / "records").exists():
            raise UserError(f"{str(path.parent)!r} has records but no {FILE}: nobody knows whose; give another --out")
        return {}
    content = read_json(path, "give another --out")
    if not isinstance(content, dict) or not isinstance(content.get("tasks", {}), dict):
        raise UserError(f"{str(path)!r} is no {FILE} of vlmzip; give another --out")
    return content
