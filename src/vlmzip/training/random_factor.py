"""LLaVA-Zip's Random: pooling factors drawn by lot while training, so that the LLM meets every number of tokens."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.methods import Pool2d
from vlmzip.methods.pool2d import output_of_each
from vlmzip.schema import Seed
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Site, VisualTokens


@dataclass(frozen=True, kw_only=True)
class RandomFactor(Compressor):
    """Average square windows whose side is drawn from `factors`, each equally likely.

    The "Random" variant of LLaVA-Zip (arXiv:2412.08771), which trains with a factor from {1, 2, 3}; whether it is drawn
    for each step or each image is not known, hence `per`. For training alone: a trainer calls `drawn` before each
    forward; without that, every call draws the same.
    """

    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)

    factors: tuple[Annotated[int, Ge(1)], ...] = (1, 2, 3)
    """Sides of the windows, in tokens."""
    per: Literal["image", "step"] = "image"
    """Whether each "image" has a draw of its own, or all of an optimiser "step", in all processes, share it."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.factors:
            raise UserError("factors are missing: give sides of windows, such as 1,2,3")

    def drawn(self, step: int, salt: int = 0) -> Compressor:
        """What to compress with in an optimiser step; the same whenever the same is asked, so that a run can resume.

        `step` is its number, or any other that stands for it; `salt` tells apart the forwards of one step: processes,
        and batches that are accumulated.
        """
        if self.per == "step":
            return self._pool(self._factors_for(1, mixed(self.seed, step))[0])
        return dataclasses.replace(self, seed=mixed(self.seed, step, salt))

    def counts(self, grid: Grid) -> list[int]:
        """An image's output tokens for each of the factors."""
        return [self._pool(factor).token_count(grid) for factor in self.factors]

    def token_count(self, grid: Grid) -> int | None:
        counts = set(self.counts(grid))
        return counts.pop() if len(counts) == 1 else None

    def assign(self, tokens: VisualTokens) -> TokenMap:
        grid = self.grid_of(tokens)
        outputs = {factor: output_of_each(tokens, grid, factor) for factor in self.factors}
        factors = self._factors_for(len(tokens.features), self.seed)
        return TokenMap.merge(torch.stack([outputs[factor] for factor in factors]))

    def _factors_for(self, count: int, seed: int) -> list[int]:
        rng = torch.Generator().manual_seed(seed)
        return [self.factors[i] for i in torch.randint(len(self.factors), (count,), generator=rng).tolist()]

    def _pool(self, factor: int) -> Pool2d:
        return Pool2d(factor=factor, site=self.site, positions=self.positions)


def mixed(*numbers: int) -> int:
    """A seed from several numbers; neighbours do not resemble each other."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7])
