"""HiPrune: keep patches around the objects of a middle encoder layer, and the patches of a deep one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from jaxtyping import Bool
from torch import Tensor

from vlmzip.compressor import BudgetedCompressor
from vlmzip.errors import UserError
from vlmzip.keep import A_NINTH, Keep, round_half_up
from vlmzip.token_map import TokenMap, highest
from vlmzip.visual_tokens import Grid, Signal, VisualTokens

#: The paper's object layer of CLIP ViT-L, and its number of layers.
OBJECT_LAYER, DEPTH = 9, 24


@dataclass(frozen=True, kw_only=True)
class HiPrune(BudgetedCompressor):
    """Keep patches that receive attention in a middle encoder layer, their neighbours, and those of a deep layer.

    Liu et al. (arXiv:2508.00553). Attention received is the mean over heads and over all attending tokens.

    1. Anchors are the k·alpha/5 patches, rounded, that receive the most attention in the object layer.
    2. Buffers are the anchors' neighbours above, below, left and right.
    3. Registers are the other patches that receive the most attention in the layer that gives the features. They fill
       the budget k.

    All remain in raster order, without CLS. No CLS is needed. The object layer is the 9th of CLIP's 24 layers; other
    encoders take the layer at the same share of their depth. For Qwen2.5-VL the authors take the 16th of 32:
    `object_layer=16`.

    Differences from the authors' code:

    - Neighbours are those on the grid. Theirs of patches in the first and last column lie in the row above or below,
      and those outside the grid become its first or its last patch.
    - If anchors and buffers exceed the budget, the first buffers in raster order remain; theirs fails.
    - Any batch size works. Of patches with equal attention, the first in raster order remain; the authors' choice
      depends on the device. Images with several views share a count in proportion to the views' sizes.

    Not confirmed: the score at each number of tokens.

    When it fails: if the object layer does not show objects. The authors chose it by looking at CLIP and Qwen2.5-VL;
    for other encoders, nothing says that the same share of the depth is right.
    """

    paper = "arXiv:2508.00553"
    examples = ("keep=64", "keep=25%,alpha=0.5")
    needs = frozenset({Signal.ATTENTION_RECEIVED})
    cost = "N²"

    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%")."""
    alpha: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the budget for anchors and buffers."""
    object_layer: Annotated[int, Ge(1)] | None = None
    """Encoder layer that gives the anchors, counted from 1; by default 9 of 24, or the same share of the layers."""

    def encoder_layers(self, depth: int) -> tuple[int, ...]:
        layer = self.object_layer or max(round_half_up(OBJECT_LAYER / DEPTH * depth), 1)
        if layer > depth:
            raise UserError(f"object_layer must be from 1 to {depth} in this encoder, got {layer}")
        return (layer - 1,)

    def assign(self, tokens: VisualTokens) -> TokenMap:
        received = tokens.attention_received[:, tokens.prefix :].float()
        middle, deep = received[..., 0], received[..., -1]
        count = self.count(middle.shape[1])
        anchor = highest(middle, round(count * self.alpha / 5))  # halves to even, as in the authors' code
        buffer = _neighbours(anchor, self.grid_of(tokens)) & ~anchor
        above_all = deep.amax(dim=1, keepdim=True) + 1
        score = torch.where(buffer, above_all, deep).masked_fill(anchor, torch.inf)
        return TokenMap.keep(highest(score, count)).after_dropping(tokens.prefix)


def _neighbours(marked: Bool[Tensor, "batch tokens"], grid: Grid) -> Bool[Tensor, "batch tokens"]:
    """Mark the tokens above, below, left and right of marked ones, in the same frame."""
    on_grid = marked.unflatten(1, tuple(grid))
    near = torch.zeros_like(on_grid)
    near[:, :, 1:] |= on_grid[:, :, :-1]
    near[:, :, :-1] |= on_grid[:, :, 1:]
    near[..., 1:] |= on_grid[..., :-1]
    near[..., :-1] |= on_grid[..., 1:]
    return near.flatten(1)
