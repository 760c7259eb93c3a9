"""The images of one forward of the LLM: a compressor's input before its layer, and its result."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.family import Family
from vlmzip.models.layout import Layout
from vlmzip.runtime.in_llm.cut import LayerCut, Merge
from vlmzip.runtime.in_llm.indices import row_and_slot, tensors
from vlmzip.runtime.in_llm.prompt import Prompt
from vlmzip.runtime.in_llm.question import Bounds, Candidates, Question
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Signal, VisualTokens

#: A function that returns the attention of questions to output tokens in the layer that runs next.
CandidateAttention = Callable[[Candidates], Float[Tensor, "images asking outputs"]]


class Choice(NamedTuple):
    """Tokens of an image that a compressor gets together: those of a view, or those of all views."""

    compressor: Compressor
    numbers: Int[Tensor, " tokens"]
    """The numbers of these tokens among the remaining tokens of the image."""
    is_only: bool
    """True if the compressor gets no other tokens of the image."""
    is_all: bool
    """True if these are all remaining tokens of the image, in order."""
    grid: Grid | None
    prefix: int


@dataclass
class Part:
    """One choice of tokens of one image before one layer, and the compressor's result."""

    image: int
    choice: Choice
    image_slots: Int[Tensor, " left"]
    """The slots of all remaining tokens of the image, among the tokens that entered the layer."""
    entered: int
    """The number of tokens of the whole image that entered the LLM."""
    token_map: TokenMap = field(init=False)
    """The map of the chosen tokens, with outputs in the order of their anchors."""
    outputs: Int[Tensor, " outputs"] = field(init=False)
    """The slots of the anchors."""
    image_map: TokenMap | None = None
    """The map of all remaining tokens of the image, if this is its only part and its separators are dropped."""


@dataclass
class Compressed:
    """The result of a compressor on the tokens that entered a layer."""

    merges: list[Merge]
    kept: Bool[Tensor, "batch length"]
    """True for the slots that are kept."""
    outputs: list[Int[Tensor, " _"]]
    """The slots of each image's output tokens."""


class Images:
    """The images that enter the LLM in one forward. `generate` repeats each row of the prompt `copies` times."""

    def __init__(
        self, family: Family, prompt: Prompt, embeddings: Float[Tensor, "rows length dim"], past: int, copies: int
    ) -> None:
        self.family, self.embeddings = family, embeddings
        device, length = embeddings.device, embeddings.shape[1]
        self.spans = [replace(s, row=s.row * copies + copy) for s in prompt.spans for copy in range(copies)]
        self.rows = [span.row for span in self.spans]
        self.places = tensors([[column - past for column in span.columns] for span in self.spans], device)
        """The columns of each image's tokens."""
        self.real = prompt.real[:, past : past + length].to(device).repeat_interleave(copies, 0)
        ends = [end for end in prompt.question_ends for _ in range(copies)]
        bounds = [
            Bounds(span.columns[0] - past, span.columns[-1] - past, end - past)
            for span, end in zip(self.spans, ends, strict=True)
        ]
        self.question = Question(self.rows, self.places, bounds, self.real)
        self.attention: dict[int, Float[Tensor, "rows queries kept"]] = {}
        """The question's attention to the tokens that enter a compressing layer, by layer."""
        self.keys: dict[int, Float[Tensor, "rows kept key_dim"]] = {}
        """The attention keys of the tokens that enter a compressing layer, in the layer before it, by layer."""
        self.views = [span.views for span in self.spans]
        """The number of views of each image."""
        self.layouts: list[Layout | None] = [span.layout for span in self.spans]
        """The layout of each image on the grids of its views; `None` if tokens were dropped or merged."""
        self.frames = [None if s.frames is None else torch.tensor(s.frames, device=device) for s in self.spans]
        """The frame of each remaining token of a video; `None` for images."""
        self.maps: list[list[tuple[int, TokenMap]]] = [[] for _ in self.spans]
        """The layers before which a compressor acted on each image, in order, with the map of each layer."""

    @property
    def pad_right(self) -> bool:
        return bool((~self.real[:, -1]).any())

    def compress(
        self,
        index: int,
        compressor: Compressor,
        hidden: Float[Tensor, "rows length dim"],
        before: LayerCut | None,
        candidate_attention: CandidateAttention,
    ) -> Compressed:
        """Return the result of `compressor` before layer `index`, on the tokens that enter the layer.

        `candidate_attention` computes this layer's attention for compressors that need it. Raise `UserError` if the
        compressor keeps no token of an image.
        """
        kept = self.real.clone() if before is None else before.here >= 0
        slots_of = self.places if before is None else before.places
        # Compress: parts of equal shape form one batch of visual tokens.
        parts = self._parts(compressor, slots_of)
        merges: list[Merge] = []
        for group in _alike(parts):
            rows = torch.tensor([self.rows[part.image] for part in group], device=hidden.device)
            slots = torch.stack([part.image_slots for part in group])
            if not group[0].choice.is_all:
                slots = slots.gather(1, torch.stack([part.choice.numbers for part in group]))
            acting = group[0].choice.compressor
            tokens = self._tokens(index, acting, group, rows, slots, hidden, before, candidate_attention)
            token_map = acting(tokens).in_anchor_order()
            if 0 in token_map.lengths:
                raise UserError(f"{compressor.name()} left no token of an image; it must keep at least one")
            if token_map.added is not None:
                raise UserError(f"{compressor.name()} adds a token to several outputs, which works before the LLM only")
            anchors = slots.gather(1, token_map.anchor_index().clamp(min=0)).unbind()
            for part, part_map, outputs in zip(group, token_map.split(), anchors, strict=True):
                part.token_map, part.outputs = part_map, outputs[: part_map.max_length]
            if group[0].choice.is_only and not group[0].choice.is_all:
                _map_images(group, token_map)
            merges.append(Merge(rows, slots, token_map))
        # Collect the parts of each image, and mark its slots that are kept.
        parts_of: list[list[Part]] = [[] for _ in slots_of]
        for part in parts:
            parts_of[part.image].append(part)
        outputs_of = []
        for image, (slots, image_parts) in enumerate(zip(slots_of, parts_of, strict=True)):
            image_map = self._join(image, image_parts, len(slots))
            self.maps[image].append((index, image_map))
            if not compressor.restores:
                self._shorten(image, image_map)
            is_one = image_map in (image_parts[0].token_map, image_parts[0].image_map)
            outputs_of.append(image_parts[0].outputs if is_one else slots[image_map.anchor_index()[0]])
        kept[row_and_slot(self.rows, slots_of)] = False
        kept[row_and_slot(self.rows, outputs_of)] = True
        return Compressed(merges, kept, outputs_of)

    def _shorten(self, image: int, image_map: TokenMap) -> None:
        """Let later compressors see the frames and the layout of the output tokens of an image."""
        if (frames := self.frames[image]) is not None:
            self.frames[image] = frames[image_map.anchor_index()[0]]
        if image_map.max_length < image_map.group.shape[1]:
            self.layouts[image] = None

    def _parts(self, compressor: Compressor, slots_of: Sequence[Int[Tensor, " _"]]) -> list[Part]:
        """Return the parts that the compressor acts on: views of images, or whole images."""
        parts = []
        choices: dict[tuple[Layout | None, int, int], list[Choice]] = {}  # images of equal layout share their choices
        for image, (slots, layout) in enumerate(zip(slots_of, self.layouts, strict=True)):
            alike = layout, len(slots), self.views[image]
            frames = self.frames[image]
            if frames is not None and compressor.by_frame and not _has_frames(layout):
                of_image = _choices_of_frames(compressor, frames)
            elif alike in choices:
                of_image = choices[alike]
            else:
                of_image = choices[alike] = _choices(compressor, layout, self.views[image], slots)
            for choice in of_image:
                parts.append(Part(image, choice, slots, len(self.places[image])))
        return parts

    def _tokens(
        self,
        index: int,
        compressor: Compressor,
        parts: list[Part],
        rows: Int[Tensor, " parts"],
        slots: Int[Tensor, "parts tokens"],
        hidden: Float[Tensor, "rows length dim"],
        before: LayerCut | None,
        candidate_attention: CandidateAttention,
    ) -> VisualTokens:
        """Return the input of the compressor before layer `index`, for parts of equal shape."""
        needs = compressor.needs
        images = [part.image for part in parts]
        signals: dict[str, Any] = {}
        if needs:
            asks = self.question.about(images, rows)
            query = asks.clamp(min=0)
            signals["query_mask"] = asks >= 0
        if Signal.TEXT_ATTENTION in needs:
            attention = self.attention[index][rows[:, None], query]
            signals["text_attention"] = attention.gather(2, slots[:, None].expand(-1, asks.shape[1], -1))
        if Signal.TEXT_FEATURES in needs:
            signals["text_features"] = self.embeddings[rows[:, None], self.question.columns[rows].gather(1, query)]
            signals["llm_input"] = self.embeddings[rows[:, None], torch.stack([self.places[n] for n in images])]
        features = hidden[rows[:, None], slots].detach()
        if needs & {Signal.LLM_KEYS, Signal.LLM_STATES}:
            here = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
            here = here if before is None else before.here
            asking = self.question.slots(here)[rows].gather(1, query)
            if Signal.LLM_KEYS in needs:
                signals["llm_keys"] = self.keys[index][rows[:, None], slots]
                signals["text_keys"] = self.keys[index][rows[:, None], asking]
            if Signal.LLM_STATES in needs:
                signals["llm_states"] = self.family.final_norm(features)
                signals["text_states"] = self.family.final_norm(hidden[rows[:, None], asking])
        grid, prefix = parts[0].choice.grid, parts[0].choice.prefix
        tokens = VisualTokens(features, grid, prefix, layer=index, passes_prefix=True, **signals)
        if Signal.CANDIDATE_ATTENTION not in needs:
            return tokens
        candidates = compressor.candidates(tokens)
        index_of = candidates.anchor_index()
        anchors = torch.where(index_of < 0, -1, slots.gather(1, index_of.clamp(min=0)))
        attention = candidate_attention(Candidates(rows, asks, candidates.apply(features), anchors))
        return tokens.replace(candidate_attention=attention)

    def _join(self, image: int, parts: list[Part], count: int) -> TokenMap:
        """Return the map of the `count` remaining tokens of an image, joined from the maps of its parts.

        The outputs are in the order of their anchors. Tokens outside the parts are separators, which are kept only if
        all other tokens are kept.
        """
        is_whole = sum(part.token_map.lengths[0] for part in parts) == sum(len(part.choice.numbers) for part in parts)
        (first, *others) = parts
        if first.image_map is not None:
            return first.image_map
        if not others and len(first.choice.numbers) == count:
            return first.token_map
        device = first.image_slots.device
        group = torch.full((count,), -1, device=device)
        weight, anchor = torch.zeros(count, device=device), torch.zeros(count, dtype=torch.bool, device=device)
        outputs = 0
        for part in parts:
            part_map = part.token_map
            numbers = part.choice.numbers
            group[numbers] = torch.where(part_map.group[0] < 0, -1, part_map.group[0] + outputs)
            weight[numbers] = part_map.weight[0]
            anchor[numbers] = part_map.anchor[0]
            outputs += part_map.lengths[0]
        if is_whole:
            separator = torch.ones(count, dtype=torch.bool, device=device)
            separator[torch.cat([part.choice.numbers for part in parts])] = False
            group[separator] = outputs + torch.arange(int(separator.sum()), device=device)
            weight[separator], anchor[separator] = 1.0, True
            outputs += int(separator.sum())
        joined = TokenMap(group[None], weight[None], anchor[None], torch.tensor([outputs], device=device))
        return joined.in_anchor_order()


def _choices(compressor: Compressor, layout: Layout | None, count_of_views: int, slots: Tensor) -> list[Choice]:
    """Return the choices of tokens for `compressor` in an image whose remaining tokens are in `slots`."""
    count, device = len(slots), slots.device
    if layout is None:
        return [Choice(compressor.together(count_of_views), torch.arange(count, device=device), True, True, None, 0)]
    views: list[tuple[Compressor, Tensor, Grid | None, int]]
    if len(layout.views) > 1 and not compressor.by_view and not (compressor.by_frame and layout.is_video):
        views = [(compressor, (layout.slots >= 0).nonzero()[:, 0], None, 0)]
    else:
        views = [
            (share, layout.placeholders_of(n), layout.views[n], layout.prefix)
            for n, share in enumerate(compressor.shared(layout.views))
        ]
    return [
        Choice(share, numbers.to(device), len(views) == 1, torch.equal(numbers, torch.arange(count)), grid, prefix)
        for share, numbers, grid, prefix in views
    ]


def _has_frames(layout: Layout | None) -> bool:
    """Return True if the views of a layout are single frames."""
    return layout is not None and all(grid.frames == 1 for grid in layout.views)


def _choices_of_frames(compressor: Compressor, frames: Int[Tensor, " left"]) -> list[Choice]:
    """Return a choice for each frame of a video whose remaining tokens lie on no grids; `frames` has their frames."""
    numbers_of = [(frames == frame).nonzero()[:, 0] for frame in frames.unique()]
    is_only = len(numbers_of) == 1
    return [Choice(compressor, numbers, is_only, is_only, None, 0) for numbers in numbers_of]


def _map_images(parts: list[Part], token_map: TokenMap) -> None:
    """Set `image_map` of parts that are the only parts of their images; the other tokens are separators.

    This map drops the separators. A part that keeps all its tokens does not get it, because then the separators stay.
    """
    numbers = torch.stack([part.choice.numbers for part in parts])
    shape, device = (len(parts), parts[0].entered), numbers.device
    whole = TokenMap(
        torch.full(shape, -1, device=device).scatter(1, numbers, token_map.group),
        torch.zeros(shape, dtype=token_map.weight.dtype, device=device).scatter(1, numbers, token_map.weight),
        torch.zeros(shape, dtype=torch.bool, device=device).scatter(1, numbers, token_map.anchor),
        token_map.length,
    )
    for part, image_map in zip(parts, whole.split(), strict=True):
        if part.token_map.lengths[0] < len(part.choice.numbers):
            part.image_map = image_map


def _alike(parts: list[Part]) -> list[list[Part]]:
    """Return groups of parts with equal compressor and shape. Each group forms one `VisualTokens`."""
    groups: dict[Hashable, list[Part]] = {}
    for part in parts:
        choice = part.choice
        kind = (
            choice.compressor,
            choice.grid,
            choice.prefix,
            part.entered,
            len(part.image_slots),
            len(choice.numbers),
            choice.is_all,
        )
        groups.setdefault(kind, []).append(part)
    return list(groups.values())
