"""Attention masks for layers that see fewer tokens than the original mask covers."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmzip.errors import UserError


def shrink_mask(
    mask: object,
    here: Int[Tensor, "batch kept"],
    keys: Int[Tensor, "batch all_kept"],
    past: int,
    padded: bool,
    *,
    flash: bool,
    added: Float[Tensor, "batch all_kept"] | None = None,
) -> Any:
    """Return the rows and columns of a layer's `mask` for the remaining tokens.

    `here` has the column of each remaining token among the tokens that entered the LLM in this forward. Column 0 of the
    forward is column `past` of the conversation. `keys` has the conversation column of each token in the layer's cache.
    In both, -1 is padding, which no real token attends to. `padded` is True if `keys` has padding. `added` has a
    value to add to the attention logits of each key, in the type of the hidden states; not with FlashAttention.

    `mask` is the mask that transformers gives a layer: [batch or 1, 1, length, all] with booleans or with values to add
    to the attention logits, [batch, all] for FlashAttention (`flash`), or `None` for a causal mask without padding.
    Raise `UserError` for a mask that is neither a tensor nor `None`.
    """
    if mask is None and not padded and added is None:
        return None
    mask = known_mask(mask)
    real = keys >= 0
    if mask is None:
        if flash:
            return real.long()
        return _with_added(_open_for_padding(_causal(here, keys, past), here, keys), added)
    columns = keys.clamp(min=0)
    if mask.ndim == 2:
        return torch.where(real, mask.gather(1, columns), 0)
    batch, heads = len(here), mask.shape[1]
    rows = here.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, mask.shape[-1])
    out = mask.expand(batch, -1, -1, -1).gather(2, rows)
    out = out.gather(3, columns[:, None, None].expand(-1, heads, out.shape[2], -1))
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    out = out.masked_fill(~real[:, None, None], closed)
    return _with_added(_open_for_padding(out, here, keys), added)


def known_mask(mask: object) -> Tensor | None:
    """Return a layer's mask. Raise `UserError` for a mask that is neither a tensor nor `None`."""
    if mask is None or isinstance(mask, Tensor):
        return mask
    raise UserError(f"compressors inside the LLM cannot shorten a {type(mask).__name__}: use SDPA or eager attention")


def _causal(
    here: Int[Tensor, "batch kept"], keys: Int[Tensor, "batch all_kept"], past: int
) -> Bool[Tensor, "batch 1 kept all_kept"]:
    """Return the causal mask of the remaining tokens; True means that the token attends to the key."""
    return ((keys >= 0)[:, None] & (keys[:, None] <= here[..., None] + past))[:, None]


def _with_added(mask: Tensor, added: Float[Tensor, "batch all_kept"] | None) -> Tensor:
    """Return the mask with values to add to the attention logits of each key."""
    if added is None:
        return mask
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=added.dtype).masked_fill(~mask, torch.finfo(added.dtype).min)
    return mask + added[:, None, None]


def _open_for_padding(mask: Tensor, here: Int[Tensor, "batch kept"], keys: Int[Tensor, "batch all_kept"]) -> Tensor:
    """Let padding attend to padding, because some kernels return NaN for a row that attends to nothing."""
    padding = (here < 0)[:, None, :, None] & (keys < 0)[:, None, None, :]
    return mask.masked_fill(padding, True if mask.dtype == torch.bool else 0.0)
