"""HoloV: share the budget out over crops of the image, and keep each crop's patches that CLS attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Signal, Site, VisualTokens

#: The authors' values: weight of the variance, factor of the attention, and what keeps divisors above 0.
BETA, ATTENTION_SCALE, SMALL = 0.09, 1e3, 1e-6


@dataclass(frozen=True, kw_only=True)
class HoloV(BudgetedCompressor):
    """Share the budget out over crops of the image, and keep each crop's patches with the most attention from CLS.

    Zou et al., NeurIPS 2025 (arXiv:2510.02912):

    1. The tokens, in raster order, are cut into 16 runs of equal length, the crops. If the length does not divide, the
       first crops have one token more.
    2. A token's score is its attention from CLS times 1,000, plus 0.09 times the variance of its cosine similarities to
       its crop's tokens. The variances are first scaled to the mean of the crop's attention.
    3. A crop's quota is its share of the sum of the crops' mean scores, rounded down. The crops with the largest shares
       get the rest, one each.
    4. Each crop keeps the tokens with the highest attention, in this order. A crop that stays whole keeps its raster
       order. CLS goes.

    In step 2 the scaling makes the crop's mean variance equal its mean attention. The variances thus cancel in step 3,
    except in crops of nearly equal tokens: a crop's quota follows its mean attention.

    An encoder without CLS uses the attention that patches receive from all tokens, as `visionzip` does.

    Differences from the authors' code:

    - A quota can exceed its crop. Theirs then fills the output with tokens of zeros. Here, the tokens with the highest
      attention outside the crop take these places.
    - Theirs scores crops of a single token 1,000 times too low. Here, all crops have the same scale.
    - Any batch size works. Of patches with equal attention, the first in raster order remain; the authors' choice
      depends on the device. Each view of an image is cut into crops of its own; theirs joins the views first.

    As in theirs, a token's similarity to itself counts as 0 in the variance.

    When it fails: if few crops hold what the question asks about. Every crop gets its share, however plain it is.
    """

    paper = "arXiv:2510.02912"
    examples = ("keep=64", "keep=25%,crops=9")
    needs = frozenset({Signal.CLS_ATTENTION})
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)
    cost = "N²"
    published = {128: 96.0, 64: 93.1}
    published_in = "rerun of the authors' code with 11 benchmarks of lmms-eval (Cen-Prune)"

    site: Site = Site.POST_PROJECTOR
    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%")."""
    crops: Annotated[int, Ge(1)] = 16
    """Number of crops of a view."""

    def assign(self, tokens: VisualTokens) -> TokenMap:
        attention = tokens.cls_attention[:, tokens.prefix :].float()
        size = attention.shape[1]
        count = self.count(size)
        sizes = _sizes(size, self.crops, attention.device)
        crop = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=size)
        start = (sizes.cumsum(0) - sizes)[crop]

        quota = _quotas(_scores(tokens.features[:, tokens.prefix :].float(), attention, sizes), count)
        # Ranks of each token within its crop, by attention. The stable sort by crop keeps the order by attention.
        by_attention = attention.argsort(dim=1, descending=True, stable=True)
        place = by_attention.gather(1, crop[by_attention].argsort(dim=1, stable=True)).argsort(dim=1)
        kept = place - start < quota[:, crop]
        kept = _filled(kept, attention, count)
        return _in_crop_order(kept, place, crop, start, sizes).after_dropping(tokens.prefix)


def _sizes(tokens: int, crops: int, device: torch.device) -> Int[Tensor, " crops"]:
    """Return the number of tokens of each crop that has any."""
    crops = min(crops, tokens)
    return tokens // crops + (torch.arange(crops, device=device) < tokens % crops).long()


def _scores(
    x: Float[Tensor, "batch tokens dim"], attention: Float[Tensor, "batch tokens"], sizes: Int[Tensor, " crops"]
) -> Float[Tensor, "batch crops"]:
    """Return the mean score of each crop's tokens."""
    longest = -(-x.shape[1] // len(sizes))
    offset = torch.arange(longest, device=x.device)
    inside = offset < sizes[:, None]
    index = torch.where(inside, (sizes.cumsum(0) - sizes)[:, None] + offset, x.shape[1])  # the end is a token of zeros
    x = x / (x.norm(dim=-1, keepdim=True) + SMALL)
    crops = pad(x, (0, 0, 0, 1))[:, index]
    similarity = crops @ crops.transpose(-1, -2)
    similarity.diagonal(dim1=-2, dim2=-1).zero_()
    others = (sizes - 1).clamp(min=1)[:, None]
    mean = similarity.sum(dim=-1) / others
    squares = (similarity - mean[..., None]).square().masked_fill(~inside[:, None], 0.0)
    variance = (squares.sum(dim=-1) / others).masked_fill(~inside, 0.0)
    mean_variance = variance.sum(dim=-1) / sizes
    mean_attention = ATTENTION_SCALE * pad(attention, (0, 1))[:, index].sum(dim=-1) / sizes
    return mean_attention + BETA * mean_variance * mean_attention / (mean_variance + SMALL)


def _quotas(score: Float[Tensor, "batch crops"], count: int) -> Int[Tensor, "batch crops"]:
    """Return the number of tokens that each crop may keep."""
    share = score / (score.sum(dim=1, keepdim=True) + SMALL)
    quota = (share * count).floor().long()
    rank = share.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return quota + (rank < count - quota.sum(dim=1, keepdim=True)).long()


def _filled(
    kept: Bool[Tensor, "batch tokens"], attention: Float[Tensor, "batch tokens"], count: int
) -> Bool[Tensor, "batch tokens"]:
    """Also mark the tokens with the highest attention that are not marked yet, up to `count` in each row."""
    rest = attention.masked_fill(kept, -torch.inf)
    rank = rest.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return kept | (rank < count - kept.sum(dim=1, keepdim=True))


def _in_crop_order(
    kept: Bool[Tensor, "batch tokens"],
    place: Int[Tensor, "batch tokens"],
    crop: Int[Tensor, " tokens"],
    start: Int[Tensor, " tokens"],
    sizes: Int[Tensor, " crops"],
) -> TokenMap:
    """Return the map that keeps the marked tokens crop by crop, by their places, or in raster order in whole crops.

    `place` orders the tokens by crop and by attention, `start` is the place of the first token of a token's crop.
    """
    kept_of_crop = torch.zeros(len(kept), len(sizes), dtype=torch.long, device=kept.device)
    kept_of_crop = kept_of_crop.scatter_add(1, crop.expand_as(place), kept.long())
    raster = torch.arange(len(crop), device=crop.device).expand_as(place)
    place = torch.where((kept_of_crop == sizes)[:, crop], raster, place)
    before = torch.zeros_like(place).scatter(1, place, kept.long()).cumsum(dim=1)
    group = torch.where(kept, before.gather(1, place) - 1, -1)
    return TokenMap(group, kept.float(), kept, kept.sum(dim=1))
