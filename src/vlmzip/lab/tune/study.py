"""The questions and costs of a search: which images choose and which confirm, and what candidates cost."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from vlmzip import spec
from vlmzip.errors import UserError, reason
from vlmzip.files import write_text
from vlmzip.json_text import read_json
from vlmzip.lab.bench.timing import in_turns, time_answer
from vlmzip.lab.configurations import Configuration, task_profile
from vlmzip.lab.records import Record
from vlmzip.lab.study import Study
from vlmzip.lab.tasks.task import Sample, Task
from vlmzip.lab.tune.search import PLAIN, Answers, Part
from vlmzip.runtime.fingerprint import of_method_code, of_name
from vlmzip.runtime.flops import prefill_flops

log = logging.getLogger(__name__)

#: tokens: visual tokens per image, the mean over all layers of the LLM; flops: prefill FLOPs of the LLM, as a share
#: of the uncompressed model's; ms: milliseconds of that prefill, one question at a time.
Cost = Literal["tokens", "flops", "ms"]
#: Number of questions whose prefill is timed, and of timed runs.
TIMED, REPEATS = 4, 5
FILE = "prefill.json"


def halves(samples: Sequence[Sample], seed: int) -> dict[Part, list[Sample]]:
    """Divide the questions into the two parts; all questions about an image are in the same part.

    Within a part the order is random, but no image comes a second time before all images came once. So the first
    questions are as representative as possible. Raise `UserError` for fewer than 2 images.
    """
    images = list(dict.fromkeys(sample.image for sample in samples))
    if len(images) < 2:
        raise UserError(
            "tune needs questions about at least 2 images: one half chooses, the other half confirms the choice"
        )
    rng = np.random.default_rng(seed)
    chosen = set(rng.permutation(len(images))[: -(-len(images) // 2)].tolist())
    choosing = {image for number, image in enumerate(images) if number in chosen}
    parts: dict[Part, list[tuple[int, Sample]]] = {"choose": [], "confirm": []}
    seen: Counter[str] = Counter()
    for place in rng.permutation(len(samples)):
        sample = samples[place]
        parts["choose" if sample.image in choosing else "confirm"].append((seen[sample.image], sample))
        seen[sample.image] += 1
    return {part: [sample for _, sample in sorted(pairs, key=lambda pair: pair[0])] for part, pairs in parts.items()}


@dataclass
class TunedStudy:
    """The `Ask` of a search, on a study. A configuration's number is its index; 0 is the uncompressed model."""

    study: Study
    task: Task
    configurations: Sequence[Configuration]
    cost: Cost
    seed: int
    milliseconds: Mapping[int, float] = field(default_factory=dict)
    """The prefill time of each configuration, if that is the cost."""
    failures: dict[int, str] = field(default_factory=dict)
    """Why a configuration broke."""

    def __post_init__(self) -> None:
        self.parts = {
            part: replace(self.task, samples=task) for part, task in halves(self.task.samples, self.seed).items()
        }
        self.profile = task_profile(self.study.answerer, self.task)
        self._records: dict[tuple[int, Part], list[Record]] = {}

    def __call__(self, numbers: Sequence[int], part: Part, count: int) -> dict[int, Answers]:
        """Ask the first `count` questions of a part.

        Batches are cut from all questions of the part. `count` must be whole batches or all questions, so that a
        question shares its batch with the same questions in every round.
        """
        task = replace(self.parts[part], samples=self.parts[part].samples[:count])
        self.study.run([task], [self.configurations[number] for number in numbers])
        answers = {}
        for number in numbers:
            if failure := self.study.failure(self.configurations[number]):
                self.failures[number] = failure
                continue
            records = self.study.records(task, self.configurations[number])
            if len(records) > len(self._records.get((number, part), ())):
                self._records[number, part] = records
            scores = np.array([record["score"] for record in records], dtype=float)
            answers[number] = Answers(scores, self.means(number, part)[self.cost])
        return answers

    def means(self, number: int, part: Part = "choose") -> dict[str, float]:
        """Return the mean costs of a configuration that was asked: visual tokens, FLOPs and, if timed, milliseconds."""
        records = self._records[number, part]
        plain = self._records[PLAIN, part][: len(records)]
        costs = {
            "tokens": statistics.fmean(statistics.fmean(record["visual_tokens_by_layer"]) for record in records),
            "flops": sum(r["prefill_flops"] for r in records) / sum(r["prefill_flops"] for r in plain),
        }
        return costs | ({"ms": self.milliseconds[number]} if number in self.milliseconds else {})

    def expected(self) -> dict[int, float]:
        """Return the cost of each candidate before it is asked.

        The cost is measured, or computed from the shape of the images and one prompt. It is 0 if it depends on the
        images' content.
        """
        if self.cost == "ms":
            return {number: ms for number, ms in self.milliseconds.items() if number != PLAIN}
        text = self._text_tokens()
        return {
            number: self._from_shape(configuration, text)
            for number, configuration in enumerate(self.configurations)
            if number != PLAIN
        }

    def _from_shape(self, configuration: Configuration, text: int) -> float:
        counts = configuration.chosen.tokens_by_layer(self.profile)
        if counts is None:
            return 0.0
        if self.cost == "tokens":
            return statistics.fmean(counts)
        whole = prefill_flops(self.study.family, text + self.profile.size)
        return prefill_flops(self.study.family, [text + count for count in counts]) / whole

    def _text_tokens(self) -> int:
        sample = self.task.samples[0]
        ids = self.study.answerer.inputs([sample.load()], [sample.question])["input_ids"]
        return int((ids != self.study.family.placeholder_id).sum())


def prefill_milliseconds(
    study: Study, task: Task, configurations: Sequence[Configuration]
) -> tuple[dict[int, float], dict[int, str]]:
    """Return the LLM's prefill time for each configuration that can be timed, and the errors of the others.

    Times are in milliseconds, for one question at a time. The configurations take turns, so that other work on the
    machine affects all alike. The times are kept in the study's folder and used again: a resumed search must not change
    its figures. Another device or other versions make it measure again.
    """
    samples = list({sample.image: sample for sample in task.samples}.values())[:TIMED]
    names = [spec.write(configuration.chosen) for configuration in configurations]
    questions = [[sample.id, sample.image, sample.pixels, sample.question] for sample in samples]
    code = [of_method_code(configuration.chosen) for configuration in configurations]
    of_study = {**study.conditions, "model": of_name(study.name)}
    conditions = {**of_study, "task": task.name, "samples": questions, "configurations": names, "code": code}
    path = study.folder / FILE
    known = _read_prefill(path, conditions, len(configurations)) if path.exists() else None
    if known is not None:
        return known
    inputs = [study.answerer.inputs([sample.load()], [sample.question]) for sample in samples]

    def run(configuration: Configuration) -> float:
        compressed = study.attach(configuration.chosen)
        try:
            return 1000 * statistics.fmean(
                time_answer(compressed, study.family, inputs_of_one, 2).prefill for inputs_of_one in inputs
            )
        finally:
            compressed.detach()

    failures: dict[int, str] = {}
    for number, configuration in enumerate(
        configurations
    ):  # the warm-up, which also finds out which configurations can run
        log.info(f"warming up: {spec.write(configuration.chosen)}")
        try:
            run(configuration)
        except Exception as error:
            if configuration.is_plain:
                raise
            failures[number] = reason(error)
    log.info("timing the prefill")
    running = {
        str(n): partial(run, configuration) for n, configuration in enumerate(configurations) if n not in failures
    }
    medians = {int(n): statistics.median(times) for n, times in in_turns(running, REPEATS, warmup=0).items()}
    text = json.dumps({"conditions": conditions, "ms": medians, "failures": failures}, indent=1) + "\n"
    write_text(path, text)
    return medians, failures


def _read_prefill(
    path: Path, conditions: Mapping[str, object], count: int
) -> tuple[dict[int, float], dict[int, str]] | None:
    """Return the stored times and errors, or `None` if they are from other conditions.

    Raise `UserError` for a corrupt file.
    """
    known = read_json(path, advice := "delete it, and the prefill is timed again")
    try:
        if known["conditions"] != conditions:
            return None
        medians = {int(number): float(ms) for number, ms in known["ms"].items()}
        failures = {int(number): str(why) for number, why in known["failures"].items()}
        if medians.keys() | failures.keys() != set(range(count)) or not all(
            0 < ms < math.inf for ms in medians.values()
        ):
            raise ValueError("times are missing or impossible")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        cause = error if isinstance(error, ValueError) else "it is not what tune writes there"
        raise UserError(f"{str(path)!r} cannot be read: {cause}; {advice}") from None
    return medians, failures
