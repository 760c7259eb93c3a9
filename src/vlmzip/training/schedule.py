"""Which compressor a model is trained with, and when: plain data that knows no model and no trainer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from vlmzip import catalogue, spec
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, closest
from vlmzip.methods import Chain, LLaVolta, NoCompression
from vlmzip.outline import METHOD_FORMS
from vlmzip.training.random_factor import RandomFactor

#: Depth of the LLM that LLaVolta's layers are given for (Vicuna-7B).
PUBLISHED_DEPTH = 32
NOTHING = "none"
RANDOM_CLASS = "vlmzip.training.random_factor:RandomFactor"
RANDOM = re.compile(r"(?:^|(?<=\+))\s*random_factor\s*(?=[(+]|$)")


@dataclass(frozen=True)
class Stage:
    """A part of training under one compressor."""

    compressor: Compressor
    share: Fraction = Fraction(1)
    """Of all steps, in proportion to the other stages' shares."""


@dataclass(frozen=True)
class Schedule:
    """Stages in their order, and what the model is used with afterwards."""

    stages: tuple[Stage, ...]
    name: str = ""
    afterwards: Compressor = field(default_factory=NoCompression)
    """What the trained model is evaluated, saved and served with."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("a schedule needs at least one stage")
        for number, stage in enumerate(self.stages, 1):
            if stage.share <= 0:
                raise UserError(f"stage {number} has a share of {stage.share}: give a number above 0")

    @property
    def ends(self) -> list[Fraction]:
        """The progress at which each stage ends; the last one's is 1."""
        total, done, ends = sum((stage.share for stage in self.stages), Fraction()), Fraction(), []
        for stage in self.stages:
            done += stage.share
            ends.append(done / total)
        return ends

    def index(self, progress: Fraction | float) -> int:
        """The number of the stage, from 0, at a progress from 0 (no step taken) to 1 (all taken).

        A stage begins exactly where the one before ends. Give `Fraction(step, steps)` for a number of optimiser steps
        taken: a float can fall on the wrong side of an end such as 1/3. Raises `UserError` for what is no progress.
        """
        if not 0 <= progress <= 1:
            raise UserError(f"progress {progress} is none: give 0 to 1")
        return next((i for i, end in enumerate(self.ends) if progress < end), len(self.stages) - 1)

    def at(self, progress: Fraction | float) -> Stage:
        """The stage at a progress; see `index`."""
        return self.stages[self.index(progress)]

    def steps(self, total: int) -> list[int]:
        """How many of `total` optimiser steps each stage gets."""
        starts = [-(-end.numerator * total // end.denominator) for end in self.ends]  # rounded up: see `index`
        return [end - start for start, end in zip([0, *starts], starts, strict=False)]

    def split(self, shares: Sequence[Any]) -> Schedule:
        """The same stages with other shares, as LLaVolta's Table 9: [25, 75]. 0 leaves a stage out."""
        if len(shares) != len(self.stages):
            raise UserError(f"split={list(shares)} has {len(shares)} shares for {len(self.stages)} stages")
        read = [read_share(share) for share in shares]
        kept = [replace(stage, share=share) for stage, share in zip(self.stages, read, strict=True) if share]
        return replace(self, stages=tuple(kept))


#: LLaVolta's Table 1 (arXiv:2406.20092): (layer, stride) of each stage, `None` where nothing is compressed. All stages
#: of a scheme are equally long.
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
    """One of LLaVolta's seven schemes (section 3.3, Table 1), for an LLM of `depth` layers.

    The published layers 2 and 16 stand for 32 layers; in another LLM they are put proportionally, at 1 at least. The
    last stage's compressor is also what the model is used with: none, but for `last-stage-compression`. Raises
    `UserError` for another name.
    """
    if name not in SCHEMES:
        raise UserError(f"there is no schedule {name!r}{closest(name, SCHEMES)}")
    stages = tuple(Stage(_pooling(place, depth)) for place in SCHEMES[name])
    return Schedule(stages, name, stages[-1].compressor)


def _pooling(place: tuple[int, int] | None, depth: int) -> Compressor:
    if place is None:
        return NoCompression()
    layer, stride = place
    return LLaVolta(layer=max(1, layer * depth // PUBLISHED_DEPTH), stride=stride)


def constant(compressor: Compressor) -> Schedule:
    """One compressor from the first step to the last, and afterwards; random factors are for training alone."""
    return Schedule((Stage(compressor),), spec.write(compressor), _afterwards(compressor))


def _afterwards(last: Compressor) -> Compressor:
    return NoCompression() if isinstance(last, RandomFactor) else last


def read_schedule(content: Any, depth: int = PUBLISHED_DEPTH) -> Schedule:
    """The schedule that a configuration file asks for.

    A name of `SCHEMES`; a compressor in one line; or a mapping: `{name: two-stage, split: [25, 75]}`, or
    `{stages: [{compressor: "llavolta(layer=2,stride=8)", share: 25%}, …]}`; either may have `afterwards`, a compressor.
    Raises `UserError` that names what is wrong.
    """
    if isinstance(content, str):
        if content in SCHEMES:
            return scheme(content, depth)
        own = ":" in content or RANDOM.match(content)  # a file of one's own says better what it lacks
        if spec.is_name(content) and not own and content not in catalogue.available():
            known = (*SCHEMES, "random_factor", *catalogue.available())
            raise UserError(f"schedule: there is no {content!r}{closest(content, known)}")
        return constant(read_compressor(content))
    if not isinstance(content, Mapping):
        raise UserError(f"schedule: {content!r} is none; give a name, a compressor, or stages")
    refuse_unknown("schedule", content, ("name", "split", "stages", "afterwards"))
    if ("name" in content) == ("stages" in content):
        raise UserError("schedule: give name or stages, one of them")
    found = read_schedule(str(content["name"]), depth) if "name" in content else _of_stages(content["stages"])
    if "split" in content:
        if not isinstance(content["split"], list):
            raise UserError(f"schedule: split={content['split']!r} is no list of shares, such as [25, 75]")
        found = found.split(content["split"])
    if "afterwards" in content:
        found = replace(found, afterwards=read_lasting("schedule: afterwards", content["afterwards"]))
    return found


def _of_stages(content: Any) -> Schedule:
    if not isinstance(content, list) or not all(isinstance(one, Mapping) for one in content):
        raise UserError("schedule: stages is no list of {compressor: …, share: …}")
    stages = []
    for number, one in enumerate(content, 1):
        refuse_unknown(f"stage {number}", one, ("compressor", "share"))
        if "compressor" not in one:
            raise UserError(f"stage {number} names no compressor; for none write compressor: {NOTHING}")
        stages.append(Stage(read_compressor(one["compressor"]), read_share(one.get("share", 1))))
    schedule = Schedule(tuple(stages), "own")
    return replace(schedule, afterwards=_afterwards(stages[-1].compressor))


def read_compressor(content: Any) -> Compressor:
    """A compressor in one line, `none`, or `random_factor`, which is for training alone.

    Raises `UserError` for what is none, and for `random_factor` in a chain.
    """
    if content is None or content == NOTHING:
        return NoCompression()
    if not isinstance(content, str):
        raise UserError(f"{content!r} is no compressor; write {METHOD_FORMS}")
    found = spec.read(RANDOM.sub(RANDOM_CLASS, content))
    if isinstance(found, Chain) and any(isinstance(part, RandomFactor) for part in found.stages()):
        raise UserError(f"{content!r}: random_factor cannot be chained; make it a stage of its own, without +")
    return found


def read_lasting(where: str, content: Any) -> Compressor:
    """A compressor that a model can be evaluated, saved and served with.

    Raises `UserError`, which begins with `where`, for random factors: they are for training alone.
    """
    found = read_compressor(content)
    if isinstance(found, RandomFactor):
        raise UserError(f"{where}: random_factor is for training alone; give another compressor, or none")
    return found


def written(compressor: Compressor) -> str:
    """A compressor as a schedule takes it, in one line."""
    return spec.write(compressor).replace(RANDOM_CLASS, "random_factor")


def read_share(content: Any, what: str = "share") -> Fraction:
    """A share as it was written: 0.25, 25, "25%", "1/4". Only their proportion counts. `what` begins an error."""
    try:
        share = Fraction(str(content).strip().removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{what} {content!r} is no number") from None
    if share < 0:
        raise UserError(f"{what} {content!r} is below 0")
    return share


def refuse_unknown(where: str, content: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises `UserError` for a key that nothing reads, with the closest one."""
    for key in content:
        if key not in known:
            raise UserError(f"{where}: there is no {key!r}{closest(str(key), known)}")
