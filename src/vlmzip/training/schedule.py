"""A training schedule: the compressor of each stage, as plain data that knows no model and no trainer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from vlmzip import catalogue, spec
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, closest, refuse_unknown
from vlmzip.methods import LLaVolta, NoCompression
from vlmzip.outline import METHOD_FORMS, is_name

#: Layers of the LLM for which LLaVolta publishes its layers (Vicuna-7B).
PUBLISHED_DEPTH = 32
NOTHING = "none"
RANDOM_CLASS = "vlmzip.training.random_factor:RandomFactor"
RANDOM = re.compile(r"(?:^|(?<=\+))\s*random_factor\s*(?=[(+]|$)")


@dataclass(frozen=True)
class Stage:
    """A part of the training with one compressor."""

    compressor: Compressor
    share: Fraction = Fraction(1)
    """The stage's share of all steps, in proportion to the shares of the other stages."""


@dataclass(frozen=True)
class Schedule:
    """The stages of a training in order, and the compressor for afterwards."""

    stages: tuple[Stage, ...]
    name: str = ""
    afterwards: Compressor = field(default_factory=NoCompression)
    """The compressor with which the trained model is evaluated, saved and served."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("a schedule needs at least one stage")
        for number, stage in enumerate(self.stages, 1):
            if stage.share <= 0:
                raise UserError(f"stage {number} has a share of {stage.share}: give a number above 0")

    @property
    def ends(self) -> list[Fraction]:
        """Return the progress at which each stage ends; the last stage ends at 1."""
        total, done, ends = sum((stage.share for stage in self.stages), Fraction()), Fraction(), []
        for stage in self.stages:
            done += stage.share
            ends.append(done / total)
        return ends

    def index(self, progress: Fraction | float) -> int:
        """Return the number of the stage, from 0, at a progress from 0 (no step taken) to 1 (all steps taken).

        A stage begins exactly where the previous one ends. For optimiser steps, give `Fraction(step, steps)`: a float
        can fall on the wrong side of an end such as 1/3. Raise `UserError` for a progress outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise UserError(f"progress must be in [0, 1], got {progress}")
        return next((i for i, end in enumerate(self.ends) if progress < end), len(self.stages) - 1)

    def at(self, progress: Fraction | float) -> Stage:
        """Return the stage at a progress; see `index`."""
        return self.stages[self.index(progress)]

    def steps(self, total: int) -> list[int]:
        """Return the number of steps of each stage, out of `total` optimiser steps."""
        stops = [-(-end.numerator * total // end.denominator) for end in self.ends]  # rounded up: see `index`
        return [stop - start for start, stop in zip([0, *stops], stops, strict=False)]

    def split(self, shares: Sequence[object]) -> Schedule:
        """Return the same stages with other shares, such as [25, 75] (LLaVolta, Table 9). 0 leaves a stage out."""
        if len(shares) != len(self.stages):
            raise UserError(f"split={list(shares)} has {len(shares)} shares for {len(self.stages)} stages")
        fractions = [read_share(share) for share in shares]
        kept = [replace(stage, share=share) for stage, share in zip(self.stages, fractions, strict=True) if share]
        return replace(self, stages=tuple(kept))


#: LLaVolta's schemes (arXiv:2406.20092, Table 1): (layer, stride) of each stage, `None` for no compression. All stages
#: of a scheme have equal shares.
SCHEMES: dict[str, tuple[tuple[int, int] | None, ...]] = {
    "none": (None,),
    "two-stage": ((2, 8), None),
    "three-stage-deeper": ((2, 8), (16, 8), None),
    "three-stage-wider": ((2, 8), (2, 2), None),
    "four-stage-wider-then-deeper": ((2, 8), (2, 2), (16, 2), None),
    "four-stage-deeper-then-wider": ((2, 8), (16, 8), (16, 2), None),
    "last-stage-compression": ((2, 16), (16, 16), (16, 4)),
}


def scheme(name: str, depth: int = PUBLISHED_DEPTH) -> Schedule:
    """Return one of LLaVolta's seven schemes (section 3.3, Table 1) for an LLM of `depth` layers.

    The published layers 2 and 16 are those of 32 layers. They are scaled to `depth`, and are at least 1. The last
    stage's compressor is also the one for afterwards; only `last-stage-compression` compresses there. Raise
    `UserError` for an unknown name.
    """
    if name not in SCHEMES:
        raise UserError(f"unknown schedule {name!r}{closest(name, SCHEMES)}")
    stages = tuple(Stage(_pooling(place, depth)) for place in SCHEMES[name])
    return Schedule(stages, name, stages[-1].compressor)


def _pooling(place: tuple[int, int] | None, depth: int) -> Compressor:
    if place is None:
        return NoCompression()
    layer, stride = place
    return LLaVolta(layer=max(1, layer * depth // PUBLISHED_DEPTH), stride=stride)


def constant(compressor: Compressor) -> Schedule:
    """Return the schedule with one compressor for the training and afterwards.

    Random factors are only for training; afterwards there is no compression.
    """
    return Schedule((Stage(compressor),), spec.write(compressor), _afterwards(compressor))


def _afterwards(last: Compressor) -> Compressor:
    return NoCompression() if last.for_training_only else last


def read_schedule(content: object, depth: int = PUBLISHED_DEPTH) -> Schedule:
    """Return the schedule of a configuration file.

    `content` is a name of `SCHEMES`, a compressor in one line, or a mapping: `{name: two-stage, split: [25, 75]}` or
    `{stages: [{compressor: "llavolta(layer=2,stride=8)", share: 25%}, …]}`. Either mapping may have `afterwards`, a
    compressor. Raise `UserError` that names the mistake.
    """
    if isinstance(content, str):
        if content in SCHEMES:
            return scheme(content, depth)
        # `read_compressor` has the better message for a missing file of the user's own.
        elsewhere = ":" in content or RANDOM.match(content)
        if is_name(content) and not elsewhere and content not in catalogue.available():
            known = (*SCHEMES, "random_factor", *catalogue.available())
            raise UserError(f"schedule: unknown schedule or method {content!r}{closest(content, known)}")
        return constant(read_compressor(content))
    if not isinstance(content, Mapping):
        raise UserError(f"schedule: {content!r} is not a schedule; give a name, a compressor, or stages")
    refuse_unknown("schedule", content, ("name", "split", "stages", "afterwards"))
    if ("name" in content) == ("stages" in content):
        raise UserError("schedule: give name or stages, and not both")
    schedule = read_schedule(str(content["name"]), depth) if "name" in content else _of_stages(content["stages"])
    if "split" in content:
        if not isinstance(content["split"], list):
            raise UserError(f"schedule: split must be a list of shares such as [25, 75], got {content['split']!r}")
        schedule = schedule.split(content["split"])
    if "afterwards" in content:
        schedule = replace(schedule, afterwards=read_lasting("schedule: afterwards", content["afterwards"]))
    return schedule


def _of_stages(content: object) -> Schedule:
    if not isinstance(content, list) or not all(isinstance(entry, Mapping) for entry in content):
        raise UserError("schedule: stages must be a list of {compressor: …, share: …}")
    stages = []
    for number, entry in enumerate(content, 1):
        refuse_unknown(f"stage {number}", entry, ("compressor", "share"))
        if "compressor" not in entry:
            raise UserError(f"stage {number} has no compressor; for no compression write compressor: {NOTHING}")
        stages.append(Stage(read_compressor(entry["compressor"]), read_share(entry.get("share", 1))))
    schedule = Schedule(tuple(stages), "own")
    return replace(schedule, afterwards=_afterwards(stages[-1].compressor))


def read_compressor(content: object) -> Compressor:
    """Return a compressor from one line, `none`, or `random_factor`, which is only for training.

    Raise `UserError` for anything else, and for `random_factor` in a chain.
    """
    if content is None or content == NOTHING:
        return NoCompression()
    if not isinstance(content, str):
        raise UserError(f"{content!r} is not a compressor; write {METHOD_FORMS}")
    return spec.read(RANDOM.sub(RANDOM_CLASS, content))


def read_lasting(where: str, content: object) -> Compressor:
    """Return a compressor with which a model can be evaluated, saved and served.

    Raise `UserError`, which begins with `where`, for random factors: they are only for training.
    """
    compressor = read_compressor(content)
    if compressor.for_training_only:
        raise UserError(f"{where}: {compressor.name()} is for training only; give another compressor, or none")
    return compressor


def written(compressor: Compressor, *, label: bool = False) -> str:
    """Return a compressor in one line, in the form that schedules accept; see `spec.write`."""
    return spec.write(compressor, label=label).replace(RANDOM_CLASS, "random_factor")


def read_share(content: object, what: str = "share") -> Fraction:
    """Return a share such as 0.25, 25, "25%" or "1/4" as a number; only proportions count. `what` begins an error."""
    try:
        share = Fraction(str(content).strip().removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{what} {content!r} is not a number") from None
    if share < 0:
        raise UserError(f"{what} {content!r} is below 0")
    return share
