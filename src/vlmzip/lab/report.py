"""The report of a study: one self-contained web page with tables, curves, and images whose answers changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from PIL import Image

from vlmzip.lab import results
from vlmzip.lab.examples import Example
from vlmzip.lab.results import Result
from vlmzip.lab.stats import DRAWS
from vlmzip.lab.table import Table
from vlmzip.lab.tasks.task import Task
from vlmzip.visualize.figure import as_image
from vlmzip.visualize.page import Card, render_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: With fewer images than this, bootstrap intervals are too narrow.
FEW = 20


@dataclass(frozen=True)
class Chapter:
    """A chapter of the report: one task."""

    task: Task
    found: Sequence[Result]
    figures: Sequence[Figure]
    examples: Sequence[tuple[Result, Sequence[Example]]]

    @property
    def facts(self) -> str:
        return f"{self.task.about}; {self.task.metric.about}; {size(self.task)}"

    @cached_property
    def table(self) -> Table[Result]:
        return results.table(self.found, short=False)

    @property
    def rows(self) -> list[tuple[list[str], bool]]:
        return [(self.table.texts(result), False) for result in self.found]

    @property
    def reasons(self) -> list[str]:
        return reasons(self.found)

    @property
    def curves(self) -> list[tuple[Image.Image, str]]:
        """Return the figures as images, with their titles."""
        return [(as_image(figure, dpi=110), figure.axes[0].get_title()) for figure in self.figures]

    @property
    def groups(self) -> list[tuple[str, list[str], list[tuple[list[str], bool]]]]:
        return _groups(self.found)

    @property
    def changed(self) -> list[tuple[str, list[Card]]]:
        return [_changed(result, some) for result, some in self.examples]


def render_report(title: str, facts: Sequence[str], chapters: Sequence[Chapter], notes: Sequence[str]) -> str:
    return render_page("report.html.j2", title, facts, "vlmzip.lab", chapters=chapters, notes=notes)


def notes(seed: int) -> list[str]:
    """Return how to read the numbers."""
    return [
        f"[low, high], or ± half of that width: 95 % intervals, from {DRAWS:,} draws of the images (seed {seed});"
        " against plain: paired, on the same questions",
        "reached: visual tokens over all layers of the LLM, as a share of those without compression; prefill FLOPs: of"
        " the LLM alone, likewise",
        "changed: answers that differ from those without compression, right or wrong",
    ]


def size(task: Task) -> str:
    """Return the numbers of questions and images, with a warning if so few images make intervals unreliable."""
    images = len({sample.image for sample in task.samples})
    counts = f"{len(task.samples):,} questions about {images:,} image{'s'[: images != 1]}"
    if images == 1:
        return f"{counts}: intervals, drawn from images, mean nothing"
    return counts if images >= FEW else f"{counts}: too few for the intervals to be trusted"


def reasons(results_of_task: Sequence[Result]) -> list[str]:
    """Return notes about rows: why some are empty, what is unusual, which images set a threshold."""
    budgets_by_note: dict[tuple[str, str], list[str]] = {}
    for result in results_of_task:
        configuration = result.configuration
        calibrated = configuration.calibrated_on and result.score is not None
        for reason in (result.note, f"threshold set from {configuration.calibrated_on}" if calibrated else ""):
            if reason:
                budgets_by_note.setdefault((configuration.method, reason), []).append(configuration.budget)
    return [f"{method} at {', '.join(budgets)}: {reason}" for (method, reason), budgets in budgets_by_note.items()]


def _groups(results_of_task: Sequence[Result]) -> list[tuple[str, list[str], list[tuple[list[str], bool]]]]:
    """Return scores by group, a table for each way to group: its name, columns and rows."""
    ran = [result for result in results_of_task if result.score is not None]
    tables = []
    for name in dict.fromkeys(name for result in ran for name, _ in result.groups):
        groups = [group for group in ran[0].groups if group[0] == name]
        counts = [f"{value} ({ran[0].groups[name, value][1]:,})" for name, value in groups]
        rows = [(_group_cells(result, groups), False) for result in ran]
        tables.append((name, ["method", "budget", *counts], rows))
    return tables


def _group_cells(result: Result, groups: Sequence[tuple[str, str]]) -> list[str]:
    configuration = result.configuration
    return [configuration.method, configuration.budget, *(f"{100 * result.groups[group][0]:.1f}" for group in groups)]


def _changed(result: Result, examples: Sequence[Example]) -> tuple[str, list[Card]]:
    """Return the heading of the changed answers, and their cards."""
    configuration = result.configuration
    changed = f"{len(result.changed):,} of {len(result.records):,} answers changed"
    head = f"{configuration.method} at {configuration.budget}: {changed}"
    if len(examples) < len(result.changed):
        head += f", {len(examples)} of them chosen at random"
    return head, [_card(example) for example in examples]


def _card(example: Example) -> Card:
    right = " or ".join(dict.fromkeys(example.sample.answers))
    answers = f"{example.plain['given'] or '(empty)'} → {example.compressed['given'] or '(empty)'}"
    return Card(
        example.sample.question,
        answers,
        f"{example.kind}; right: {right}; {example.tokens} of {example.compressed['visual_tokens']} visual tokens",
        example.kind == "lost",
        [example.image],
    )
