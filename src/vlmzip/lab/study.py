"""Ask every configuration every question of its task. Answers that exist are not asked again.

In the output folder, `study.json` says which model was asked what, and records/TASK/COMPRESSOR.PROCESS.jsonl holds the
answers. Budgets that lead to the same settings share their records."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from torch import nn

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, reason
from vlmzip.lab.answers import RECORDS, AnswerSeries, AnswerStore, question, wrong_layers
from vlmzip.lab.attacher import Attacher
from vlmzip.lab.configurations import Configuration, Configurator, read_calibrated
from vlmzip.lab.machine import about
from vlmzip.lab.records import Record
from vlmzip.lab.tasks.task import Sample, Task
from vlmzip.models import family_of
from vlmzip.processes import Processes
from vlmzip.processor import Processor
from vlmzip.progress import Work, working
from vlmzip.runtime.answering import Answer, Answerer
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.fingerprint import of_image, of_model, of_name, refuse_changed
from vlmzip.runtime.position_limit import llm_positions
from vlmzip.spec import Candidate
from vlmzip.version import __version__

T = TypeVar("T")

log = logging.getLogger(__name__)

FILE = "study.json"
#: The fields of a record that hold its costs.
COSTS = ("method", "visual_tokens", "retention", "text_tokens", "prefill_flops", "beyond_positions")
#: Fields that have one value in all records of a folder.
SAME = ("dtype", "torch", "transformers")


class MethodFailed(Exception):
    """A method broke while it was answering. Other methods can continue."""


@dataclass
class Study:
    """A study of one model in one output folder."""

    model: nn.Module
    processor: Processor
    name: str
    """The model as the user wrote it: mini, a folder or a hub id."""
    folder: Path
    batch: int
    processes: Processes
    failures: dict[str, str] = field(default_factory=dict)
    """Why a configuration could not be finished, by the folder and name of its records."""

    def __post_init__(self) -> None:
        self.family = family_of(self.model)
        self.answerer = Answerer(self.family, self.processor)
        self.device = self.family.model.device
        dtype = str(self.family.model.dtype).removeprefix("torch.")
        self.conditions = {"model": self.name, "dtype": dtype, "vlmzip": __version__, **about(self.device)}
        self.attacher = Attacher(self.model, self.name)
        self.store = AnswerStore(self.folder, FILE, self.processes)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Return what all answers in the folder depend on."""
        return {**of_name(self.name), **of_model(self.model, self.processor)}

    def configure(
        self, tasks: Sequence[Task], methods: Sequence[Candidate], budgets: Sequence[str]
    ) -> list[Configuration]:
        """Return the configurations to ask, write them to the folder, and keep other runs out of it until this one
        ends.

        Raise `UserError` if another run writes there, or if the folder holds answers of another model or to other
        questions.
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
        known = self.store.open(self.identity, "answers of another model")
        settings = {task.name: {"metric": task.metric.name, "max_new_tokens": task.max_new_tokens} for task in tasks}
        for name, how in settings.items():
            if known.get("tasks", {}).get(name, how) != how:
                raise UserError(f"in {str(self.folder)!r} {name} was asked with {known['tasks'][name]}, not {how}")
        configurator = Configurator(self.model, self.answerer, self.name, read_calibrated(self.folder / FILE, known))
        configurations = [row for task in tasks for row in configurator.rows(task, methods, budgets)]
        content = {
            "model": self.name,
            **self.identity,
            "tasks": known.get("tasks", {}) | settings,
            "calibrated": configurator.calibrated,
        }
        self.store.note(content)
        return configurations

    def run(self, tasks: Sequence[Task], configurations: Sequence[Configuration]) -> None:
        """Ask every question without a record. Return when all processes are done; `failures` then has the errors.

        Raise `UserError` for records that cannot be read or written, and for images that can no longer be read.
        """
        by_name = {task.name: task for task in tasks}
        runs = {
            configuration.key: configuration for configuration in configurations if configuration.compressor is not None
        }
        failures = {}
        open_questions = {
            key: self._series(by_name[run.task], run).open_questions(by_name[run.task].samples, self.batch)
            for key, run in runs.items()
        }
        with working("asking", sum(open_questions.values())) as work:
            for number, (key, configuration) in enumerate(runs.items(), 1):
                if not open_questions[key]:
                    continue
                start, end = time.perf_counter(), work.done + open_questions[key]
                work.begin(f"asking {configuration.task}, {spec.write(configuration.chosen)}")
                try:
                    count = self._ask_all(by_name[configuration.task], configuration, work)
                except MethodFailed as failure:
                    failures[key] = str(failure)
                    work.leave_out(end - work.done)
                    continue
                if count and self.processes.first:
                    done = f"{count:,} questions in {time.perf_counter() - start:.0f} s"
                    left = f", {work.left}" if work.left else ""
                    log.info(
                        f"[{number}/{len(runs)}] {configuration.task}, {spec.write(configuration.chosen)}: {done}{left}"
                    )
        self.failures = self.processes.together(failures)

    def records(self, task: Task, configuration: Configuration) -> list[Record]:
        """Return the existing records of a configuration, in the order of the task's questions."""
        by_id = self._series(task, configuration).read(task.samples)
        return [by_id[sample.id] for sample in task.samples if sample.id in by_id]

    def failure(self, configuration: Configuration) -> str:
        """Return why a configuration could not be finished, or ""."""
        return self.failures.get(configuration.key, "") if configuration.compressor else ""

    def attach(self, compressor: Compressor) -> CompressedModel:
        return self.attacher.attach(compressor)

    def _ask_all(self, task: Task, configuration: Configuration, work: Work) -> int:
        """Ask this process's share of the questions without a record, and return their number."""
        series = self._series(task, configuration)
        compressed = _guarded(configuration, lambda: self.attach(configuration.chosen))
        try:
            return series.fill(
                task.samples, self.batch, lambda places: self._answer(task, configuration, compressed, places, work)
            )
        finally:
            compressed.detach()

    def _answer(
        self, task: Task, configuration: Configuration, compressed: CompressedModel, places: range, work: Work
    ) -> list[Record]:
        samples = [task.samples[place] for place in places]
        images, questions = [sample.load() for sample in samples], [sample.question for sample in samples]
        pixels = [of_image(image) for image in images]  # of the images as asked, in case a file changes during the run
        answers = _guarded(
            configuration, lambda: self.answerer.answer(compressed, images, questions, task.max_new_tokens)
        )
        work.advance(len(places))
        return [
            self._record(task, configuration, sample, answer) | {"pixels": digest}
            for sample, answer, digest in zip(samples, answers, pixels, strict=True)
        ]

    def _record(self, task: Task, configuration: Configuration, sample: Sample, answer: Answer) -> Record:
        return {
            **question(task, sample),
            "given": answer.text,
            "score": task.metric.score(answer.text, sample.answers),
            "method": spec.write(configuration.chosen),
            "compressor": configuration.settings,
            **self.attacher.identity(configuration),
            "visual_tokens": answer.visual_tokens,
            "visual_tokens_by_layer": list(answer.by_layer),
            "retention": round(answer.retention, 6),
            "text_tokens": answer.text_tokens,
            "beyond_positions": answer.positions > (llm_positions(self.family) or math.inf),
            "prefill_flops": self.answerer.flops(answer.text_tokens, answer.by_layer),
            **self.conditions,
        }

    def _series(self, task: Task, configuration: Configuration) -> AnswerSeries:
        settings = configuration.settings
        where = repr(str(self.folder / RECORDS / configuration.key))
        now = of_name(self.name) | {name: self.conditions[name] for name in SAME}

        def check(_: Sample, record: Record) -> str:
            if record["compressor"] != settings:
                raise UserError(f"the records in {where} were made with other settings than {settings}")
            known = self.attacher.identity(configuration) | now
            refuse_changed(f"{where} holds answers of another {record['method']}", record, known)
            return wrong_layers(record, self.family.profile().layers) or self._disagreeing(record)

        return self.store.series(task, configuration.file_stem, (*COSTS, *self.conditions), check)

    def _disagreeing(self, record: Record) -> str:
        """Return which number of a record does not follow from its other numbers, or ""."""
        by_layer = tuple(record["visual_tokens_by_layer"])
        answer = Answer(record["given"], record["visual_tokens"], by_layer, record["text_tokens"])
        now = {"retention": round(answer.retention, 6)}
        now["prefill_flops"] = self.answerer.flops(answer.text_tokens, answer.by_layer)
        wrong = [name for name, value in now.items() if record[name] != value]
        return f"its {wrong[0]} is {record[wrong[0]]}, not {now[wrong[0]]}" if wrong else ""


def _guarded(configuration: Configuration, work: Callable[[], T]) -> T:
    """Return the result of `work`. Raise `MethodFailed` if a method breaks; without compression, raise the error."""
    try:
        return work()
    except Exception as error:
        if configuration.is_plain:
            raise
        raise MethodFailed(reason(error)) from error
