"""Draw a search: the loss of every candidate over its cost, the limits, and the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vlmzip.lab.curves import MARKERS
from vlmzip.lab.stats import Estimate
from vlmzip.lab.tune.search import CandidateRow, Tuning
from vlmzip.lab.tune.study import Cost
from vlmzip.visualize.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS: dict[Cost, str] = {
    "tokens": "visual tokens per image, mean over all layers of the LLM",
    "flops": "prefill FLOPs of the LLM, % of the uncompressed model's",
    "ms": "prefill of the LLM, milliseconds",
}

#: What the figure shows, by cost.
TITLES: dict[Cost, str] = {
    "tokens": "Loss of each candidate against visual tokens kept",
    "flops": "Loss of each candidate against prefill FLOPs",
    "ms": "Loss of each candidate against the time of prefill",
}


def draw(tuning: Tuning, chosen: CandidateRow | None, methods: Mapping[int, str], cost: Cost, title: str) -> Figure:
    """Draw score against cost. `methods` has the method of each candidate. Raise `UserError` without matplotlib.

    Scores are differences from the uncompressed model on the same questions. Candidates that were dropped early
    answered fewer questions, and scores on different questions are not comparable.
    """
    scale = 100 if cost == "flops" else 1
    figure = new_figure(8, 5)
    axes = figure.subplots()
    axes.axhline(0, color="black", linewidth=1, label="no_compression")
    for number, method in enumerate(dict.fromkeys(methods.values())):
        mine = [row for row in tuning.rows.values() if methods[row.number] == method and row.loss is not None]
        _points(axes, mine, method, number, scale, tuning.counts[-1])
    if any(0 < row.asked < tuning.counts[-1] for row in tuning.rows.values()):
        axes.plot([], [], "o", color="0.5", markersize=4, fillstyle="none", label="hollow: asked fewer questions")
    _limits(axes, tuning, scale)
    if chosen is not None and chosen.held is not None:
        _choice(axes, chosen, scale)
    axes.set(xlabel=LABELS[cost], ylabel="score minus the uncompressed model's, points", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def _points(axes: Axes, rows: Sequence[CandidateRow], method: str, number: int, scale: float, whole: int) -> None:
    """Draw a method's candidates: filled, with an interval, if they answered the whole choosing half, else hollow."""
    colour, marker = f"C{number % 10}", MARKERS[number % len(MARKERS)]
    asked = [row for row in rows if row.asked == whole]
    fewer = [row for row in rows if row.asked < whole]
    if fewer:
        label = None if asked else method
        axes.plot(
            *_places(fewer, scale), color=colour, marker=marker, linestyle="none", markersize=4, fillstyle="none",
            alpha=0.5, label=label,
        )  # fmt: skip
    if asked:
        errors = _errors([row.loss for row in asked if row.loss])
        # Intervals of methods with equal costs overlap, so the caps of each method have another width.
        axes.errorbar(
            *_places(asked, scale), yerr=errors, color=colour, marker=marker, linestyle="none", markersize=6,
            markeredgecolor="white", markeredgewidth=0.5, elinewidth=0.8, capsize=2 + 1.5 * (number % 5), label=method,
        )  # fmt: skip


def _places(rows: Sequence[CandidateRow], scale: float) -> tuple[list[float], list[float]]:
    return [scale * row.cost for row in rows], [-100 * row.loss.value for row in rows if row.loss]


def _errors(losses: Sequence[Estimate]) -> list[list[float]]:
    """Return how far the intervals reach below and above their points.

    Losses are drawn downwards, so the high end of an interval is the lower one.
    """
    below = [max(100 * (loss.high - loss.value), 0.0) for loss in losses]
    return [below, [max(100 * (loss.value - loss.low), 0.0) for loss in losses]]


def _limits(axes: Axes, tuning: Tuning, scale: float) -> None:
    if tuning.target.most is not None:
        axes.axvline(scale * tuning.target.most, label="limits", color="crimson", linestyle=":", linewidth=1.2)
    if tuning.target.loss is not None:
        label = "limits" if tuning.target.most is None else None
        axes.axhline(-100 * tuning.target.loss, label=label, color="crimson", linestyle=":", linewidth=1.2)


def _choice(axes: Axes, chosen: CandidateRow, scale: float) -> None:
    """Draw the choice at its cost and loss on the confirming half."""
    assert chosen.held is not None
    place = scale * chosen.held.cost, -100 * chosen.held.loss.value
    axes.errorbar(
        *place, yerr=_errors([chosen.held.loss]), color="black", marker="*", markersize=13,
        markerfacecolor="gold", elinewidth=0.8, capsize=10, linestyle="none", zorder=5, label="chosen, confirming half",
    )  # fmt: skip
