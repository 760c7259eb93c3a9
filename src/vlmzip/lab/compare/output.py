"""The result of `compare`: a table, JSON, a contact sheet, and a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image

from vlmzip.keep import parse_keep
from vlmzip.lab.asking import TimedAnswer
from vlmzip.lab.budgets import counts_remaining, keep_of
from vlmzip.lab.compare.compare import PLAIN, MethodRow
from vlmzip.lab.table import ABSENT, Column, Table, V, show_bytes, show_flops
from vlmzip.runtime.report import ImageReport, Report, compact
from vlmzip.version import __version__
from vlmzip.visualize.page import Card, render
from vlmzip.visualize.sheet import Panel, contact_sheet
from vlmzip.visualize.views import fates_of_views, plain_views

#: Return the views of every image of a report, as the encoder saw them.
Seen = Callable[[Report], list[list[Image.Image]]]

DIFFERS = "≠ "
PARTS = ("vision encoder", "selection", "LLM")
#: The number of columns about the answer. The other columns are about its cost.
OUTCOME = 5


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison, the plain model's first, and their conditions."""

    rows: list[MethodRow]
    model: str
    question: str
    paths: list[str]
    keep: str | None
    """The budget, as `vlmzip.lab.budgets` writes it; `None`: methods keep their own settings."""
    repeats: int
    device: torch.device
    dtype: torch.dtype

    @property
    def plain(self) -> TimedAnswer:
        assert self.rows[0].first is not None
        return self.rows[0].first

    @property
    def title(self) -> str:
        return printable(self.question)

    @property
    def budget(self) -> str:
        """Return the budget in words."""
        before = " and ".join(dict.fromkeys(f"{image.before:,}" for image in self.plain.report.images))
        if self.keep is None:
            return f"methods with their own settings, {before} visual tokens per image, {self.model}"
        keep = min(parse_keep(keep_of(self.keep)), max(i.before for i in self.plain.report.images))
        share = str(keep) if isinstance(keep, int) else f"{100 * keep:.3g}%"
        counted = "remain after the method acts" if counts_remaining(self.keep) else "on average over the LLM's layers"
        return f"{share} of {before} visual tokens per image {counted}, {self.model}"

    @cached_property
    def noted(self) -> list[MethodRow]:
        """Return the rows with a footnote, in the order of its number."""
        return [row for row in self.rows if row.note]

    @cached_property
    def table(self) -> Table[MethodRow]:
        """Return a table with a row for each method. A method that did not run has only its name and a note."""
        columns: list[Column[MethodRow]] = [
            Column(lambda row: row.method, key="method"),
            Column(self._numbered, "method"),
            Column(lambda row: row.note or None, key="note"),
            Column(lambda row: row.first.text if row.first else None, key="answer"),
            Column(self.answer, "answer"),
            _ran(lambda row, first: row.differs, key="differs"),
            _ran(lambda row, first: first.report.compressor.to_dict(), key="compressor"),
            _ran(lambda row, first: first.report.by_layer, "visual tokens", compact, "visual_tokens_by_layer"),
            _ran(lambda row, first: list(map(_counted, first.report.images)), key="images"),
            _ran(lambda row, first: first.report.retention, "retention", "{:.1%}".format, "retention"),
            _ran(lambda row, first: 1 / first.report.retention, "CR", "{:.1f}x".format, "compression_ratio"),
            _ran(lambda row, first: first.account.prefill_flops, "prefill FLOPs", show_flops, "prefill_flops"),
            _ran(lambda row, first: first.account.kv_cache_bytes, "KV cache", show_bytes, "kv_cache_bytes"),
            *(_ran(_milliseconds(part), f"{part.removeprefix('vision ')} ms", "{:.1f}".format) for part in PARTS),
            _ran(lambda row, first: row.milliseconds, key="milliseconds"),
        ]
        return Table(columns, self.rows)

    def _numbered(self, row: MethodRow) -> str:
        """Return the method's name, with the number of its footnote."""
        return row.method + (f" ({self.noted.index(row) + 1})" if row.note else "")

    def answer(self, row: MethodRow) -> str:
        """Return the answer, with a mark if it differs, or what to do about a missing one."""
        if row.first is None:
            return f"({row.remedy})"
        return (DIFFERS if row.differs else "") + (printable(row.first.text) or "(empty)")

    @property
    def notes(self) -> list[str]:
        """Return the lines below the table: footnotes, the meaning of marks, and how time was measured."""
        notes = [f"({n}) {row.method}: {printable(row.note)}" for n, row in enumerate(self.noted, 1)]
        if any(row.differs for row in self.rows):
            notes.append(f"{DIFFERS}another answer than {PLAIN}'s")
        if len(self.paths) > 1:
            notes.append(f"visual tokens: of {len(self.paths)} images together")
        stepped = [compact(row.first.report.by_layer) for row in self.rows if row.first]
        example = next((counts for counts in stepped if "→" in counts), None)
        if example:
            notes.append(f"{example}: tokens × layers of the LLM, in order; retention and CR are over all layers")
        return [*notes, self.timing]

    @property
    def timing(self) -> str:
        threads = torch.get_num_threads()
        machine = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        return (
            f"ms, median of {self.repeats}, {machine}, {str(self.dtype).removeprefix('torch.')}, "
            f"{threads} thread{'s' * (threads > 1)}; LLM: projector, prefill and decoding"
        )


def as_json(comparison: Comparison) -> dict[str, object]:
    budget = comparison.keep or ""
    name = "keep" if counts_remaining(budget) else "average_keep"
    keep = parse_keep(keep_of(budget)) if budget else None
    return {
        "model": comparison.model,
        "question": comparison.question,
        name: keep,
        "images": [
            {"path": path, "visual_tokens": image.before}
            for path, image in zip(comparison.paths, comparison.plain.report.images, strict=True)
        ],
        "rows": comparison.table.as_json(),
        "timing": {
            "repeats": comparison.repeats,
            "statistic": "median",
            "device": str(comparison.device),
            "dtype": str(comparison.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
    }


def _ran(
    value: Callable[[MethodRow, TimedAnswer], V | None],
    heading: str = "",
    text: Callable[[V], str] = str,
    key: str = "",
) -> Column[MethodRow]:
    """Return a column that only methods which ran have."""
    return Column(lambda row: value(row, row.first) if row.first else ABSENT, heading, text, key)


def _milliseconds(part: str) -> Callable[[MethodRow, TimedAnswer], float]:
    return lambda row, _: row.milliseconds[part]


def _counted(image: ImageReport) -> dict[str, object]:
    return {"before": image.before, "after": image.after, "by_layer": list(image.by_layer)}


def sheet(comparison: Comparison, seen: Seen) -> Image.Image:
    """Return one page with every image under every method that ran."""
    panels = []
    for row in comparison.rows:
        if row.first is None:
            continue
        images = _images(row, row.first, seen)
        for number, (image, counted) in enumerate(zip(images, row.first.report.images, strict=True), 1):
            title = row.method + f", image {number}" * (len(images) > 1) + " (answer differs)" * row.differs
            ratio = counted.before * len(counted.by_layer) / sum(counted.by_layer)
            counts = _counts(ratio, counted.by_layer)
            panels.append(Panel(image, title, counts, printable(row.first.text), row.differs))
    absent = [f"{row.method}: {printable(row.note)}" for row in comparison.rows if row.first is None]
    return contact_sheet(f"{comparison.title}   ({comparison.budget})", panels, absent, together=len(comparison.paths))


def page(comparison: Comparison, seen: Seen) -> str:
    """Return the whole comparison as HTML."""
    cards = []
    for row in comparison.rows:
        if row.first is not None:
            report = row.first.report
            caption = _counts(1 / report.retention, report.by_layer)
            cards.append(Card(row.method, comparison.answer(row), caption, row.differs, _images(row, row.first, seen)))
    facts = [comparison.budget, ", ".join(map(printable, comparison.paths)), f"vlmzip {__version__}"]
    rows = [(comparison.table.texts(row), row.differs) for row in comparison.rows]
    return render(comparison.title, facts, cards, comparison.table.headings, rows, comparison.notes)


def printable(text: str) -> str:
    """Return the text in one line, without control characters that a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def _counts(ratio: float, by_layer: list[int] | tuple[int, ...]) -> str:
    return f"{ratio:.1f}x, {compact(by_layer)} visual tokens"


def _images(row: MethodRow, first: TimedAnswer, seen: Seen) -> list[Image.Image]:
    """Return each image with the fate of its tokens drawn on its views; without compression the plain views."""
    draw_views = plain_views if row.method == PLAIN else fates_of_views
    return [draw_views(views, image) for views, image in zip(seen(first.report), first.report.images, strict=True)]
