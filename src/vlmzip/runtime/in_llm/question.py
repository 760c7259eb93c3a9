"""The text that asks about the images of a forward, and its attention to their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlmzip.models.family import Family
from vlmzip.models.recording import attention_rows
from vlmzip.runtime.in_llm.indices import compact, look_up, row_and_slot
from vlmzip.runtime.versions import argument


class Bounds(NamedTuple):
    """Columns between which the question about an image lies."""

    image_starts: int
    """The first token of the image."""
    image_ends: int
    """Its last token."""
    end: int
    """The last token of the question."""


class Question:
    """The text tokens of a forward that ask about its images.

    The question about an image is the text behind it, up to the end of its question. Where no text follows the image,
    it is that end alone, whatever it is.
    """

    def __init__(
        self,
        rows: Sequence[int],
        places: Sequence[Int[Tensor, " _"]],
        bounds: Sequence[Bounds],
        real: Bool[Tensor, "batch length"],
    ) -> None:
        """`rows`, `places`, `bounds`: for each image its row, its columns, and what its question lies between.

        `real` marks what is no padding.
        """
        self._bounds = bounds
        self._is_text = real.clone()
        self._is_text[row_and_slot(rows, places)] = False
        self.columns = self._queries(rows)
        """For each row the columns of the text behind its first image, and of the ends of questions; -1: padding."""

    def _queries(self, rows: Sequence[int]) -> Int[Tensor, "batch queries"]:
        batch, length = self._is_text.shape
        device = self._is_text.device
        between = [(length, -1)] * batch  # for each row the first token of its images, and the last end of a question
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
        """Return which of their row's queries ask about each image, padded with -1 on the left."""
        queries = self.columns[rows]
        between = [(self._bounds[n].image_ends, self._bounds[n].end) for n in images]
        lasts, ends = torch.tensor(between, device=queries.device)[..., None].unbind(1)
        asks = (queries > lasts) & (queries <= ends) & self._is_text[rows].gather(1, queries.clamp(min=0))
        asks |= (queries == ends) & ~asks.any(1, keepdim=True)
        return compact(asks, pad_right=False)

    def attention(
        self,
        family: Family,
        layer: nn.Module,
        hidden: Float[Tensor, "batch kept dim"],
        arguments: dict[str, Any],
        here: Int[Tensor, "batch kept"],
        keys: Int[Tensor, "batch all_kept"],
        past: int,
        cached: Tensor | None,
    ) -> Float[Tensor, "batch queries kept"]:
        """Return the question's attention at a layer to the tokens that enter it, mean over heads.

        `hidden` and `arguments` are what the layer gets, `here` and `keys` as in `LayerCut`, `cached` are the keys of
        earlier forwards in the layer's cache.
        """
        # The slots of the question's tokens. Text is never dropped; an end that is an image's token may be: then the
        # last token before it that is left.
        slot = torch.arange(here.shape[1], device=here.device)
        up_to = (here >= 0)[:, None] & (here[:, None] <= self.columns.clamp(min=0)[..., None])
        slots = torch.where(up_to, slot, 0).amax(-1)
        query, key = family.queries_and_keys(layer, hidden, arguments["position_embeddings"], slots)
        if cached is not None:
            key = torch.cat([cached.to(key.device), key], dim=2)
        mask = argument(arguments, "attention_mask", "a decoder layer")
        if mask is None or mask.ndim == 2:  # causal, except for padding
            real = (keys >= 0) if mask is None else mask.bool()
            column = look_up(here, slots) + past
            allowed = real[:, None] & (keys[:, None] <= column[..., None])
        else:
            mask = mask.expand(len(here), 1, -1, -1)[:, 0]
            mask = mask.gather(1, slots[..., None].expand(-1, -1, mask.shape[-1]))
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        rows = attention_rows(query, key, allowed, query.shape[-1] ** -0.5)
        return rows[..., -hidden.shape[1] :]
