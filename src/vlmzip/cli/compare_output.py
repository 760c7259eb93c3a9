"""What `compare` found, in words, as JSON, as a contact sheet and as a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image

from vlmzip.cli.asking import TimedAnswer
from vlmzip.cli.comparing import PLAIN, MethodRow
from vlmzip.cli.tables import show_bytes, show_flops
from vlmzip.keep import Keep, parse_keep
from vlmzip.runtime.report import Report, compact
from vlmzip.version import __version__
from vlmzip.visualize.page import Card, render
from vlmzip.visualize.sheet import Panel, contact_sheet
from vlmzip.visualize.views import fates_of_views, plain_views

#: The views of every image of a report, as the encoder saw them.
Seen = Callable[[Report], list[list[Image.Image]]]

NOTHING = "—"
DIFFERS = "≠ "
PARTS = ("vision encoder", "selection", "LLM")
COLUMNS = (
    "method", "answer", "visual tokens", "retention", "CR", "prefill FLOPs", "KV cache",
    "encoder ms", "selection ms", "LLM ms",
)  # fmt: skip
#: How many of the columns tell what came out; the others tell what it cost.
OUTCOME = 5


@dataclass(frozen=True)
class Comparison:
    """The rows, the plain model's first, and under what conditions they came about."""

    rows: list[MethodRow]
    model: str
    question: str
    paths: list[str]
    keep: Keep | None
    """`None`: methods as they are written."""
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
        """The budget in words."""
        before = " and ".join(dict.fromkeys(f"{image.before:,}" for image in self.plain.report.images))
        if self.keep is None:
            return f"methods as they are written, {before} visual tokens an image, {self.model}"
        asked = min(parse_keep(self.keep), max(image.before for image in self.plain.report.images))
        share = str(asked) if isinstance(asked, int) else f"{100 * asked:.3g}%"
        return f"{share} of {before} visual tokens an image, {self.model}"

    @cached_property
    def noted(self) -> list[MethodRow]:
        """The rows with a footnote, in the order of its number."""
        return [row for row in self.rows if row.note]

    def cells(self, row: MethodRow) -> list[str]:
        """The row in words, one for each of `COLUMNS`."""
        name = row.method + (f" ({self.noted.index(row) + 1})" if row.note else "")
        if row.first is None:
            return [name, *[NOTHING] * (len(COLUMNS) - 1)]
        report, account = row.first.report, row.first.account
        return [
            name,
            self.answer(row),
            compact(report.by_layer),
            f"{report.retention:.1%}",
            f"{1 / report.retention:.1f}x",
            show_flops(account.prefill_flops),
            show_bytes(account.kv_cache_bytes),
            *(f"{row.milliseconds[part]:.1f}" for part in PARTS),
        ]

    def answer(self, row: MethodRow) -> str:
        assert row.first is not None
        return (DIFFERS if row.differs else "") + (printable(row.first.text) or "(empty)")

    @property
    def notes(self) -> list[str]:
        """What stands below the table: the footnotes, what the marks mean, and how time was taken."""
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


def as_json(found: Comparison) -> dict[str, object]:
    asked = None if found.keep is None else parse_keep(found.keep)
    return {
        "model": found.model,
        "question": found.question,
        "keep": asked,
        "images": [
            {"path": path, "visual_tokens": image.before}
            for path, image in zip(found.paths, found.plain.report.images, strict=True)
        ],
        "rows": [_row_as_json(row) for row in found.rows],
        "timing": {
            "repeats": found.repeats,
            "statistic": "median",
            "device": str(found.device),
            "dtype": str(found.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
    }


def _row_as_json(row: MethodRow) -> dict[str, object]:
    out: dict[str, object] = {"method": row.method, "note": row.note or None, "answer": None}
    if row.first is None or row.compressed is None:
        return out
    report, account = row.first.report, row.first.account
    return out | {
        "answer": row.first.text,
        "differs": row.differs,
        "compressor": row.compressed.compressor.to_dict(),
        "visual_tokens_by_layer": report.by_layer,
        "images": [{"before": p.before, "after": p.after, "by_layer": list(p.by_layer)} for p in report.images],
        "retention": report.retention,
        "compression_ratio": 1 / report.retention,
        "prefill_flops": account.prefill_flops,
        "kv_cache_bytes": account.kv_cache_bytes,
        "milliseconds": row.milliseconds,
    }


def sheet(found: Comparison, seen: Seen) -> Image.Image:
    """One page with every image under every method that ran."""
    panels = []
    for row in found.rows:
        if row.first is None:
            continue
        images = _images(row, row.first, seen)
        for number, (image, counted) in enumerate(zip(images, row.first.report.images, strict=True), 1):
            title = row.method + f", image {number}" * (len(images) > 1) + " (answer differs)" * row.differs
            ratio = counted.before * len(counted.by_layer) / sum(counted.by_layer)
            counts = _counts(ratio, counted.by_layer)
            panels.append(Panel(image, title, counts, printable(row.first.text), row.differs))
    absent = [f"{row.method}: {printable(row.note)}" for row in found.rows if row.first is None]
    return contact_sheet(f"{found.title}   ({found.budget})", panels, absent, together=len(found.paths))


def page(found: Comparison, seen: Seen) -> str:
    """The whole comparison as HTML."""
    cards = []
    for row in found.rows:
        if row.first is not None:
            report = row.first.report
            caption = _counts(1 / report.retention, report.by_layer)
            cards.append(Card(row.method, found.answer(row), caption, row.differs, _images(row, row.first, seen)))
    facts = [found.budget, ", ".join(map(printable, found.paths)), f"vlmzip {__version__}"]
    rows = [(found.cells(row), row.differs) for row in found.rows]
    return render(found.title, facts, cards, COLUMNS, rows, found.notes)


def printable(text: str) -> str:
    """On one line, and nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def _counts(ratio: float, by_layer: list[int] | tuple[int, ...]) -> str:
    return f"{ratio:.1f}x, {compact(by_layer)} visual tokens"


def _images(row: MethodRow, first: TimedAnswer, seen: Seen) -> list[Image.Image]:
    """What became of the tokens of each image, drawn on its views; without compression the views themselves."""
    draw_views = plain_views if row.method == PLAIN else fates_of_views
    return [draw_views(views, image) for views, image in zip(seen(first.report), first.report.images, strict=True)]
