"""Methods at budgets, for each task: what will run, and why the rest cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from vlmzip import catalogue, spec
from vlmzip.compressor import Calibratable, Compressor, Profile, missed
from vlmzip.errors import UserError, collecting_warnings
from vlmzip.keep import AS_SET, count_to_keep, parse_keep
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
#: A nearest setting farther from the budget than this share of it is no answer to the question.
TOO_FAR = 0.25
#: Questions whose images tell how large the grids of a task are.
LOOK_AT = 32


@dataclass(frozen=True)
class Configuration:
    """A method at a budget on a task: a row of the tables."""

    task: str
    method: str
    """As it was written."""
    budget: str
    """As it was written."""
    compressor: Compressor | None
    note: str = ""
    """Why there is no compressor, or what is unusual about it."""
    calibrated_on: str = ""
    """The images that set the method's threshold."""

    @property
    def is_plain(self) -> bool:
        """Whether this is the uncompressed model, which all others are compared with."""
        return self.method == PLAIN

    @property
    def settings(self) -> dict[str, Any] | None:
        """The compressor as JSON gives it back."""
        return None if self.compressor is None else plain_json(self.compressor.to_dict())


def read_rows(methods: str | None, keep: str) -> tuple[list[Candidate], list[str]]:
    """The methods and budgets of two lists with commas, `--methods` and `--keep`.

    Raises `UserError` for an invalid method, and for a method that already sets a budget beside `budgets`.
    """
    candidates, budgets = spec.candidates(methods), read_budgets(keep)
    if set(budgets) != {AS_SET}:
        for one in candidates:
            spec.refuse_second_budget(one.name, keep, f"take the budget out of the method, or give --keep {AS_SET}")
    return candidates, budgets


def read_budgets(text: str) -> list[str]:
    """The budgets of a list with commas. Raises `UserError` for what is none."""
    budgets = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not budgets:
        raise UserError("--keep names no budget; separate them with commas: --keep 50%,25%")
    for budget in budgets:
        if budget != AS_SET:
            parse_keep(budget, "--keep")
    return budgets


@dataclass
class Configurator:
    """Sets methods to budgets on one model; what calibration measures is measured once for all budgets."""

    model: nn.Module
    answerer: Answerer
    name: str
    """Where the model came from; a compressor saved there brings its weights."""
    calibrated: list[dict[str, Any]] = field(default_factory=list)
    """Calibrations that were made before, and those that are made now; as JSON. A run that goes on, perhaps elsewhere,
    must go on with the same thresholds."""
    _measured: dict[tuple[str, str], list[MeasuredImage]] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)

    def rows(self, task: Task, methods: Sequence[Candidate], budgets: Sequence[str]) -> Iterator[Configuration]:
        """The uncompressed model, then every method at every budget; where one cannot be, the reason."""
        yield Configuration(task.name, PLAIN, WHOLE, NoCompression())
        profile = self.profile(task)
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
            chosen, reached = method.at_budget(budget, profile)
            note = _near(budget, reached, profile)
        with collecting_warnings() as notes:  # attaching fails if the method has no place in the model
            attach(self.model, chosen, weights=saved_weights(chosen, self.name)).detach()
        told = "; ".join(filter(None, [note, *notes]))
        return Configuration(task.name, candidate.name, budget, chosen, told, calibrated_on)

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
        found = meet(method, self._measured[images], budget).compressor
        self.calibrated.append({**key, "compressor": plain_json(found.to_dict())})
        return found

    def _digest(self, calibration: CalibrationSet) -> str:
        if calibration.about not in self._digests:
            self._digests[calibration.about] = calibration.digest
        return self._digests[calibration.about]

    def profile(self, task: Task) -> Profile:
        """The shape that budgets are set for: where images have grids of their own, the median of the first ones.

        A task that does not tell its questions beforehand has the model's own.
        """
        if not task.samples:
            return self.answerer.adapter.profile()
        first = {sample.image: sample for sample in task.samples[:LOOK_AT]}.values()
        inputs = self.answerer.inputs([sample.load() for sample in first], [""] * len(first))
        seen = [layout.unpadded()[0] for layout in self.answerer.adapter.layouts(inputs)]
        layouts = sorted(seen, key=lambda layout: layout.size)
        grid, *tiles = layouts[(len(layouts) - 1) // 2].views
        return replace(self.answerer.adapter.profile(), grid=grid, tiles=tuple(tiles))


def read_calibrated(path: Path, known: Mapping[str, object]) -> list[dict[str, object]]:
    """Return the calibrations that a run noted in a file. Raise `UserError` if it holds anything else."""
    found = known.get("calibrated", [])
    names = ("task", "method", "budget", "on", "code", "images")

    def is_whole(one: Any) -> bool:
        texts = isinstance(one, dict) and all(isinstance(one.get(name), str) for name in names)
        return texts and isinstance(one.get("compressor"), dict) and "method" in one["compressor"]

    if not isinstance(found, list) or not all(map(is_whole, found)):
        raise UserError(f"{str(path)!r} cannot be read: calibrated is not what vlmzip writes; give another --out")
    return found


def _near(budget: str, reached: float, profile: Profile) -> str:
    """What to say about a budget that is missed. Raises `UserError` where it is missed by far."""
    wanted = count_to_keep(budget, profile.size) / profile.size
    said = missed(budget, reached, profile)
    if abs(reached - wanted) > TOO_FAR * wanted:
        raise UserError(said)
    return said


def plain_json(content: dict[str, Any]) -> dict[str, Any]:
    """The content as JSON gives it back: lists for tuples, text for members of enumerations."""
    return json.loads(json.dumps(content))
