"""Random drop: the baseline that every selection method must beat."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep
from vlmzip.schema import Seed
from vlmzip.seeds import mixed
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Site, VisualTokens


@dataclass(frozen=True, kw_only=True)
class RandomTokens(BudgetedCompressor):
    """Keep a random subset of the visual tokens, in raster order.

    This is the random-drop baseline of LLaVolta (arXiv:2406.20092, Table 3). The subset depends only on `seed` and the
    number of tokens. An image therefore keeps the same tokens in any batch, on any device and in any precision. Run
    several seeds to see the spread of results. The authors, in contrast, draw a new subset for every batch.

    When it fails: on small things, which may all be dropped: mini loses 20 points at 25 % of the tokens and 35 at 11 %
    (docs/results.md).
    """

    paper = "baseline of arXiv:2406.20092"
    cost = "1"
    examples = ("keep=64", "keep=25%,seed=1")
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)

    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%")."""
    seed: Seed = 0
    """Seed of the random subset."""
    layer: int = 2
    """K, the first LLM layer that sees fewer tokens, 0-based; used at site in_llm."""

    def at_step(self, step: int, salt: int = 0) -> RandomTokens:
        return dataclasses.replace(self, seed=mixed(self.seed, step, salt))

    def assign(self, tokens: VisualTokens) -> TokenMap:
        batch, count, _ = tokens.features.shape
        size = count - tokens.prefix
        # Draw on the CPU: with the same seed, other devices draw different numbers.
        order = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))
        kept = torch.zeros(count, dtype=torch.bool)
        kept[tokens.prefix + order[: self.count(size)]] = True
        return TokenMap.keep(kept.to(tokens.features.device).expand(batch, count))
