"""The prompt around the images: the columns of their placeholders, and the prompt without the dropped ones.

This file handles token ids and the inputs with one value per token. It never handles features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from vlmzip.errors import UserError
from vlmzip.models.family import Family, Modality
from vlmzip.models.layout import Layout
from vlmzip.processor import Inputs

#: Inputs with one value per token of the prompt, and their padding values. `input_ids` is padded with the pad token.
PER_TOKEN = {"attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "position_ids": 0}


@dataclass(frozen=True)
class Span:
    """The location of one image's visual tokens in the prompt that the LLM gets."""

    row: int
    columns: list[int]
    layout: Layout | None
    """The layout of these tokens on the grids of the image's views; `None` if they no longer form grids."""
    views: int = 1
    """The number of views of the image."""
    frames: list[int] | None = None
    """The frame of each of these tokens of a video; `None` for images."""


def find_placeholders(
    ids: Int[Tensor, "batch length"], placeholder_id: int, counts: Sequence[int], kind: Modality = "image"
) -> list[tuple[int, list[int]]]:
    """Return the row and the placeholder columns of each image, in order of appearance.

    `counts` has the number of visual tokens of each image. In messages, an image is a `kind`. Raise `UserError` if the
    counts do not match the placeholders of the rows.
    """
    is_placeholder = ids.cpu() == placeholder_id
    all_columns = is_placeholder.nonzero()[:, 1].tolist()
    ends = accumulate(is_placeholder.sum(1).tolist(), initial=0)
    columns_of = [all_columns[start:end] for start, end in pairwise(ends)]
    total = len(all_columns)
    if total != sum(counts):
        raise UserError(
            f"the prompt has {total} {kind} placeholders, but its {len(counts)} {kind}(s) have {sum(counts)} visual"
            f" tokens; use the model's own processor, and one <{kind}> for each {kind}"
        )
    places: list[tuple[int, list[int]]] = []
    row = used = 0
    for count in counts:
        while used == len(columns_of[row]):
            row, used = row + 1, 0
        columns = columns_of[row][used : used + count]
        if len(columns) < count:
            raise UserError(
                f"row {row} of the prompt ends in the middle of its {kind}: {len(columns)} of {count} placeholders"
            )
        places.append((row, columns))
        used += count
    return places


def question_ends(
    images: Sequence[tuple[int, int]], mask: Shaped[Tensor, "batch length"], labels: Int[Tensor, "batch new"] | None
) -> list[int]:
    """Return the last column of the question about each image: the last token of its row.

    `images` has the row and the last column of each image. In training, the question ends before the first answer that
    follows the image. Labels may cover only the new part of a conversation, which is its end.
    """
    last = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1).tolist()
    ends = [last[row] for row, _ in images]
    if labels is not None:
        known = mask.shape[1] - labels.shape[1]
        answers = [(of_row != PER_TOKEN["labels"]).nonzero()[:, 0] + known for of_row in labels.cpu()]
        for n, (row, column) in enumerate(images):
            following = answers[row][answers[row] > column]
            ends[n] = int(following[0]) - 1 if len(following) else ends[n]
    return ends


def shorten(
    mask: Int[Tensor, "batch length"],
    places: Sequence[tuple[int, list[int]]],
    offsets: Sequence[Sequence[int]],
    in_place: Sequence[bool],
) -> Int[Tensor, "batch new_length"]:
    """Return the column in the original prompt of each token of the shortened prompt; -1 for padding.

    `places` has the row and the placeholder columns of each image. `offsets` has, for each remaining token of an image,
    the index of the placeholder that it takes. The remaining tokens start at the image's first placeholder, and other
    tokens between its placeholders follow them. If `in_place` is true for an image, these others stay before the tokens
    of later columns, as timestamps do between the frames of a video. If no token is dropped, they stay where they are.
    """
    attended = mask.cpu().bool()
    # The first and the last token of each row; 0 and -1 for a row without tokens.
    firsts = attended.int().argmax(1).tolist()
    lasts = (attended * torch.arange(1, attended.shape[1] + 1)).amax(1).sub(1).tolist()
    kept_rows: list[list[int]] = []
    for row, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        kept: list[int] = []
        at = first
        for (place_row, placeholders), image_offsets, stay in zip(places, offsets, in_place, strict=True):
            if place_row == row:
                is_placeholder = set(placeholders)
                kept += range(at, placeholders[0])
                left = [placeholders[offset] for offset in image_offsets]
                columns = range(placeholders[0], placeholders[-1] + 1)
                if len(left) == len(placeholders):
                    tokens = iter(left)
                    kept += [next(tokens) if column in is_placeholder else column for column in columns]
                else:
                    others = [column for column in columns if column not in is_placeholder]
                    kept += _merged(left, others) if stay else left + others
                at = placeholders[-1] + 1
        kept_rows.append(kept + list(range(at, last + 1)))
    longest = max(map(len, kept_rows))
    pad_right = bool((~attended[:, -1]).any())
    padded = [
        row + [-1] * (longest - len(row)) if pad_right else [-1] * (longest - len(row)) + row for row in kept_rows
    ]
    return torch.tensor(padded, dtype=torch.long, device=mask.device)


def _merged(left: Sequence[int], others: Sequence[int]) -> list[int]:
    """Return both sequences of columns as one. Each of `others`, in order, precedes the first larger of `left`."""
    merged, waiting = [], deque(others)
    for column in left:
        while waiting and waiting[0] < column:
            merged.append(waiting.popleft())
        merged.append(column)
    return merged + list(waiting)


def gather(
    values: Int[Tensor, "*axes _ length"], source: Int[Tensor, "batch new_length"], fill: int
) -> Int[Tensor, "*axes batch new_length"]:
    """Return `values` at the columns in `source`, and `fill` for those that are -1."""
    shape = (*values.shape[:-2], len(source))
    index = source.clamp(min=0).expand(*shape, -1)
    return values.expand(*shape, -1).gather(-1, index).masked_fill(source < 0, fill)


def pad_id(family: Family) -> int:
    """Return the pad token of the config; 0 if it is missing or -1, which has no embedding."""
    pad = getattr(family.llm_config, "pad_token_id", None)
    return 0 if pad is None else max(pad, 0)


def prompt_in(inputs: Inputs) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """Return token ids and attention mask. Raise `UserError` if they cannot go with images."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        raise UserError("give input_ids together with the images: vlmzip finds an image's place by its placeholders")
    if inputs.get("inputs_embeds") is not None:
        raise UserError("give input_ids or inputs_embeds, not both, with images: embeddings have no placeholders")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise UserError(f"input_ids must be a tensor [batch, length]; got {getattr(ids, 'shape', type(ids).__name__)}")
    if mask is not None and mask.shape != ids.shape:
        shapes = f"{list(ids.shape)} as input_ids; got {list(mask.shape)}"
        raise UserError(f"attention_mask must be [batch, length] with images: {shapes}")
    return ids, torch.ones_like(ids) if mask is None else mask


def refuse_placeholders_without_images(family: Family, inputs: Inputs) -> None:
    """Raise `UserError` if a prompt has placeholders of absent images or videos, or unknown tokens."""
    ids = inputs.get("input_ids")
    if ids is None or inputs.get("mm_encoder_outputs"):
        return
    for each in family.modalities:
        name, kind = each.image_inputs[0], each.modality
        if inputs.get(name) is None and bool((ids == each.placeholder_id).any()):
            if inputs.get("pixel_values_videos") is not None:
                raise UserError(
                    f"the prompt has {kind} placeholders, but {name} is missing: give the {kind}s, too, or if they"
                    f" stand for a video, vlmzip cannot compress videos of {type(family.model).__name__} yet"
                )
            raise UserError(f"the prompt has {kind} placeholders, but {name} is missing; give the {kind}s, too")
    refuse_unknown_tokens(family, ids)


def refuse_unknown_tokens(family: Family, ids: Int[Tensor, "batch length"]) -> None:
    """Raise `UserError` for tokens without an embedding.

    Placeholders need none: families replace them before they look up embeddings.
    """
    rows = family.model.get_input_embeddings().num_embeddings
    is_placeholder = torch.stack([ids == each.placeholder_id for each in family.modalities]).any(0)
    unknown = ids[~is_placeholder & ((ids < 0) | (ids >= rows))]
    if len(unknown):
        raise UserError(
            f"the prompt has the token {int(unknown[0])}, but the model knows tokens 0 to {rows - 1}:"
            " use the model's own tokenizer"
        )
