"""Positions with several axes (M-RoPE), as a model's own `get_rope_index` counts them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vlmzip.processor import Inputs

#: The name under which `get_rope_index` takes the type of each token: 0 for text, 1 for images, 2 for videos.
TYPES = "mm_token_type_ids"


def rope_positions(
    rope_index: Any,
    inputs: Inputs,
    types: Int[Tensor, "batch length"],
    mask: Int[Tensor, "batch length"],
    adjacent: Sequence[tuple[int, int]],
) -> tuple[Int[Tensor, "*axes batch length"], Int[Tensor, " batch"]]:
    """Return the positions of all tokens, and the position of each row's next token.

    `adjacent` has the row and the column of the first token of each image that directly follows another one of its
    kind. The model takes a run of tokens of one type for one image. So we put a token of text between the two, and
    subtract its position from those after it.
    """
    names = inspect.signature(rope_index).parameters
    known = {**inputs, TYPES: types, "attention_mask": mask}
    if not adjacent or TYPES not in names:
        positions, deltas = rope_index(**{name: known[name] for name in names if name in known})
        return positions, deltas.view(-1) + mask.sum(-1)
    columns = [[column for row, column in adjacent if row == number] for number in range(len(mask))]
    # Each gap is a further column. Rows with fewer gaps than others get padding in the end.
    is_token = torch.ones(len(mask), mask.shape[1] + max(map(len, columns)), dtype=torch.bool, device=mask.device)
    is_gap = torch.zeros_like(is_token)
    for row, firsts in enumerate(columns):
        is_token[row, mask.shape[1] + len(firsts) :] = False
        is_gap[row, [first + before for before, first in enumerate(firsts)]] = True
    is_token &= ~is_gap
    for name in ("input_ids", TYPES, "attention_mask"):
        values = known[name]
        known[name] = values.new_zeros(is_token.shape).masked_scatter(is_token, values)
    known["attention_mask"] = known["attention_mask"].masked_fill(is_gap, 1)
    positions, _ = rope_index(**{name: known[name] for name in names if name in known})
    axes = positions.shape[:-2]
    positions = (positions - is_gap.cumsum(-1))[..., is_token].view(*axes, *mask.shape)
    return positions, positions.masked_fill(mask == 0, 0).movedim(-2, 0).flatten(1).amax(1) + 1
