"""The cost of a schedule, computed without training: visual tokens, compression ratio and FLOPs of each stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from vlmzip.compressor import Profile
from vlmzip.models.family import Family
from vlmzip.runtime.flops import prefill_flops
from vlmzip.training.schedule import Schedule, written
from vlmzip.visualize.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A bar of at most this height, in percent, has its label above it.
LOW = 20


@dataclass(frozen=True)
class StageCost:
    """The cost of training on one image and its text in one stage."""

    compressor: str
    begins: Fraction
    ends: Fraction
    steps: int
    tokens: float | None
    """Visual tokens of an image, summed over all LLM layers; `None` if they depend on the image's content."""
    of: int
    """The same sum without compression."""
    flops: float | None
    """FLOPs of the LLM's forward pass, as a fraction of those without compression. The backward pass takes twice the
    forward's FLOPs in both cases, so the fraction also holds for training."""
    printed: tuple[str, ...] = ()
    """Numbers that a paper prints for this stage; the caller adds them."""

    @property
    def ratio(self) -> float | None:
        """Return the compression ratio (LLaVolta's Eq. 3)."""
        return None if self.tokens is None else self.of / self.tokens


@dataclass(frozen=True)
class Cost:
    """The cost of a whole schedule, as means over its optimiser steps."""

    stages: tuple[StageCost, ...]
    tokens: float | None
    flops: float | None
    printed: tuple[str, ...] = ()

    @property
    def ratio(self) -> float | None:
        return None if self.tokens is None else self.stages[0].of / self.tokens


def profile_of(family: Family, views: int | None = None) -> Profile:
    """Return the profile of an image or, if `views` is given, of a video or an image with so many equal views."""
    if views is None:
        return family.profile()
    of_view = family.modalities[-1].profile()
    return replace(of_view, tiles=(of_view.grid,) * (views - 1))


def explain(schedule: Schedule, family: Family, steps: int, text_tokens: int, profile: Profile | None = None) -> Cost:
    """Return the cost of a schedule for images at the model's resolution, each with `text_tokens` text tokens.

    With `profile`, it is the cost for such images or videos. The family's model needs no weights and can be on the
    "meta" device. Raise `UserError` for a stage whose layers the LLM does not have.
    """
    profile, whole = profile or family.profile(), schedule.ends
    plain = prefill_flops(family, profile.size + text_tokens)
    stages = []
    for number, (stage, count) in enumerate(zip(schedule.stages, schedule.steps(steps), strict=True)):
        compressor = stage.compressor.placed(profile)  # as `attach` does
        by_layer = compressor.cases_by_layer(profile)
        flops = None
        if by_layer is not None:
            cases = [prefill_flops(family, [text_tokens + n for n in counts]) for counts in by_layer]
            flops = sum(cases) / len(cases) / plain
        stages.append(
            StageCost(
                written(compressor, label=True),
                whole[number - 1] if number else Fraction(),
                whole[number],
                count,
                None if by_layer is None else sum(map(sum, by_layer)) / len(by_layer),
                profile.size * profile.layers,
                flops,
            )
        )
    run = [stage for stage in stages if stage.steps]
    counts = [stage.steps for stage in run]
    return Cost(
        tuple(stages),
        _mean([stage.tokens for stage in run], counts),
        _mean([stage.flops for stage in run], counts),
    )


def _mean(values: Sequence[float | None], steps: Sequence[int]) -> float | None:
    known = [value * count for value, count in zip(values, steps, strict=True) if value is not None]
    return sum(known) / sum(steps) if len(known) == len(values) else None


# ---------------------------------------------------------------- output


COLUMNS = ("stage", "progress", "steps", "compressor", "tokens over all layers", "CR", "LLM FLOPs", "paper")


def lines(cost: Cost) -> list[list[str]]:
    """Return table rows with the columns `COLUMNS`: one row per stage, and a last one for the whole schedule."""
    rows = [
        [
            str(number),
            f"{float(stage.begins):.0%} to {float(stage.ends):.0%}",
            f"{stage.steps:,}",
            stage.compressor,
            _number(stage.tokens, "{:,.0f}"),
            _number(stage.ratio and 100 * stage.ratio, "{:.2f} %"),
            _number(stage.flops, "{:.1%}"),
            ", ".join(stage.printed),
        ]
        for number, stage in enumerate(cost.stages, 1)
    ]
    total = ["all", "", f"{sum(stage.steps for stage in cost.stages):,}", "", _number(cost.tokens, "{:,.0f}")]
    total += [_number(cost.ratio and 100 * cost.ratio, "{:.2f} %"), _number(cost.flops, "{:.1%}")]
    return [*rows, [*total, ", ".join(cost.printed)]]


def _number(value: float | None, form: str) -> str:
    return "the images decide" if value is None else form.format(value)


def as_json(cost: Cost) -> dict[str, object]:
    """Return the cost as JSON values. Values that depend on the images are `None`."""
    stages = [
        {**dataclasses.asdict(stage), "begins": float(stage.begins), "ends": float(stage.ends), "ratio": stage.ratio}
        for stage in cost.stages
    ]
    return {**dataclasses.asdict(cost), "stages": stages, "ratio": cost.ratio}


def draw_staircase(cost: Cost, title: str) -> Figure:
    """Draw the visual tokens over the course of training, in percent of those without compression.

    Stages whose count depends on the images are hatched over the whole height. Raise `UserError` if matplotlib is not
    installed.
    """
    figure = new_figure(8, 4)
    axes = figure.subplots()
    for stage in cost.stages:
        left, right = 100 * float(stage.begins), 100 * float(stage.ends)
        height = 100.0 if stage.tokens is None else 100 * stage.tokens / stage.of
        look = {"hatch": "//", "facecolor": "none"} if stage.tokens is None else {"facecolor": "C0", "alpha": 0.35}
        axes.bar(left, height, right - left, align="edge", edgecolor="C0", linewidth=1.5, **look)
        ratio = "the images decide" if stage.ratio is None else f"CR {stage.ratio:.2f}x"
        axes.text(
            (left + right) / 2,
            height / 2 if height > LOW else height + LOW / 2,
            stage.compressor.replace("+", "\n+") + "\n" + ratio,
            ha="center", va="center", fontsize="small", bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0},
        )  # fmt: skip
    axes.set(xlabel="optimiser steps taken, %", ylabel="visual tokens over all LLM layers, %", title=title)
    axes.set(xlim=(0, 100), ylim=(0, 105))
    axes.spines[["top", "right"]].set_visible(False)
    return figure
