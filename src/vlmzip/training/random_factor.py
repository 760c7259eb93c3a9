"""LLaVA-Zip's Random: pooling by random factors during training, so that the LLM sees every number of tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal

import torch
from annotated_types import Ge

from vlmzip.compressor import Compressor, Profile
from vlmzip.errors import UserError
from vlmzip.methods import Pool2d
from vlmzip.methods.pool2d import output_of_each
from vlmzip.schema import Seed
from vlmzip.seeds import mixed
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Site, VisualTokens


@dataclass(frozen=True, kw_only=True)
class RandomFactor(Compressor):
    """Average square windows whose side is drawn from `factors`, each equally likely.

    This is the "Random" variant of LLaVA-Zip (arXiv:2412.08771), which trains with a factor from {1, 2, 3}. The paper
    does not say whether it draws per step or per image, hence `per`. Use it only for training: a trainer calls
    `at_step` before each forward. Without that, every call draws the same factors.
    """

    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)
    for_training_only = True

    factors: tuple[Annotated[int, Ge(1)], ...] = (1, 2, 3)
    """Sides of the windows, in tokens."""
    per: Literal["image", "step"] = "image"
    """What shares a factor: "image" draws a factor for each image, or for each of its views, "step" one for all images
    of an optimiser step, in all processes."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.factors:
            raise UserError("factors is empty; give window sizes, such as 1,2,3")

    def at_step(self, step: int, salt: int = 0) -> Compressor:
        if self.per == "step":
            return self._pool(self._factors_for(1, mixed(self.seed, step))[0])
        return dataclasses.replace(self, seed=mixed(self.seed, step, salt))

    def counts(self, grid: Grid) -> list[int]:
        """Return the number of output tokens of a view for each of `factors`."""
        return [self._pool(factor).token_count(grid) for factor in self.factors]

    def cases_by_layer(self, profile: Profile) -> list[list[int]]:
        self.check_layers(profile.layers, profile.first_layer)
        by_view = [self.counts(grid) for grid in profile.grids]
        outcomes = zip(*by_view, strict=True) if self.per == "step" else product(*by_view)
        return [[sum(counts)] * profile.layers for counts in outcomes]

    def token_count(self, grid: Grid) -> int | None:
        counts = set(self.counts(grid))
        return counts.pop() if len(counts) == 1 else None

    def least_of_view(self, grid: Grid) -> int:
        return min(self.counts(grid))

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
