"""How much of an image's detail a token map lost: a cheap measure, for a warning that helps."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import VisualTokens

WORRYING = 0.3
"""Lost detail from which on reading falls below three quarters of what it was, measured on mini (docs/results.md).

Features of other encoders vary differently: what it says there is unmeasured."""
LEAST_DETAIL = 1e-3
"""Variance, as a share of the features' energy, below which an image counts as having this little."""
CHUNK = 1024
"""Dropped tokens compared with the kept ones at a time."""


@torch.no_grad()
def detail_lost(tokens: VisualTokens, token_map: TokenMap) -> Float[Tensor, " batch"]:
    """The share of the features' variance that the output tokens do not explain; 0: nothing lost, 1: all of it.

    Each token of the grid is put back as the mean of its group, a dropped one as the kept token nearest to it (cosine).
    Squared error over squared distance from the image's mean feature. Our own measure; no paper defines one.
    """
    x = tokens.features.float()
    # Sums of a group over sums of its weights: VisionZip's reference merge has weights that sum to 2.
    out = token_map.apply(x)
    total = token_map.apply(torch.ones_like(x[..., :1])).clamp(min=1e-6)
    out = out / total
    group = token_map.group
    back = out.gather(1, group.clamp(min=0)[..., None].expand_as(x))
    error = (x - back).square().sum(-1)
    dropped = group < 0
    if dropped.any():
        error = torch.where(dropped, _distance_to_nearest(x, out, token_map), error)
    grid = slice(tokens.prefix, None)
    spread = (x[:, grid] - x[:, grid].mean(1, keepdim=True)).square().sum((1, 2))
    # Of an image without detail nothing can be lost; what its features differ by is rounding.
    floor = LEAST_DETAIL * x[:, grid].square().sum((1, 2))
    return (error[:, grid].sum(1) / torch.maximum(spread, floor).clamp(min=1e-12)).clamp(max=1)


def _distance_to_nearest(
    x: Float[Tensor, "batch tokens dim"], out: Float[Tensor, "batch max_out dim"], token_map: TokenMap
) -> Float[Tensor, "batch tokens"]:
    """Squared distance of every token to the output token of its row that it is most similar to."""
    there = torch.arange(out.shape[1], device=x.device) < token_map.length[:, None]
    directions = normalize(out, dim=-1).transpose(1, 2)
    errors = []
    for part in x.split(CHUNK, dim=1):
        similarity = (normalize(part, dim=-1) @ directions).masked_fill(~there[:, None], -torch.inf)
        nearest = out.gather(1, similarity.argmax(-1)[..., None].expand(-1, -1, x.shape[-1]))
        errors.append((part - nearest).square().sum(-1))
    return torch.cat(errors, dim=1)
