"""Short rows side by side in one, so that an LLM in training computes on little padding.

Images that leave different numbers of tokens make rows of different length; padded to the longest, a quarter of a
batch can be padding. transformers keeps packed rows apart by their positions, which count from 0 in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from vlmzip.models.family import Family
from vlmzip.runtime.compressed_inputs import CompressedInputs
from vlmzip.runtime.report import CompressedImage

#: Lengths of bins that are tried between the longest row's and twice that.
TRIED = 16


def pack(
    compressed: CompressedInputs, family: Family, images: Sequence[CompressedImage], fills: dict[str, int]
) -> None:
    """Pack the rows of a compressed prompt that is to be trained on, if fewer would do; else leave them as they are.

    `images` are in order of appearance, `fills` has what padding gets by the name of the input. Loss and gradients
    stay the same. `report.source` is of the packed rows from then on. Where rows have positions of their own (original
    ones) nothing is packed: gaps in them would look like the beginning of another row. Nor is it where token types
    decide which tokens see each other, or where the LLM does not keep packed rows apart.
    """
    llm, source = family.llm_config, compressed.report.source
    if source is None or not family.keeps_packed_rows_apart:
        return
    if any(compressed.get(name) is not None for name in ("position_ids", "token_type_ids")):
        return
    mask = compressed["attention_mask"].bool()
    # A token costs 8 h² + 6 h m floating point operations in the linear layers, a pair of tokens 4 h in attention.
    bins = cheapest(mask.sum(1).tolist(), 2 / (4 * llm.hidden_size + 3 * llm.intermediate_size))
    if len(bins) == len(mask):
        return
    index, positions = _places(mask, bins)
    for name, fill in fills.items():
        if compressed.get(name) is not None:
            compressed[name] = compressed[name].flatten()[index.clamp(min=0)].masked_fill(index < 0, fill)
    if compressed.get("labels") is not None:  # the last token of one row must not foretell the first of the next
        compressed["labels"] = compressed["labels"].masked_fill(positions == 0, fills["labels"])
    compressed.report = replace(
        compressed.report, source=source.flatten()[index.clamp(min=0)].masked_fill(index < 0, -1), packed=True
    )
    order = {row: place for place, row in enumerate(row for one in bins for row in one)}
    by_row = sorted(zip(images, compressed.report.images, strict=True), key=lambda both: order[both[1].row])
    compressed["mm_encoder_outputs"] = family.encoder_outputs(
        [image.features for image, _ in by_row], [image.streams for image, _ in by_row]
    )
    compressed |= {"position_ids": positions, "use_cache": False}
    del compressed["attention_mask"]  # with one, transformers would not look for where rows begin


def cheapest(lengths: Sequence[int], token_per_pair: float) -> list[list[int]]:
    """The rows of each bin, in bins of the length that costs an LLM least: from the longest row's to twice that.

    Longer bins are filled better, but attention computes on all pairs of a bin, also of different rows.
    `token_per_pair` is what a pair of tokens costs, as a share of what the linear layers cost for one token.
    """

    def cost(bins: list[list[int]]) -> float:
        width = max(sum(lengths[row] for row in one) for one in bins)
        return len(bins) * width * (1 + width * token_per_pair)

    apart = [[row] for row in range(len(lengths))]
    widths = [max(lengths) * (TRIED + step) // TRIED for step in range(TRIED + 1)]
    return min((apart, *(bins_of(lengths, width) for width in widths)), key=cost)


def bins_of(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows that fit together into `width`: the long ones first, each into the first bin with room."""
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        room = (one for one in bins if sum(lengths[other] for other in one) + lengths[row] <= width)
        one = next(room, None)
        if one is None:
            bins.append(one := [])
        one.append(row)
    return bins


def _places(mask: Tensor, bins: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "bins width"], Int[Tensor, "bins width"]]:
    """For each place its token's number among those of all rows, -1 for padding; and its position in its own row."""
    tokens = [row.nonzero()[:, 0] + number * mask.shape[1] for number, row in enumerate(mask)]
    joined = [torch.cat([tokens[row] for row in one]) for one in bins]
    counted = [torch.cat([torch.arange(len(tokens[row]), device=mask.device) for row in one]) for one in bins]
    width = max(len(one) for one in joined)
    index = torch.stack([torch.nn.functional.pad(one, (0, width - len(one)), value=-1) for one in joined])
    positions = torch.stack([torch.nn.functional.pad(one, (0, width - len(one)), value=0) for one in counted])
    return index, positions
