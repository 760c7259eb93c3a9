"""What is analysed: a model, a task, and a folder for what is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmzip import spec
from vlmzip.compressor import Compressor, Profile
from vlmzip.errors import UserError
from vlmzip.keep import AS_SET
from vlmzip.lab.configurations import Configurator
from vlmzip.lab.results import Result, results
from vlmzip.lab.study import Study
from vlmzip.lab.tasks.task import Task
from vlmzip.models import adapter_for
from vlmzip.processes import Processes
from vlmzip.processor import Processor
from vlmzip.runtime.answering import Answerer

#: A line of an analysis' CSV: the same columns in all of its lines.
Row = dict[str, Any]


class Unsuited(UserError):
    """The task or the model does not suit an analysis; others may well suit it."""


@dataclass(frozen=True)
class Subject:
    """One model on one task."""

    model: Any
    processor: Processor
    name: str
    """Where the model came from, as written."""
    task: Task
    folder: Path
    """Answers of the model are kept here, and never asked for again."""
    batch: int
    seed: int
    processes: Processes
    tell: Callable[[str], None] = print

    def study(self) -> Study:
        """What asks, and keeps answers in the folder."""
        return self._study

    @cached_property
    def _study(self) -> Study:
        return Study(self.model, self.processor, self.name, self.folder, self.batch, self.processes, self.tell)

    def profile(self) -> Profile:
        """The depth of the LLM, and the grid of the task's images: the median where they have grids of their own."""
        answerer = Answerer(adapter_for(self.model), self.processor)
        return Configurator(self.model, answerer, self.name).profile(self.task)

    def ask(self, compressors: Sequence[Compressor]) -> list[Result]:
        """The results of the uncompressed model and of each compressor, in this order, as `vlmzip eval` has them.

        Raises `Unsuited` where one of them has no place in the model, and `UserError` where one breaks.
        """
        study = self.study()
        written = ",".join(map(spec.write, compressors))
        configurations = study.configure([self.task], spec.candidates(written) if written else [], [AS_SET])
        study.run([self.task], configurations)
        found = list(results(study, self.task, configurations, self.seed))
        for result in found:
            if result.score is None:
                kind = Unsuited if result.configuration.compressor is None else UserError
                raise kind(f"{result.configuration.method}: {result.note}")
        return found


def scored(result: Result) -> Row:
    """What the analyses tell of a result: scores and shares in percent."""
    score, against = result.score, result.against_plain
    assert score is not None  # `ask` has seen to it; this is for the type checker
    assert against is not None
    return {
        "questions": len(result.records),
        "score": round(100 * score.value, 2),
        "low": round(100 * score.low, 2),
        "high": round(100 * score.high, 2),
        "difference": round(100 * against.value, 2),
        "difference_low": round(100 * against.low, 2),
        "difference_high": round(100 * against.high, 2),
        "reached": round(100 * result.reached, 2),
        "prefill_flops": round(100 * result.flops, 2),
    }
