"""The prompt around the images: where their placeholders stand, and the prompt without those that are gone.

This file handles token ids and what goes with them token by token; it never sees a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from vlmzip.errors import UserError
from vlmzip.models.family import Family
from vlmzip.models.layout import Layout
from vlmzip.processor import Inputs

#: Inputs with one value per token of the prompt, and the value that padding gets. `input_ids` gets the pad token.
PER_TOKEN = {"attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "position_ids": 0}


@dataclass(frozen=True)
class Span:
    """Where the visual tokens of one image stand in the prompt that the LLM gets."""

    row: int
    columns: list[int]
    layout: Layout | None
    """How they lie on the grids of the image's views; `None` where they lie on no grid any more."""
    views: int = 1
    """Views of the image."""


def find_placeholders(
    ids: Int[Tensor, "batch length"], placeholder_id: int, counts: Sequence[int]
) -> list[tuple[int, list[int]]]:
    """For each image its row and the columns of its placeholders, in order of appearance.

    `counts` are the images' visual tokens. Raises `UserError` where they do not fill the placeholders, row by row.
    """
    is_placeholder = ids.cpu() == placeholder_id
    all_columns = is_placeholder.nonzero()[:, 1].tolist()
    ends = accumulate(is_placeholder.sum(1).tolist(), initial=0)
    columns_of = [all_columns[start:end] for start, end in pairwise(ends)]
    total = len(all_columns)
    if total != sum(counts):
        raise UserError(
            f"the prompt has {total} image placeholders, but its {len(counts)} image(s) have {sum(counts)} visual"
            " tokens; use the model's own processor, and one <image> for each image"
        )
    places: list[tuple[int, list[int]]] = []
    row = used = 0
    for count in counts:
        while used == len(columns_of[row]):
            row, used = row + 1, 0
        columns = columns_of[row][used : used + count]
        if len(columns) < count:
            raise UserError(
                f"row {row} of the prompt ends in the middle of an image: {len(columns)} of {count} placeholders"
            )
        places.append((row, columns))
        used += count
    return places


def shorten(
    mask: Int[Tensor, "batch length"],
    places: Sequence[tuple[int, list[int]]],
    offsets: Sequence[Sequence[int]],
    *,
    ascending: bool = False,
) -> Int[Tensor, "batch new_length"]:
    """Where each position of the shortened prompt comes from; -1 for padding.

    The tokens left of an image stand where its first placeholder stood, and what stands among its placeholders behind
    them; an offset names the placeholder of each. `ascending`: all of them stand in the order of the prompt.
    """
    attended = mask.cpu().bool()
    # The first and the last token of each row; 0 and -1 where a row has none.
    firsts = attended.int().argmax(1).tolist()
    lasts = (attended * torch.arange(1, attended.shape[1] + 1)).amax(1).sub(1).tolist()
    kept_rows: list[list[int]] = []
    for row, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        kept: list[int] = []
        at = first
        for (place_row, placeholders), image_offsets in zip(places, offsets, strict=True):
            if place_row == row:
                dropped = set(placeholders)
                kept += range(at, placeholders[0])
                left = [placeholders[offset] for offset in image_offsets]
                left += [column for column in range(placeholders[0], placeholders[-1]) if column not in dropped]
                kept += sorted(left) if ascending else left
                at = placeholders[-1] + 1
        kept_rows.append(kept + list(range(at, last + 1)))
    longest = max(map(len, kept_rows))
    pad_right = bool((~attended[:, -1]).any())
    padded = [
        row + [-1] * (longest - len(row)) if pad_right else [-1] * (longest - len(row)) + row for row in kept_rows
    ]
    return torch.tensor(padded, dtype=torch.long, device=mask.device)


def gather(
    values: Int[Tensor, "*axes _ length"], source: Int[Tensor, "batch new_length"], fill: int
) -> Int[Tensor, "*axes batch new_length"]:
    """`values` at `source`, `fill` where that is -1."""
    shape = (*values.shape[:-2], len(source))
    index = source.clamp(min=0).expand(*shape, -1)
    return values.expand(*shape, -1).gather(-1, index).masked_fill(source < 0, fill)


def pad_id(family: Family) -> int:
    """The token that stands where there is none; some configs say -1, which has no embedding."""
    pad = getattr(family.llm_config, "pad_token_id", None)
    return 0 if pad is None else max(pad, 0)


def prompt_in(inputs: Inputs) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """Return token ids and attention mask. Raise `UserError` where they are not what goes with images."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        raise UserError("give input_ids together with the images: vlmzip finds an image's place by its placeholders")
    if inputs.get("inputs_embeds") is not None:
        raise UserError("give input_ids or inputs_embeds, not both, with images: embeddings have no placeholders")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise UserError(f"input_ids must be a tensor [batch, length]; got {getattr(ids, 'shape', type(ids).__name__)}")
    if mask is not None and mask.shape != ids.shape:
        wanted = f"{list(ids.shape)} as input_ids"
        raise UserError(f"attention_mask must be [batch, length] with images: {wanted}; got {list(mask.shape)}")
    return ids, torch.ones_like(ids) if mask is None else mask


def refuse_placeholders_without_images(family: Family, inputs: Inputs) -> None:
    """Raise `UserError` for a prompt that speaks of images without having any."""
    ids = inputs.get("input_ids")
    if ids is None or inputs.get("mm_encoder_outputs"):
        return
    if bool((ids == family.placeholder_id).any()):
        raise UserError(f"the prompt has image placeholders, but there is no {family.image_inputs[0]}")
    refuse_unknown_tokens(family, ids)


def refuse_unknown_tokens(family: Family, ids: Int[Tensor, "batch length"]) -> None:
    """Raise `UserError` for tokens without an embedding; families replace placeholders before they look them up."""
    rows = family.model.get_input_embeddings().num_embeddings
    unknown = ids[(ids != family.placeholder_id) & ((ids < 0) | (ids >= rows))]
    if len(unknown):
        raise UserError(
            f"the prompt has the token {int(unknown[0])}, and the model knows tokens 0 to {rows - 1}:"
            " use the model's own tokenizer"
        )
