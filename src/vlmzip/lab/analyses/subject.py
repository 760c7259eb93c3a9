"""The subject of an analysis: a model, a task, and a folder for the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from vlmzip import spec
from vlmzip.compressor import Compressor, Profile
from vlmzip.errors import UserError
from vlmzip.keep import AS_SET
from vlmzip.lab.configurations import task_profile
from vlmzip.lab.results import Result, results
from vlmzip.lab.stats import Estimate
from vlmzip.lab.study import Study
from vlmzip.lab.tasks.task import Task
from vlmzip.models import family_of
from vlmzip.processes import Processes
from vlmzip.processor import Processor
from vlmzip.runtime.answering import Answerer

#: A row of an analysis' CSV file. All rows of an analysis have the same columns.
Row = dict[str, Any]
#: The main numbers of rows. The columns of their bounds are `low` and `high`; those of others have the number's name.
MAIN = ("score", "attention")


class Unsuited(UserError):
    """The analysis does not apply to the task or the model. Other analyses may still apply."""


@dataclass(frozen=True)
class Subject:
    """One model on one task."""

    model: PreTrainedModel
    processor: Processor
    name: str
    """The model as the user wrote it: mini, a folder or a hub id."""
    task: Task
    folder: Path
    """The folder that stores the model's answers, so that no question is asked twice."""
    batch: int
    seed: int
    processes: Processes

    def study(self) -> Study:
        """Return the study that asks the questions and stores the answers in the folder."""
        return self._study

    @cached_property
    def _study(self) -> Study:
        return Study(self.model, self.processor, self.name, self.folder, self.batch, self.processes)

    def profile(self) -> Profile:
        """Return the depth of the LLM and the grid of the task's images: the median one if their grids differ."""
        return task_profile(Answerer(family_of(self.model), self.processor), self.task)

    def ask(self, compressors: Sequence[Compressor]) -> list[Result]:
        """Return the results of the uncompressed model and then of each compressor, as in `vlmzip eval`.

        Raise `Unsuited` if a compressor does not fit the model, and `UserError` if one fails.
        """
        study = self.study()
        written = ",".join(map(spec.write, compressors))
        configurations = study.configure([self.task], spec.candidates(written) if written else [], [AS_SET])
        study.run([self.task], configurations)
        measured = list(results(study, self.task, configurations, self.seed))
        for result in measured:
            if result.score is None:
                kind = Unsuited if result.configuration.compressor is None else UserError
                raise kind(f"{result.configuration.method}: {result.note}")
        return measured


def interval(name: str, estimate: Estimate, scale: int = 1) -> Row:
    """Return the columns of an estimate: its value, rounded, and its bounds, such as `difference_low`.

    The bounds of a row's main number, `score` or `attention`, are `low` and `high`.
    """
    prefix = "" if name in MAIN else f"{name}_"
    values = (scale * estimate.value, scale * estimate.low, scale * estimate.high)
    return {key: round(value, 2) for key, value in zip((name, f"{prefix}low", f"{prefix}high"), values, strict=True)}


def scored(result: Result) -> Row:
    """Return the columns that analyses report for a result; scores and shares are in percent."""
    score, against = result.score, result.against_plain
    assert score is not None  # for the type checker; `ask` returns results with scores only
    assert against is not None
    return {
        "questions": len(result.records),
        **interval("score", score, 100),
        **interval("difference", against, 100),
        "reached": round(100 * result.reached, 2),
        "prefill_flops": round(100 * result.flops, 2),
    }
