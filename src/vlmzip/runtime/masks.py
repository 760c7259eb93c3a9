"""Attention masks for layers that see fewer tokens than the mask was made for."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlmzip.errors import UserError


def shrink_mask(
    mask: Any,
    here: Int[Tensor, "batch kept"],
    keys: Int[Tensor, "batch all_kept"],
    past: int,
    padded: bool,
    *,
    flash: bool,
) -> Any:
    """The rows and columns of a layer's `mask` that belong to the tokens left.

    `here` are the columns of the tokens of this forward, which are column `past` and on of the conversation; `keys`
    those of everything in the layer's cache; -1: padding, which nobody attends to. `mask` is what transformers gives a
    layer: [batch or 1, 1, length, all] of truth values or of summands, [batch, all] for FlashAttention, or `None` for a
    causal mask without padding.
    """
    if mask is None and not padded:
        return None
    if mask is not None and not isinstance(mask, Tensor):
        raise UserError(
            f"compressors inside the LLM cannot shorten a {type(mask).__name__}: use SDPA or eager attention"
        )
    real = keys >= 0
    if mask is None:
        return real.long() if flash else _open_for_padding(_causal(here, keys, past), here, keys)
    columns = keys.clamp(min=0)
    if mask.ndim == 2:
        return torch.where(real, mask.gather(1, columns), 0)
    batch, heads = len(here), mask.shape[1]
    rows = here.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, mask.shape[-1])
    out = mask.expand(batch, -1, -1, -1).gather(2, rows)
    out = out.gather(3, columns[:, None, None].expand(-1, heads, out.shape[2], -1))
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    out = out.masked_fill(~real[:, None, None], closed)
    return _open_for_padding(out, here, keys)


def _causal(
    here: Int[Tensor, "batch kept"], keys: Int[Tensor, "batch all_kept"], past: int
) -> Bool[Tensor, "batch 1 kept all_kept"]:
    return ((keys >= 0)[:, None] & (keys[:, None] <= here[..., None] + past))[:, None]


def _open_for_padding(mask: Tensor, here: Int[Tensor, "batch kept"], keys: Int[Tensor, "batch all_kept"]) -> Tensor:
    """Lets padding attend to padding: a row that attends to nothing would be NaN in some kernels."""
    both = (here < 0)[:, None, :, None] & (keys < 0)[:, None, None, :]
    return mask.masked_fill(both, True if mask.dtype == torch.bool else 0.0)
