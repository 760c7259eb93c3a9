"""The configurations of a study: methods at budgets for each task, and why some of them cannot run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from vlmzip import catalogue, spec
from vlmzip.compressor import Calibratable, Compressor, Profile
from vlmzip.errors import UserError, collecting_warnings
from vlmzip.keep import AS_SET, count_to_keep
from vlmzip.lab.budgets import fit, keep_of
from vlmzip.lab.names import named, slug
from vlmzip.lab.tasks.task import CalibrationSet, Task
from vlmzip.methods import NoCompression
from vlmzip.runtime.answering import Answerer
from vlmzip.runtime.attach import attach
from vlmzip.runtime.calibration import MeasuredImage, measure, meet
from vlmzip.runtime.fingerprint import of_method_code
from vlmzip.runtime.saving import saved_weights
from vlmzip.spec import Candidate

PLAIN = NoCompression.name()
WHOLE = "100%"
#: Reject a setting that misses the budget by more than this fraction of it.
TOO_FAR = 0.25
#: Number of questions, from the start of a task, whose images determine the task's median grid.
LOOK_AT = 32


@dataclass(frozen=True)
class Configuration:
    """A method at a budget on a task: a row of the tables."""

    task: str
    method: str
    """The method as the user wrote it."""
    budget: str
    """The budget as the user wrote it."""
    compressor: Compressor | None
    note: str = ""
    """Why there is no compressor, or what is unusual about it."""
    calibrated_on: str = ""
    """The images that set the method's threshold."""

    @property
    def is_plain(self) -> bool:
        """Return whether this is the uncompressed model, the baseline of all others."""
        return self.method == PLAIN

    @property
    def chosen(self) -> Compressor:
        """Return the compressor of a configuration that can run; the others have none."""
        assert self.compressor is not None
        return self.compressor

    @property
    def file_stem(self) -> str:
        """Return a name for files. It depends only on the settings, so budgets with equal settings share files."""
        return named(spec.write(self.chosen), self.settings)

    @property
    def key(self) -> str:
        """Return what identifies a run: the task and the settings."""
        return f"{slug(self.task)}/{self.file_stem}"

    @property
    def settings(self) -> dict[str, object] | None:
        """Return the compressor's settings as JSON values."""
        return None if self.compressor is None else plain_json(self.compressor.to_dict())


@dataclass
class Configurator:
    """Fits methods to budgets on one model. Calibration measures its images once for all budgets."""

    model: nn.Module
    answerer: Answerer
    name: str
    """The model as the user wrote it. A compressor that is saved there brings its weights."""
    calibrated: list[dict[str, Any]] = field(default_factory=list)
    """Earlier and new calibrations, as JSON values. A resumed run must use the same thresholds, even on another
    machine."""
    _measured: dict[tuple[str, str], list[MeasuredImage]] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)

    def rows(self, task: Task, methods: Sequence[Candidate], budgets: Sequence[str]) -> Iterator[Configuration]:
        """Yield the uncompressed model, then every method at every budget, or the reason why it cannot run."""
        yield Configuration(task.name, PLAIN, WHOLE, NoCompression())
        profile = task_profile(self.answerer, task)
        for candidate in methods:
            for budget in budgets:
                try:
                    yield self._row(task, candidate, budget, profile)
                except UserError as error:
                    yield Configuration(task.name, candidate.name, budget, None, " ".join(str(error).split()))

    def _row(self, task: Task, candidate: Candidate, budget: str, profile: Profile) -> Configuration:
        method = candidate.usable()
        calibrated_on = ""
        if budget == AS_SET:
            chosen, note = method.placed(profile), ""
        elif isinstance(method, Calibratable):
            chosen, note = self._calibrated(task, method, budget), ""
            calibrated_on = task.calibration.about if task.calibration else ""
        else:
            chosen, reached, note = fit(method, budget, profile)
            note = _near(budget, reached, note, profile)
        with collecting_warnings() as warnings:  # attaching fails if the method does not fit the model
            attach(self.model, chosen, weights=saved_weights(chosen, self.name)).detach()
        notes = "; ".join(filter(None, [note, *warnings]))
        return Configuration(task.name, candidate.name, budget, chosen, notes, calibrated_on)

    def _calibrated(self, task: Task, method: Compressor, budget: str) -> Compressor:
        if task.calibration is None:
            raise UserError(task.uncalibrated)
        key = {"task": task.name, "method": spec.write(method), "budget": budget, "on": task.calibration.about}
        key |= {"code": of_method_code(method), "images": self._digest(task.calibration)}
        for known in self.calibrated:
            if key.items() <= known.items():
                return catalogue.from_dict(known["compressor"])
        images = key["method"], key["images"]
        if images not in self._measured:
            self._measured[images] = measure(
                self.model, task.calibration.images(), method, processor=self.answerer.processor
            )
        compressor = meet(method, self._measured[images], keep_of(budget)).compressor
        self.calibrated.append({**key, "compressor": plain_json(compressor.to_dict())})
        return compressor

    def _digest(self, calibration: CalibrationSet) -> str:
        if calibration.about not in self._digests:
            self._digests[calibration.about] = calibration.digest
        return self._digests[calibration.about]


def task_profile(answerer: Answerer, task: Task) -> Profile:
    """Return the profile for which budgets are set: that of the model, with the grid of the task's median image.

    The median is over the task's first images. For a task whose questions are not known, return the model's own grid.
    """
    if not task.samples:
        return answerer.family.profile()
    first = {sample.image: sample for sample in task.samples[:LOOK_AT]}.values()
    inputs = answerer.inputs([sample.load() for sample in first], [""] * len(first))
    seen = [layout.unpadded()[0] for layout in answerer.family.layouts(inputs)]
    layouts = sorted(seen, key=lambda layout: layout.size)
    grid, *tiles = layouts[(len(layouts) - 1) // 2].views
    return replace(answerer.family.profile(), grid=grid, tiles=tuple(tiles))


def read_calibrated(path: Path, known: Mapping[str, object]) -> list[dict[str, object]]:
    """Return the calibrations in a run's file. Raise `UserError` if they are invalid."""
    calibrations = known.get("calibrated", [])
    names = ("task", "method", "budget", "on", "code", "images")

    def is_valid(entry: object) -> bool:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in names):
            return False
        return isinstance(entry.get("compressor"), dict) and "method" in entry["compressor"]

    if not isinstance(calibrations, list) or not all(map(is_valid, calibrations)):
        raise UserError(f"{str(path)!r} cannot be read: calibrated is not what vlmzip writes; give another --out")
    return calibrations


def _near(budget: str, reached: float, note: str, profile: Profile) -> str:
    """Return the note. Raise `UserError` if the budget is missed by more than `TOO_FAR`."""
    target = count_to_keep(keep_of(budget), profile.size) / profile.size
    if abs(reached - target) > TOO_FAR * target:
        raise UserError(note)
    return note


def plain_json(content: Mapping[str, object]) -> dict[str, Any]:
    """Return the content as JSON values: lists for tuples, text for enumeration members."""
    return json.loads(json.dumps(content))
