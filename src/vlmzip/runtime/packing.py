"""Packing of short rows into longer ones, which saves an LLM in training most of the padding.

Rows differ in length if their images keep different numbers of tokens. Padded to the longest row, a quarter of a batch
can be padding. transformers keeps packed rows apart by their positions, which start at 0 in each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from vlmzip.models.family import Family
from vlmzip.runtime.compressed_inputs import CompressedInputs
from vlmzip.runtime.report import CompressedImage
from vlmzip.runtime.stages import encoder_outputs

#: Number of steps between the two extreme bin lengths to try: that of the longest row, and twice that.
TRIED = 16


def pack(
    compressed: CompressedInputs, family: Family, images: Sequence[CompressedImage], fills: dict[str, int]
) -> None:
    """Pack the rows of a compressed training batch in place, if that is cheaper; otherwise leave them unchanged.

    `images` are in order of appearance. `fills` maps the name of each input to its padding value. Loss and gradients
    stay the same. Afterwards `report.source` describes the packed rows. Rows are not packed in three cases: they have
    explicit position ids, whose gaps would look like the start of another row; token types decide which tokens attend
    to each other; or the LLM does not keep packed rows apart.
    """
    llm, source = family.llm_config, compressed.report.source
    if source is None or not family.keeps_packed_rows_apart:
        return
    if any(compressed.get(name) is not None for name in ("position_ids", "token_type_ids")):
        return
    mask = compressed["attention_mask"].bool()
    # With hidden size h and MLP size m, the linear layers cost 8 h² + 6 h m floating-point operations per token, and
    # attention costs 4 h per pair of tokens.
    bins = cheapest(mask.sum(1).tolist(), 2 / (4 * llm.hidden_size + 3 * llm.intermediate_size))
    if len(bins) == len(mask):
        return
    index, positions = _places(mask, bins)
    for name, fill in fills.items():
        if compressed.get(name) is not None:
            compressed[name] = compressed[name].flatten()[index.clamp(min=0)].masked_fill(index < 0, fill)
    if compressed.get("labels") is not None:  # the last token of a row must not predict the first of the next
        compressed["labels"] = compressed["labels"].masked_fill(positions == 0, fills["labels"])
    compressed.report = replace(
        compressed.report, source=source.flatten()[index.clamp(min=0)].masked_fill(index < 0, -1), packed=True
    )
    order = {row: place for place, row in enumerate(row for rows in bins for row in rows)}
    by_row = sorted(zip(images, compressed.report.images, strict=True), key=lambda both: order[both[1].row])
    compressed["mm_encoder_outputs"] = encoder_outputs(family, [image for image, _ in by_row])
    compressed |= {"position_ids": positions, "use_cache": False}
    del compressed["attention_mask"]  # with a mask, transformers would not look for the starts of rows


def cheapest(lengths: Sequence[int], token_per_pair: float) -> list[list[int]]:
    """Return the rows of each bin, for the bin length that costs the LLM least.

    The lengths tried lie between that of the longest row and twice that. Longer bins leave less padding, but attention
    computes all pairs of tokens in a bin, even pairs from different rows. `token_per_pair` is the cost of a pair of
    tokens in attention, as a fraction of the cost of a token in the linear layers.
    """

    def cost(bins: list[list[int]]) -> float:
        width = max(sum(lengths[row] for row in rows) for rows in bins)
        return len(bins) * width * (1 + width * token_per_pair)

    apart = [[row] for row in range(len(lengths))]
    widths = [max(lengths) * (TRIED + step) // TRIED for step in range(TRIED + 1)]
    return min((apart, *(bins_of(lengths, width) for width in widths)), key=cost)


def bins_of(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Return the rows of each bin of `width` tokens: longest rows first, each in the first bin with enough room."""
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fitting = (rows for rows in bins if sum(lengths[other] for other in rows) + lengths[row] <= width)
        rows = next(fitting, None)
        if rows is None:
            bins.append(rows := [])
        rows.append(row)
    return bins


def _places(mask: Tensor, bins: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "bins width"], Int[Tensor, "bins width"]]:
    """Return two tables of the packed rows: the index of each token in the flattened mask, and its position in its row.

    For padding the index is -1 and the position is 0.
    """
    tokens = [row.nonzero()[:, 0] + number * mask.shape[1] for number, row in enumerate(mask)]
    joined = [torch.cat([tokens[row] for row in rows]) for rows in bins]
    counted = [torch.cat([torch.arange(len(tokens[row]), device=mask.device) for row in rows]) for rows in bins]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(joined, padding_value=-1), pad(counted, padding_value=0)
