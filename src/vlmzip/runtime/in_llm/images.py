"""The images of one forward of the LLM: what a compressor gets of them at its layer, and what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.layout import Layout
from vlmzip.runtime.in_llm.cut import LayerCut, Merge
from vlmzip.runtime.in_llm.prompt import Prompt
from vlmzip.runtime.in_llm.question import Question
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Signal, VisualTokens


@dataclass
class Part:
    """Tokens on which a compressor acts together at one layer: a view of an image, or all that is left of the image."""

    image: int
    compressor: Compressor
    numbers: Int[Tensor, " tokens"]
    """Their numbers among the tokens left of the image."""
    slots: Int[Tensor, " tokens"]
    """Their slots among the tokens that entered the layer."""
    grid: Grid | None
    prefix: int
    entered: int
    """Tokens of the whole image as it entered the LLM."""
    token_map: TokenMap = field(init=False)
    """What becomes of them, in the order of anchors."""


@dataclass
class Compressed:
    """What a compressor leaves of the tokens that entered a layer."""

    merges: list[Merge]
    kept: Bool[Tensor, "batch length"]
    """Which slots stay."""
    outputs: list[Int[Tensor, " _"]]
    """For each image the slots of its output tokens."""


class Images:
    """The images that one forward of the LLM takes in. `copies` are the rows that `generate` makes of each."""

    def __init__(self, prompt: Prompt, embeddings: Float[Tensor, "rows length dim"], past: int, copies: int) -> None:
        self.embeddings = embeddings
        device, length = embeddings.device, embeddings.shape[1]
        self.spans = [replace(s, row=s.row * copies + copy) for s in prompt.spans for copy in range(copies)]
        self.rows = [span.row for span in self.spans]
        self.places = [torch.tensor(span.columns, device=device) - past for span in self.spans]
        """For each image the columns of its tokens."""
        self.real = prompt.real[:, past : past + length].to(device).repeat_interleave(copies, 0)
        ends = [end - past for end in prompt.question_ends for _ in range(copies)]
        self.question = Question(self.rows, self.places, ends, self.real)
        self.attention: dict[int, Float[Tensor, "rows queries kept"]] = {}
        """For each watched layer the question's attention to the tokens that entered it."""
        self.layouts: list[Layout | None] = [span.layout for span in self.spans]
        """For each image how what is left of it lies on the grids of its views, if nothing is gone."""
        self.maps: list[list[tuple[int, TokenMap]]] = [[] for _ in self.spans]
        """For each image the layers at which a compressor acted on it, in order, and the map of each."""

    @property
    def pad_right(self) -> bool:
        return bool((~self.real[:, -1]).any())

    def compress(
        self, index: int, compressor: Compressor, hidden: Float[Tensor, "rows length dim"], before: LayerCut | None
    ) -> Compressed:
        """Return what `compressor` leaves before layer `index` of the tokens that enter it."""
        kept = self.real.clone() if before is None else before.here >= 0
        slots_of = self.places if before is None else before.places
        # Decide: parts of equal shape form one batch of visual tokens.
        parts = self._parts(compressor, slots_of)
        merges: list[Merge] = []
        for group in _alike(parts):
            rows = torch.tensor([self.rows[part.image] for part in group], device=hidden.device)
            slots = torch.stack([part.slots for part in group])
            tokens = self._tokens(index, compressor.needs, group, rows, slots, hidden)
            token_map = group[0].compressor(tokens).in_anchor_order()
            if 0 in token_map.lengths:
                raise UserError(f"{compressor.name()} left no token of an image; it must keep at least one")
            for n, part in enumerate(group):
                part.token_map = token_map.rows(slice(n, n + 1))
            merges.append(Merge(rows, slots, token_map))
        # Gather the parts of each image again, and note which of its slots stay.
        outputs = []
        for image, slots in enumerate(slots_of):
            image_map = self._join(image, [part for part in parts if part.image == image], len(slots))
            self.maps[image].append((index, image_map))
            anchors = image_map.anchor_index()[0]
            kept[self.rows[image], slots] = False
            kept[self.rows[image], slots[anchors]] = True
            outputs.append(slots[anchors])
        return Compressed(merges, kept, outputs)

    def _parts(self, compressor: Compressor, slots_of: Sequence[Int[Tensor, " _"]]) -> list[Part]:
        """Return what the compressor acts on: views of images, or images as a whole."""
        parts = []
        for image, (slots, layout) in enumerate(zip(slots_of, self.layouts, strict=True)):
            choices: list[tuple[Compressor, Tensor, Grid | None, int]] = []
            if layout is None:
                choices.append((compressor, torch.arange(len(slots)), None, 0))
            elif len(layout.views) > 1 and not compressor.by_view:
                choices.append((compressor, (layout.slots >= 0).nonzero()[:, 0], None, 0))
            else:
                for n, share in enumerate(compressor.shared(layout.views)):
                    choices.append((share, layout.placeholders_of(n), layout.views[n], layout.prefix))
            for share, chosen, grid, prefix in choices:
                numbers = chosen.to(slots.device)
                parts.append(Part(image, share, numbers, slots[numbers], grid, prefix, len(self.places[image])))
        return parts

    def _tokens(
        self,
        index: int,
        needs: frozenset[Signal],
        parts: list[Part],
        rows: Int[Tensor, " parts"],
        slots: Int[Tensor, "parts tokens"],
        hidden: Float[Tensor, "rows length dim"],
    ) -> VisualTokens:
        """Return what the compressor before layer `index` may look at, for parts that are alike."""
        images = [part.image for part in parts]
        signals: dict[str, Any] = {}
        if needs:
            asks = self.question.about(images, rows)
            query = asks.clamp(min=0)
            signals["query_mask"] = asks >= 0
        if Signal.TEXT_ATTENTION in needs:
            attention = self.attention[index - 1][rows[:, None], query]
            signals["text_attention"] = attention.gather(2, slots[:, None].expand(-1, asks.shape[1], -1))
        if Signal.TEXT_FEATURES in needs:
            signals["text_features"] = self.embeddings[rows[:, None], self.question.columns[rows].gather(1, query)]
            signals["llm_input"] = torch.stack([self.embeddings[self.rows[n], self.places[n]] for n in images])
        features = hidden[rows[:, None], slots].detach()
        return VisualTokens(features, parts[0].grid, parts[0].prefix, layer=index, passes_prefix=True, **signals)

    def _join(self, image: int, parts: list[Part], count: int) -> TokenMap:
        """Return the map of the `count` tokens left of an image from the maps of its parts, in the order of anchors.

        Tokens in no part are separators: they stay only where nothing else goes.
        """
        is_whole = sum(part.token_map.lengths[0] for part in parts) == sum(len(part.numbers) for part in parts)
        if not is_whole:
            self.layouts[image] = None
        (first, *others) = parts
        if not others and len(first.numbers) == count:
            return first.token_map
        device = first.numbers.device
        group = torch.full((count,), -1, device=device)
        weight, anchor = torch.zeros(count, device=device), torch.zeros(count, dtype=torch.bool, device=device)
        outputs = 0
        for part in parts:
            part_map = part.token_map
            group[part.numbers] = torch.where(part_map.group[0] < 0, -1, part_map.group[0] + outputs)
            weight[part.numbers] = part_map.weight[0]
            anchor[part.numbers] = part_map.anchor[0]
            outputs += part_map.lengths[0]
        if is_whole:
            separator = torch.ones(count, dtype=torch.bool, device=device)
            separator[torch.cat([part.numbers for part in parts])] = False
            group[separator] = outputs + torch.arange(int(separator.sum()), device=device)
            weight[separator], anchor[separator] = 1.0, True
            outputs += int(separator.sum())
        joined = TokenMap(group[None], weight[None], anchor[None], torch.tensor([outputs], device=device))
        return joined.in_anchor_order()


def _alike(parts: list[Part]) -> list[list[Part]]:
    """Return the parts in groups, the tokens of each of which form one `VisualTokens`."""
    groups: dict[Any, list[Part]] = {}
    for part in parts:
        kind = (part.compressor, part.grid, part.prefix, part.entered, len(part.slots))
        groups.setdefault(kind, []).append(part)
    return list(groups.values())
