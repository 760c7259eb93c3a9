"""VidCom2: drop the tokens of a video that resemble the centre of their frame and of the whole video."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import Keep, parse_keep
from vlmzip.selection import STEPS
from vlmzip.token_map import TokenMap, highest
from vlmzip.visual_tokens import Grid, Site, VisualTokens

#: The squared widths a of the Gaussian kernels.
WIDTHS = tuple(2.0**power for power in range(-3, 2))
#: Temperature of the softmax over frames.
TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True)
class VidCom2(BudgetedCompressor):
    """Keep the visual tokens of a video that differ most from the centres of their frame and of the video.

    Video Compression Commander, Liu et al., EMNLP 2025 (arXiv:2505.14454), by the rule of vLLM's version:

    1. Of the channels, the half with the lowest variance over the video's tokens remain. Tokens are divided by their
       length there.
    2. A centre is the mean of such tokens: one of the video, and one of each frame. A token's similarity to a centre is
       the sum over a = 1/8, 1/4, 1/2, 1, 2 of exp(-d² / 2a), where d is the distance. Its redundancy is the sum of both
       similarities.
    3. A frame whose tokens are less similar to the video's centre on average gets more tokens: its share of them is
       b · (1 + p - mean of p), where b is the budget's share of all tokens, and p is the softmax over frames of the
       negative averages, at temperature 0.01. Counts are rounded, and lie between one token and the whole frame.
    4. In each frame, the tokens with the smallest redundancy remain. Then the most redundant of them go, or the least
       redundant of the others return, whatever their frame, until the count is exact.

    `keep` counts the tokens of the whole video; there is at least one for each frame, on average. A fraction is rounded
    down, as in vLLM, where the setting is the fraction that goes: `keep="25%"` is `video_pruning_rate=0.75`.

    An image keeps all its tokens, and so does a video of one frame, which vLLM prunes.

    Differences from vLLM: the redundancy is computed in float32 in every precision, and values that differ by less than
    a millionth count as equal. Of equally redundant tokens, the first in the order of time, row and column remain. Of
    channels with equal variance, the first remain. A budget may be a number of tokens, too; its share of all tokens
    then sets the shares of the frames. Tokens outside the grid (CLS) are dropped.

    Not confirmed: that vLLM's version decides as the authors' code in all cases. Its accuracy was not measured here.

    When it fails: on small things that move slowly through a busy scene, because it compares tokens with the average of
    a frame, and reads neither the frame before nor the question.
    """

    paper = "arXiv:2505.14454"
    videos_only = True
    examples = ("keep=25%", "keep=64")
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)
    sees_clip = True

    site: Site = Site.POST_PROJECTOR
    keep: Keep = 0.25
    """Tokens per video (int), or a fraction of them (float, "25%"); at least as many as it has frames."""

    def token_count(self, grid: Grid) -> int:
        if grid.frames == 1:
            return grid.size
        budget = parse_keep(self.budget)
        count = budget if isinstance(budget, int) else int(grid.size * self._share(grid))
        return min(max(count, grid.frames), grid.size)

    def _share(self, grid: Grid) -> float:
        """Return the share of all tokens that the budget allows."""
        budget = parse_keep(self.budget)
        # Subtract twice, as vLLM does, so that both round the same number.
        return budget / grid.size if isinstance(budget, int) else 1 - (1 - budget)

    def assign(self, tokens: VisualTokens) -> TokenMap:
        grid = self.grid_of(tokens)
        # 1. Choose the channels, and measure how redundant each token is.
        features = tokens.features[:, tokens.prefix :].float()
        order = features.var(dim=1, correction=0).argsort(dim=-1, stable=True)
        channels = order[:, : max(features.shape[-1] // 2, 1)].sort(dim=-1).values
        chosen = features.gather(2, channels[:, None].expand(-1, features.shape[1], -1))
        frames = normalize(chosen, dim=-1).unflatten(1, (grid.frames, -1))
        to_video = _similarity(frames, frames.mean(dim=(1, 2), keepdim=True))
        redundancy = to_video + _similarity(frames, frames.mean(dim=2, keepdim=True))
        redundancy = (redundancy * STEPS).round() / STEPS  # so that rounding errors do not decide
        # 2. Divide the budget among the frames.
        of_frame = (-to_video.mean(dim=-1) / TEMPERATURE).softmax(dim=-1)
        shares = (self._share(grid) * (1 + of_frame - of_frame.mean(dim=-1, keepdim=True))).clamp(max=1)
        counts = (shares * frames.shape[2]).round().clamp(min=1, max=frames.shape[2])
        # 3. Keep the least redundant tokens of each frame, and correct the count.
        rank = redundancy.argsort(dim=-1, stable=True).argsort(dim=-1)
        kept = (rank < counts[..., None]).flatten(1)
        # Tokens that the frames keep come first, then the others, each by rising redundancy, which is at most 10.
        score = torch.where(kept, 16.0, 0.0) - redundancy.flatten(1)
        return TokenMap.keep(highest(score, self.token_count(grid))).after_dropping(tokens.prefix)


def _similarity(
    frames: Float[Tensor, "batch frames tokens dim"], centre: Float[Tensor, "batch _ _ dim"]
) -> Float[Tensor, "batch frames tokens"]:
    """Return the sum of Gaussian kernels of each token's distance to a centre."""
    squared = (frames - centre).square().sum(dim=-1)
    return torch.stack([torch.exp(-squared / (2 * width)) for width in WIDTHS]).sum(dim=0)
