"""PruMerge: keep the patches whose attention from CLS is an outlier, and merge the others into them by their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import Keep, round_half_up
from vlmzip.token_map import TokenMap, highest, rows_at
from vlmzip.visual_tokens import Grid, Signal, VisualTokens


@dataclass(frozen=True, kw_only=True)
class PruMerge(BudgetedCompressor):
    """Keep patches with outlying attention from CLS, add their nearest patches to them, and merge the rest into one.

    Shang et al., ICCV 2025 (arXiv:2403.15388). Attention and keys are those of the last encoder layer, with all heads
    joined to one.

    1. Outliers are the patches with attention from CLS above Q3 + 1.5·(Q3 − Q1), where Q1 and Q3 are the quartiles of
       the image's attention. Their number depends on the image.
    2. PruMerge+ (`plus=True`) also keeps every s-th patch of the raster, where s is a third of the distance at which
       the outliers, evenly spread, would stand.
    3. To each kept patch come the 32 other patches, kept or not, with the nearest keys (cosine similarity), each times
       its attention. The attention is not normalised.
    4. One more token is the sum of all patches that are not kept, each times its attention.
    5. The output is the outliers by attention, the further patches of PruMerge+ in raster order, and the sum.

    An encoder without CLS uses the attention that patches receive from all tokens, as `visionzip` does.

    `keep` gives a budget, for comparisons at equal numbers of tokens. It counts the sum of the rest, too. The patches
    with the highest attention then take the place of the outliers. With `plus=True` they are a quarter of the kept
    patches, as they are about that in PruMerge+, and the others are evenly spaced among the remaining patches. This
    form is ours: the authors' code has a fixed share, but no count.

    Differences from the authors' code:

    - Each image of a batch has its own number of tokens; theirs runs single images.
    - Without outliers, only the sum remains; theirs fails with `plus`. If PruMerge+ keeps all patches, there is no sum;
      theirs is then a token of zeros.
    - Numbers of patches are exact; theirs pass through a rounded quotient and can be one less.
    - Of equal attention or similarity, the first patch in raster order wins; the authors' choice depends on the device.

    As in theirs, the last patch is never one of the evenly spaced ones of the adaptive form.

    Not confirmed: scores for 192, 128 and 64 of 576 tokens.

    Memory is proportional to output tokens times patches. Without `keep`, PruMerge+ can keep more than half of the
    patches, and then takes about 4 GiB for a view of 18,432 patches.

    When it fails: on images whose attention has few outliers, because few tokens remain; PruMerge+ remedies this.
    It saves nothing, however, where more than a sixth of the patches are outliers, which happens in small images: s is
    then 1, and all tokens remain. Without tuning, the LLM has not seen tokens that are such sums.
    """

    paper = "arXiv:2403.15388"
    examples = ("plus=true", "keep=64", "keep=25%,plus=true")
    needs = frozenset({Signal.LAST_CLS_ATTENTION, Signal.LAST_KEYS})
    kind = "prune and merge"
    cost = "N·k"

    keep: Keep | None = None
    """Tokens per image (int), or a fraction of them (float, "25%"); by default, the image's outliers decide."""
    plus: bool = False
    """Whether to keep patches across the whole image, too (PruMerge+)."""
    neighbours: Annotated[int, Ge(0)] = 32
    """Number of patches that are added to each kept patch."""

    @property
    def adapts(self) -> bool:
        """Return whether the image decides how many tokens remain."""
        return self.keep is None and self.keep_per_view is None

    def token_count(self, grid: Grid) -> int | None:
        return None if self.adapts else super().token_count(grid)

    def assign(self, tokens: VisualTokens) -> TokenMap:
        attention = tokens.last_cls_attention[:, tokens.prefix :].float()
        size = attention.shape[1]
        rank = attention.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        if self.adapts:
            best, spread = _outliers(attention, rank, plus=self.plus)
        else:
            best, spread = _by_count(rank, self.count(size) - 1, plus=self.plus)
        kept, outliers = best | spread, best.sum(dim=1, keepdim=True)
        total = kept.sum(dim=1, keepdim=True)
        output = torch.where(best, rank, outliers + spread.cumsum(dim=1) - 1)
        # The patches that are not kept form the last output, whose anchor is the one with the highest attention.
        has_rest = total < size
        anchor = kept | (~kept & (rank == rank.masked_fill(kept, size).amin(dim=1, keepdim=True)))
        keys = normalize(tokens.last_keys[:, tokens.prefix :].float(), dim=-1)
        token_map = TokenMap(
            torch.where(kept, output, total),
            torch.where(kept, 1.0, attention),
            anchor,
            (total + has_rest)[:, 0],
            _added(keys, attention, torch.where(kept, output, size), self.neighbours),
        )
        return token_map.after_dropping(tokens.prefix)


def _outliers(
    attention: Float[Tensor, "batch patches"], rank: Int[Tensor, "batch patches"], *, plus: bool
) -> tuple[Bool[Tensor, "batch patches"], Bool[Tensor, "batch patches"]]:
    """Mark the outliers of each image, and with `plus` further patches at equal distances."""
    quartiles = torch.quantile(attention, torch.tensor([0.25, 0.75], device=attention.device), dim=1, keepdim=True)
    outlying = attention > quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])
    if not plus:
        return outlying, torch.zeros_like(outlying)
    size, count = attention.shape[1], outlying.sum(dim=1, keepdim=True)
    step = (size // count.clamp(min=1) // 3).clamp(min=1)
    place = torch.arange(size, device=attention.device)
    return outlying, (place % step == 0) & (place < size - 1) & ~outlying & (count > 0)


def _by_count(
    rank: Int[Tensor, "batch patches"], count: int, *, plus: bool
) -> tuple[Bool[Tensor, "batch patches"], Bool[Tensor, "batch patches"]]:
    """Mark `count` patches of each image: those of the highest ranks, and with `plus` evenly spaced others."""
    first = round_half_up(count / 4) if plus else count
    best, others = rank < first, count - first
    # The numbers, among the patches that are left, of the evenly spaced ones.
    left = rank.shape[1] - first
    chosen = (2 * torch.arange(others, device=rank.device) + 1) * left // max(2 * others, 1)
    number = (~best).cumsum(dim=1) - 1
    return best, ~best & torch.isin(number, chosen)


def _added(
    keys: Float[Tensor, "batch patches key_dim"],
    attention: Float[Tensor, "batch patches"],
    output: Int[Tensor, "batch patches"],
    neighbours: int,
) -> Float[Tensor, "batch outputs patches"]:
    """Return the attention of the patches that are added to each output.

    `output` is the number of patches for a patch that is not kept.
    """
    batch, size = output.shape
    number = torch.arange(size, device=output.device).expand(batch, size)
    outputs = (output < size).sum(dim=1, keepdim=True)
    most = int(outputs.amax()) + 1
    # The patch of each output. The sum of the rest, and outputs that an image does not have, get no weights below.
    centre = torch.zeros(batch, size + 1, dtype=torch.long, device=output.device).scatter(1, output, number)[:, :most]
    similarity = rows_at(keys, centre) @ keys.transpose(1, 2)
    similarity = similarity.masked_fill(number[:, None] == centre[..., None], -torch.inf)
    near = highest(similarity.flatten(0, 1), min(neighbours, size - 1)).view_as(similarity)
    exists = torch.arange(most, device=output.device) < outputs
    return torch.where(near & exists[..., None], attention[:, None], 0.0)
