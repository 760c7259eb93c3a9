"""Figures of score over cost: a line for each method through its budgets, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from vlmzip.files import write_whole
from vlmzip.lab.configurations import PLAIN
from vlmzip.lab.results import Result, pareto
from vlmzip.lab.tasks.task import Task
from vlmzip.visualize.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The label of the x axis and the attribute of a result, by cost.
COSTS = {
    "tokens": ("visual tokens kept, mean over all layers of the LLM, %", "reached"),
    "flops": ("prefill FLOPs of the LLM, % of the uncompressed model's", "flops"),
}
#: What the figures show, by cost.
TITLES = {
    "tokens": "Score against visual tokens kept",
    "flops": "Score against prefill FLOPs",
}
MARKERS = "osD^vP*Xhd<>"


def plot_title(what: str, model: str, task: Task) -> str:
    """Return the title of a plot: what it shows, and below that the model and the task in words.

    `model` is a name or a path as the user wrote it; its last part names the model.
    """
    name = PurePath(model).name or model
    return f"{what}\n{name} on {len(task.samples):,} {task.title or 'questions'}"


def draw_curve(results: Sequence[Result], cost: str, title: str) -> Figure:
    """Draw one task's results. `cost` is one of `COSTS`. Raise `UserError` if matplotlib is not installed."""
    label, attribute = COSTS[cost]
    ran = [result for result in results if result.score is not None]
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for number, method in enumerate(dict.fromkeys(result.configuration.method for result in ran)):
        of_method = [result for result in ran if result.configuration.method == method]
        of_method.sort(key=lambda result: getattr(result, attribute))
        _line(axes, of_method, attribute, method, number)
    points = [_point(result, attribute) for result in ran]
    front = [points[place] for place in pareto(points)]
    axes.plot(*zip(*front, strict=True), color="0.6", linewidth=6, alpha=0.4, zorder=0, label="Pareto front")
    axes.set(xlabel=label, ylabel="score, % (95 % intervals)", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG and an SVG file, named by `path` with its suffix replaced."""
    for suffix in (".png", ".svg"):
        write_whole(path.with_suffix(suffix), lambda name: figure.savefig(name))


def _line(axes: Axes, of_method: Sequence[Result], attribute: str, method: str, number: int) -> None:
    colour = "black" if method == PLAIN else f"C{number % 10}"
    points = [_point(result, attribute) for result in of_method]
    errors = [[100 * gap for gap in gaps] for gaps in zip(*(_gaps(result) for result in of_method), strict=True)]
    costs, scores = zip(*points, strict=True)
    axes.errorbar(
        costs, scores, yerr=errors, label=method, color=colour, marker=MARKERS[number % len(MARKERS)],
        markersize=5, linewidth=1.2, elinewidth=0.8, capsize=2, linestyle="-" if number < 10 else "--",
    )  # fmt: skip


def _point(result: Result, attribute: str) -> tuple[float, float]:
    assert result.score is not None
    return 100 * getattr(result, attribute), 100 * result.score.value


def _gaps(result: Result) -> tuple[float, float]:
    assert result.score is not None
    return max(result.score.value - result.score.low, 0.0), max(result.score.high - result.score.value, 0.0)
