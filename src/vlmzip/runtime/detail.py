"""A cheap measure of the detail that a token map loses, for a warning."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import VisualTokens

WORRYING = 0.3
"""The lost detail at which the accuracy of reading falls below three quarters of the plain model's, on mini
(docs/results.md). Features of other encoders vary differently; the threshold was not measured there."""
LEAST_DETAIL = 1e-3
"""The least variance that is assumed for an image, as a fraction of its features' energy."""
CHUNK = 1024
"""Tokens to compare with the output tokens at a time."""


@torch.no_grad()
def detail_lost(tokens: VisualTokens, token_map: TokenMap) -> Float[Tensor, " batch"]:
    """Return the fraction of the features' variance that the output tokens do not explain: 0 is nothing, 1 is all.

    Each token of the grid is reconstructed as the weighted mean of its group, and a dropped token as the most similar
    output token (cosine). The measure is the squared error over the squared distance from the image's mean feature. It
    is vlmzip's own; no paper defines one.
    """
    x = tokens.features.float()
    # Divide by the sum of weights to get means: in VisionZip's reference merge, the weights of a group sum to 2.
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
    # An image without detail can lose none: its features differ only by rounding.
    floor = LEAST_DETAIL * x[:, grid].square().sum((1, 2))
    return (error[:, grid].sum(1) / torch.maximum(spread, floor).clamp(min=1e-12)).clamp(max=1)


def _distance_to_nearest(
    x: Float[Tensor, "batch tokens dim"], out: Float[Tensor, "batch max_out dim"], token_map: TokenMap
) -> Float[Tensor, "batch tokens"]:
    """Return the squared distance of every token to the most similar output token of its row."""
    within_length = torch.arange(out.shape[1], device=x.device) < token_map.length[:, None]
    directions = normalize(out, dim=-1).transpose(1, 2)
    errors = []
    for part in x.split(CHUNK, dim=1):
        similarity = (normalize(part, dim=-1) @ directions).masked_fill(~within_length[:, None], -torch.inf)
        nearest = out.gather(1, similarity.argmax(-1)[..., None].expand(-1, -1, x.shape[-1]))
        errors.append((part - nearest).square().sum(-1))
    return torch.cat(errors, dim=1)
