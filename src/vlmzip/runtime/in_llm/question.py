"""The questions about the images of a forward, and their attention to the image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlmzip.models.family import Family
from vlmzip.models.recording import attention_rows
from vlmzip.processor import InputDict
from vlmzip.runtime.in_llm.cut import of_tokens
from vlmzip.runtime.in_llm.indices import compact, look_up, row_and_slot
from vlmzip.runtime.in_llm.masks import known_mask
from vlmzip.runtime.versions import argument


class Bounds(NamedTuple):
    """The columns that bound an image and the question about it."""

    image_starts: int
    """The column of the first token of the image."""
    image_ends: int
    """The column of the last token of the image."""
    end: int
    """The column of the last token of the question."""


class Candidates(NamedTuple):
    """Output tokens of a compressor, and the questions about their images."""

    rows: Int[Tensor, " images"]
    asks: Int[Tensor, "images asking"]
    """The queries about each image (see `Question.about`)."""
    states: Float[Tensor, "images outputs dim"]
    anchors: Int[Tensor, "images outputs"]
    """The slots of the anchors, before the compressor acts; -1 for padding."""


class Question:
    """The tokens of a forward that form the questions about its images.

    The question about an image is the text after it, up to the column `Bounds.end`. If there is no text between them,
    the question is the token at that column, even if it is a token of an image.
    """

    def __init__(
        self,
        rows: Sequence[int],
        places: Sequence[Int[Tensor, " _"]],
        bounds: Sequence[Bounds],
        real: Bool[Tensor, "batch length"],
    ) -> None:
        """Find the tokens of all questions.

        `rows`, `places` and `bounds` have the row, the token columns and the bounds of each image. `real` is True for
        tokens that are not padding.
        """
        self._bounds = bounds
        self._is_text = real.clone()
        self._is_text[row_and_slot(rows, places)] = False
        self.columns = self._queries(rows)
        """The columns of each row's queries: text after its first image, and the ends of questions; -1: padding."""

    def _queries(self, rows: Sequence[int]) -> Int[Tensor, "batch queries"]:
        batch, length = self._is_text.shape
        device = self._is_text.device
        between = [(length, -1)] * batch  # for each row, the first token of its images and the last end of a question
        for row, bounds in zip(rows, self._bounds, strict=True):
            first, last = between[row]
            between[row] = min(first, bounds.image_starts), max(last, bounds.end)
        firsts, lasts = torch.tensor(between, device=device)[..., None].unbind(1)
        ends = torch.tensor([(row, bounds.end) for row, bounds in zip(rows, self._bounds, strict=True)], device=device)
        is_end = torch.zeros_like(self._is_text)
        is_end[ends.unbind(1)] = True
        column = torch.arange(length, device=device)
        asks = self._is_text & (column > firsts) & (column <= lasts) | is_end
        return compact(asks, pad_right=False)

    def about(self, images: Sequence[int], rows: Int[Tensor, " images"]) -> Int[Tensor, "images asking"]:
        """Return the queries about each image, as indices into the queries of its row, padded with -1 on the left."""
        queries = self.columns[rows]
        between = [(self._bounds[n].image_ends, self._bounds[n].end) for n in images]
        lasts, ends = torch.tensor(between, device=queries.device)[..., None].unbind(1)
        asks = (queries > lasts) & (queries <= ends) & self._is_text[rows].gather(1, queries.clamp(min=0))
        asks |= (queries == ends) & ~asks.any(1, keepdim=True)
        return compact(asks, pad_right=False)

    def slots(self, here: Int[Tensor, "batch kept"]) -> Int[Tensor, "batch queries"]:
        """Return the slots of the queries at a layer. `here` is that of `LayerCut`.

        Text is never dropped, but an end that is an image token can be. Then its slot is that of the last remaining
        token before it.
        """
        slot = torch.arange(here.shape[1], device=here.device)
        up_to = (here >= 0)[:, None] & (here[:, None] <= self.columns.clamp(min=0)[..., None])
        return torch.where(up_to, slot, 0).amax(-1)

    def attention(
        self,
        family: Family,
        layer: nn.Module,
        hidden: Float[Tensor, "batch kept dim"],
        arguments: InputDict,
        here: Int[Tensor, "batch kept"],
        keys: Int[Tensor, "batch all_kept"],
        past: int,
        cached: Tensor | None,
    ) -> Float[Tensor, "batch queries kept"]:
        """Return the attention of the queries to the tokens that enter a layer, averaged over heads.

        `hidden` and `arguments` are the inputs of the layer. `here` and `keys` are those of `LayerCut`. `cached` has
        the attention keys of earlier forwards in the layer's cache.
        """
        slots = self.slots(here)
        mask = known_mask(argument(arguments, "attention_mask", "a decoder layer"))
        query, key, scale = family.queries_and_keys(layer, hidden, arguments, slots)
        if cached is not None:
            key = torch.cat([cached.to(key.device), key], dim=2)
        if mask is None or mask.ndim == 2:  # causal, except for padding
            real = (keys >= 0) if mask is None else mask.bool()
            column = look_up(here, slots) + past
            allowed = real[:, None] & (keys[:, None] <= column[..., None])
        else:
            mask = mask.expand(len(here), 1, -1, -1)[:, 0]
            mask = mask.gather(1, slots[..., None].expand(-1, -1, mask.shape[-1]))
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        rows = attention_rows(query, key, allowed, scale)
        return rows[..., -hidden.shape[1] :]

    def attention_to(
        self,
        family: Family,
        layer: nn.Module,
        hidden: Float[Tensor, "batch kept dim"],
        arguments: InputDict,
        here: Int[Tensor, "batch kept"],
        length: int,
        outputs: Candidates,
    ) -> Float[Tensor, "images asking outputs"]:
        """Return the attention of the questions about some images to `outputs` alone, averaged over heads.

        `hidden` enters the layer, but is not shortened yet. `arguments` are those of the layer for all `length` tokens
        that entered the LLM. `here` has the columns of the tokens of `hidden`.
        """
        rows, asks, states, anchors = outputs
        query = self.slots(here)[rows].gather(1, asks.clamp(min=0))
        # Let the layer see a sequence for each image: the outputs, then the question.
        states = torch.cat([states, hidden[rows[:, None], query]], 1)
        columns = here[rows].gather(1, torch.cat([anchors.clamp(min=0), query], 1))
        short = {
            name: of_tokens(name, value, columns, length, rows)
            for name, value in arguments.items()
            if name != "attention_mask"
        }
        closed = states.new_full((states.shape[1],) * 2, torch.finfo(states.dtype).min).triu(1)
        short["attention_mask"] = closed.expand(len(rows), 1, -1, -1)
        place = torch.arange(anchors.shape[1], states.shape[1], device=states.device).expand(len(rows), -1)
        query_states, key, scale = family.queries_and_keys(layer, states, short, place)
        allowed = (asks >= 0)[..., None] & (anchors >= 0)[:, None]
        return attention_rows(query_states, key[:, :, : anchors.shape[1]], allowed, scale)
