"""The results as HTML: a card for each method, the uncompressed answer first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vlmzip.serving.playground.answering import MOST_RUNS, PARTS, Answer
from vlmzip.visualize.page import render_page

PLAIN = "uncompressed"
#: What the numbers are.
BY_LAYER = "by layer: tokens × layers of the LLM, in order"
TIMING = (
    f"ms: median of up to {MOST_RUNS} runs on {{device}}, {{dtype}}, after a warm-up; one run if it takes a second."
    " LLM: projector, prefill and decoding. Time in the queue does not count. Other work on the machine makes the times"
    " longer."
)


@dataclass(frozen=True)
class Card:
    """The card of a method: its answer, or why there is none."""

    title: str
    answer: Answer | None = None
    error: str = ""
    note: str = ""
    plain: Answer | None = None
    """The uncompressed answer, for comparison; `None` on its own card."""

    @property
    def differs(self) -> bool:
        """Return whether the answer differs from the uncompressed one."""
        return self.answer is not None and self.plain is not None and self.answer.text != self.plain.text

    @property
    def pending(self) -> bool:
        """Return whether the answer is still to come."""
        return self.answer is None and not self.error

    @property
    def facts(self) -> list[tuple[str, str, str]]:
        """Return names, values and details of the costs."""
        answer, plain = self.answer, self.plain
        if answer is None:
            return []
        tokens = f"{answer.average:,.4g}"
        flops = scaled(answer.flops)
        share = ""
        if plain is not None:
            tokens = f"{answer.before:,} → {tokens}"
            share = f"{answer.average / answer.before:.1%}" + (" on average over the layers" if answer.layers else "")
        facts = [("visual tokens", tokens, share)]
        if answer.layers:
            facts.append(("by layer", answer.layers, ""))
        fewer = "" if plain is None or plain.flops == answer.flops else f"{plain.flops / answer.flops:.1f}x fewer"
        facts.append(("prefill FLOPs", flops, fewer))
        spent = answer.milliseconds
        parts = ", ".join(f"{part} {spent[part]:.0f}" for part in PARTS)
        facts.append(("ms", f"{sum(spent.values()):.0f}", parts))
        return facts


@dataclass(frozen=True)
class Results:
    """All cards, and what holds for all of them."""

    cards: Sequence[Card] = ()
    notes: Sequence[str] = field(default_factory=list)

    def html(self) -> str:
        has_layers = any(card.answer is not None and card.answer.layers for card in self.cards)
        notes = [BY_LAYER, *self.notes] if has_layers else self.notes
        return render_page("cards.html.j2", "", [], "vlmzip.serving.playground", cards=self.cards, notes=notes)


def timing(device: torch.device, dtype: torch.dtype) -> str:
    """Return what the milliseconds include."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return TIMING.format(device=machine, dtype=str(dtype).removeprefix("torch."))


def scaled(value: float) -> str:
    """Return a number of operations with a unit, such as "1.24 G"."""
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {unit}".strip()
        value /= 1000
    return f"{value:,.0f} P"
