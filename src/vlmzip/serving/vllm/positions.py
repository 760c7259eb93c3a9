"""Positions with three axes (M-RoPE): the remaining tokens of an image keep those that they have in the whole image.

vLLM counts positions before it encodes an image. The positions of text follow from shapes, and the engine takes them
from a prompt with whole images. Those of the remaining tokens may follow from what the image shows, so they are further
columns of their features, counted from the start of the image: vLLM's caches then keep both together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

#: Axes of a position: time, rows and columns.
AXES = 3
#: A position is written in digits of this base, which are exact in bfloat16 and float16, and has this many of them.
BASE, DIGITS = 256, 3
#: The number of columns behind the features of a token.
COLUMNS = AXES * DIGITS


def with_positions(features: Float[Tensor, "tokens dim"], positions: Int[Tensor, "3 tokens"]) -> Tensor:
    """Return features with the positions of their tokens in further columns."""
    digits = torch.stack([positions // BASE**digit % BASE for digit in range(DIGITS)], -1)
    return torch.cat([features, digits.transpose(0, 1).flatten(1).to(features)], 1)


def split_positions(
    rows: Float[Tensor, "tokens dim_and_columns"],
) -> tuple[Float[Tensor, "tokens dim"], Int[Tensor, "3 tokens"]]:
    """Return the features and the positions of rows of `with_positions`."""
    digits = rows[:, -COLUMNS:].long().unflatten(1, (AXES, DIGITS))
    scale = torch.tensor([BASE**digit for digit in range(DIGITS)], device=rows.device)
    return rows[:, :-COLUMNS], (digits * scale).sum(-1).transpose(0, 1)


def in_prompt(
    positions: Int[Tensor, "3 length"],
    is_visual: Tensor,
    first: int,
    of_tokens: Int[Tensor, "3 tokens"],
) -> Int[Tensor, "3 length"]:
    """Return the positions of a prompt with those of the next visual tokens from index `first` on.

    `of_tokens` counts from the start of an image or video, and `positions` has those of the text. Tokens of text stand
    before and after each image.
    """
    index = torch.arange(len(is_visual), device=is_visual.device)
    text_before = index.where(~is_visual, -1).cummax(0).values
    places = is_visual.nonzero()[:, 0]
    places = places[places >= first][: of_tokens.shape[1]]
    starts = pad(positions[0], (1, 0), value=-1)[text_before[places] + 1] + 1
    updated = positions.clone()
    updated[:, places] = starts + of_tokens.to(positions)
    return updated


def updated_positions(
    prompt: Sequence[int] | Tensor,
    placeholders: Sequence[int],
    rows: Sequence[Tensor],
    positions: Int[Tensor, "3 length"],
    computed: int,
) -> tuple[list[Tensor], Int[Tensor, "3 length"], int]:
    """Return the features of a chunk of a prompt, the prompt's positions, and what the next token's has beyond length.

    `rows` has the visual tokens of the chunk, which starts behind `computed` tokens of the prompt.
    """
    parts = [split_positions(values) for values in rows]
    if parts:
        of_tokens = torch.cat([of_item for _, of_item in parts], 1)
        ids = torch.as_tensor(prompt, device=positions.device)
        is_visual = torch.isin(ids, torch.tensor(placeholders, device=positions.device))
        positions = in_prompt(positions, is_visual, computed, of_tokens)
    return [features for features, _ in parts], positions, int(positions[0, -1]) + 1 - positions.shape[1]
