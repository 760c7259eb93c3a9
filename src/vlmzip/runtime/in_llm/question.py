"""The text that asks about the images of a forward, and its attention to their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlmzip.models.adapter import ModelAdapter
from vlmzip.models.recording import attention_rows
from vlmzip.runtime.in_llm.indices import compact, look_up
from vlmzip.runtime.versions import argument


class Question:
    """The text tokens of a forward that ask about its images.

    The question about an image is the text behind it, up to the end of its question. Where no text follows the image,
    it is that end alone, whatever it is.
    """

    def __init__(
        self,
        rows: Sequence[int],
        places: Sequence[Int[Tensor, " _"]],
        ends: Sequence[int],
        real: Bool[Tensor, "batch length"],
    ) -> None:
        """`rows`, `places`, `ends`: for each image its row, its columns, and the column where its question ends.

        `real` marks what is no padding.
        """
        self._places, self._ends = places, ends
        self._is_text = real.clone()
        for row, columns in zip(rows, places, strict=True):
            self._is_text[row, columns] = False
        self.columns = self._queries(rows)
        """For each row the columns of the text behind its first image, and of the ends of questions; -1: padding."""

    def _queries(self, rows: Sequence[int]) -> Int[Tensor, "batch queries"]:
        batch, length = self._is_text.shape
        device = self._is_text.device
        first = torch.full((batch,), length, device=device)
        last = torch.full((batch,), -1, device=device)
        is_end = torch.zeros_like(self._is_text)
        for row, columns, end in zip(rows, self._places, self._ends, strict=True):
            is_end[row, end] = True
            first[row] = torch.minimum(first[row], columns[0])
            last[row] = last[row].clamp(min=end)
        column = torch.arange(length, device=device)
        asks = self._is_text & (column > first[:, None]) & (column <= last[:, None]) | is_end
        return compact(asks, pad_right=False)

    def about(self, images: Sequence[int], rows: Int[Tensor, " images"]) -> Int[Tensor, "images asking"]:
        """Return which of their row's queries ask about each image, padded with -1 on the left."""
        queries = self.columns[rows]
        ends = torch.tensor([self._ends[n] for n in images], device=queries.device)[:, None]
        behind = queries > torch.stack([self._places[n][-1] for n in images])[:, None]
        asks = behind & (queries <= ends) & self._is_text[rows].gather(1, queries.clamp(min=0))
        asks |= (queries == ends) & ~asks.any(1, keepdim=True)
        return compact(asks, pad_right=False)

    def attention(
        self,
        adapter: ModelAdapter,
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
        query, key = adapter.queries_and_keys(layer, hidden, arguments["position_embeddings"], slots)
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
