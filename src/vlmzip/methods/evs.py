"""EVS: drop the tokens of a video that have changed least since the frame before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import Keep, parse_keep
from vlmzip.token_map import TokenMap, highest
from vlmzip.visual_tokens import Grid, Site, VisualTokens


@dataclass(frozen=True, kw_only=True)
class EVS(BudgetedCompressor):
    """Keep the visual tokens of a video that differ most from the same place in the frame before.

    Efficient Video Sampling (arXiv:2510.14624), by the rule of vLLM's `compute_retention_mask`:

    1. A token's change is 1 minus the cosine similarity to the token at the same row and column one frame earlier.
    2. The tokens of the first frame always remain. Then those with the largest changes remain; of equal changes, the
       first in the order of time, row and column.
    3. `keep` counts the tokens of the whole video, first frame included. A fraction is rounded down, as in vLLM, where
       the setting is the fraction that goes: `keep="25%"` is `video_pruning_rate=0.75`.

    An image is a video of one frame, so it keeps all its tokens.

    The paper compares the pixels of frames before the encoder. vLLM compares the visual tokens, and so do we.

    Differences from vLLM: changes are computed in float32 in every precision. A budget may be a number of tokens, too.
    Tokens outside the grid (CLS) are dropped.

    When it fails: at budgets below one frame, because the first frame stays whole. Its accuracy was not measured here.
    """

    paper = "arXiv:2510.14624"
    videos_only = True
    examples = ("keep=50%", "keep=64")
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)
    sees_clip = True

    site: Site = Site.POST_PROJECTOR
    keep: Keep = 0.5
    """Tokens per video (int), or a fraction of them (float, "25%"); at least those of the first frame."""

    def token_count(self, grid: Grid) -> int:
        budget, frame = parse_keep(self.budget), grid.size // grid.frames
        # Subtract twice, as vLLM does, so that both round the same number down.
        count = budget if isinstance(budget, int) else int(grid.size * (1 - (1 - budget)))
        return min(max(count, frame), grid.size)

    def assign(self, tokens: VisualTokens) -> TokenMap:
        grid = self.grid_of(tokens)
        frames = tokens.features[:, tokens.prefix :].float().unflatten(1, (grid.frames, -1))
        change = 1 - cosine_similarity(frames[:, 1:], frames[:, :-1], dim=-1)
        first = torch.full_like(frames[:, :1, :, 0], torch.inf)
        score = torch.cat([first, change], 1).flatten(1)
        return TokenMap.keep(highest(score, self.token_count(grid))).after_dropping(tokens.prefix)
