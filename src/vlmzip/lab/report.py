"""The study as one web page that needs nothing else: tables, curves, and images whose answers changed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from PIL import Image

from vlmzip.lab.examples import Example
from vlmzip.lab.results import Result
from vlmzip.lab.stats import DRAWS, Estimate
from vlmzip.lab.tasks.task import Task
from vlmzip.visualize.page import Card, card_html, data_uri, document, legend_html, notes_html, table_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTHING = "—"
#: Intervals come from drawing images again; drawn from fewer than this they are narrower than they should be.
FEW = 20
COLUMNS = ("method", "budget", "reached", "visual tokens", "prefill FLOPs", "score %", "against plain", "changed")
#: Where there is little room, without the tokens by layer and with half an interval for a whole one.
SHORT_COLUMNS = ("method", "budget", "reached", "FLOPs", "score %", "vs plain", "changed")


@dataclass(frozen=True)
class Chapter:
    """One task."""

    task: Task
    found: Sequence[Result]
    figures: Sequence[Figure]
    examples: Sequence[tuple[Result, Sequence[Example]]]


def render_report(title: str, facts: Sequence[str], chapters: Sequence[Chapter], notes: Sequence[str]) -> str:
    return document(title, facts, "\n".join(map(_chapter, chapters)) + notes_html(notes))


def cells(result: Result) -> list[str]:
    """A result in words, one for each of `COLUMNS`, then one for each further share of the metric."""
    one = result.configuration
    if result.score is None or result.against_plain is None:
        return [one.method, one.budget, *[NOTHING] * (len(COLUMNS) - 2)]
    return [
        one.method,
        one.budget,
        f"{result.reached:.1%}",
        result.tokens,
        f"{result.flops:.1%}",
        percent(result.score),
        NOTHING if one.is_plain else signed(result.against_plain),
        f"{len(result.changed):,}",
        *map(percent, result.shares.values()),
    ]


def notes(seed: int) -> list[str]:
    """How the numbers are to be read."""
    return [
        f"[low, high], or ± half of that width: 95 % intervals, from {DRAWS:,} draws of the images (seed {seed});"
        " against plain: paired, on the same questions",
        "reached: visual tokens over all layers of the LLM, as a share of those without compression; prefill FLOPs: of"
        " the LLM alone, likewise",
        "changed: answers that are other ones than without compression, right or wrong",
    ]


def size(task: Task) -> str:
    """How many questions about how many images, and what so few images mean for intervals."""
    images = len({sample.image for sample in task.samples})
    said = f"{len(task.samples):,} questions about {images:,} image{'s'[: images != 1]}"
    if images == 1:
        return f"{said}: intervals, drawn from images, mean nothing"
    return said if images >= FEW else f"{said}: too few for the intervals to be trusted"


def percent(found: Estimate) -> str:
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def signed(found: Estimate) -> str:
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def short_cells(result: Result) -> list[str]:
    """A result in few words, one for each of `SHORT_COLUMNS`, then one for each further share of the metric."""
    one = result.configuration
    if result.score is None or result.against_plain is None:
        return [one.method, one.budget, *[NOTHING] * (len(SHORT_COLUMNS) - 2)]
    difference = f"{100 * result.against_plain.value:+.1f} ± {100 * result.against_plain.half:.1f}"
    scores = [f"{100 * found.value:.1f} ± {100 * found.half:.1f}" for found in (result.score, *result.shares.values())]
    return [
        one.method,
        one.budget,
        f"{result.reached:.1%}",
        f"{result.flops:.1%}",
        scores[0],
        NOTHING if one.is_plain else difference,
        f"{len(result.changed):,}",
        *scores[1:],
    ]


def reasons(found: Sequence[Result]) -> list[str]:
    """What has to be said about rows: why some are empty, what is unusual, what a threshold was set from."""
    told: dict[tuple[str, str], list[str]] = {}
    for result in found:
        one = result.configuration
        calibrated = one.calibrated_on and result.score is not None
        for reason in (result.note, f"threshold set from {one.calibrated_on}" if calibrated else ""):
            if reason:
                told.setdefault((one.method, reason), []).append(one.budget)
    return [f"{method} at {', '.join(budgets)}: {reason}" for (method, reason), budgets in told.items()]


def _chapter(chapter: Chapter) -> str:
    task, found = chapter.task, chapter.found
    rows = [(cells(result), False) for result in found]
    return f"""<section class="plain">
<h2>{escape(task.name)}</h2>
<p class="facts">{escape(f"{task.about}; {task.metric.about}; {size(task)}")}</p>
{table_html([*COLUMNS, *task.metric.shares], rows)}
{notes_html(reasons(found))}
<div class="curves">{"".join(map(_figure, chapter.figures))}</div>
{_groups(found)}
</section>
<section>
<h3>Answers that changed: {escape(task.name)}</h3>
{legend_html()}
{"".join(_examples(result, some) for result, some in chapter.examples)}
</section>
"""


def _figure(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    title = escape(figure.axes[0].get_title())
    return f'<img src="{data_uri(Image.open(buffer).convert("RGB"))}" alt="{title}">'


def _groups(found: Sequence[Result]) -> str:
    """Scores by group, a table for each way to group."""
    ran = [result for result in found if result.score is not None]
    tables = []
    for name in dict.fromkeys(name for result in ran for name, _ in result.groups):
        groups = [group for group in ran[0].groups if group[0] == name]
        counts = [f"{value} ({ran[0].groups[name, value][1]:,})" for name, value in groups]
        rows = [
            (
                [
                    one.configuration.method,
                    one.configuration.budget,
                    *(f"{100 * one.groups[g][0]:.1f}" for g in groups),
                ],
                False,
            )
            for one in ran
        ]
        tables.append(
            f"<h3>Score % by {escape(name)} (questions)</h3>{table_html(['method', 'budget', *counts], rows)}"
        )
    return "".join(tables)


def _examples(result: Result, some: Sequence[Example]) -> str:
    one = result.configuration
    head = f"{one.method} at {one.budget}: {len(result.changed):,} of {len(result.records):,} answers changed"
    if len(some) < len(result.changed):
        head += f", {len(some)} of them drawn by chance"
    cards = "".join(card_html(_card(example)) for example in some)
    return f'<details open><summary>{escape(head)}</summary><section class="cards wide">{cards}</section></details>\n'


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
