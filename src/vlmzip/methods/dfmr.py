"""DFMR: pool plain images by a large factor and images with much detail by a small one, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import layer_norm, normalize, pad

from vlmzip.compressor import Compressor
from vlmzip.methods.pool2d import output_of_each
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens


@dataclass(frozen=True, kw_only=True)
class DFMR(Compressor):
    """Average square windows, with a factor for each image that its own variation decides.

    "Dynamic feature map reduction" of LLaVA-Zip (arXiv:2412.08771). No code of the authors is public and sources of
    the method's details disagree, so this is our reading. The factor is the largest of 1 to `max_factor` that divides
    the grid's sides and whose deviation lies below `tau`. The deviation of factor s is the population standard
    deviation inside each of the non-overlapping s x s windows, averaged over channels and windows. Factor 1 always
    qualifies (inside windows of one token nothing deviates), so an image with much detail keeps its tokens as they
    are.

    Not confirmed by any source, hence fields or choices of ours: whether features or pixels are measured, the
    normalisation, the averaging over channels, the value of `tau`, and that factor 3 is tried where 2 has failed.
    LLaVA-1.5's 24 x 24 tokens become 576, 144 or 64. Rows of a batch get different numbers of tokens.
    """

    paper = "arXiv:2412.08771, our reading"
    examples = ("tau=0.5", "tau=0.1,measure=pixels,windows=max")
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)
    threshold: ClassVar[str] = "tau"
    budget_fields = ("tau",)

    tau: Annotated[float, Ge(0)] = 0.3
    """The deviation from which on a factor is too coarse. The paper's value is unknown: with this one mini's images
    get all three factors. For another model or budget set it with `vlmzip calibrate`."""
    max_factor: Annotated[int, Ge(1)] = 3
    """Side of the largest window, in tokens."""
    normalize: Literal["layer", "l2", "none"] = "layer"
    """Features of each token before measuring: "layer" to mean 0 and variance 1, "l2" to length 1, "none" as is."""
    measure: Literal["features", "pixels"] = "features"
    """What is to vary: the visual tokens at `site`, or the image's pixels in [0, 1] under the windows' patches."""
    windows: Literal["mean", "max"] = "mean"
    """Over windows: their "mean" deviation, or "max", so that one detailed spot suffices to keep tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure == "pixels":
            object.__setattr__(self, "needs", type(self).needs | {Signal.PIXELS})

    def counts_by_factor(self, grid: Grid) -> dict[int, int]:
        factors = range(1, min(self.max_factor, grid.rows, grid.cols) + 1)
        return {f: grid.size // f**2 for f in factors if grid.rows % f == 0 and grid.cols % f == 0}

    def token_count(self, grid: Grid) -> int | None:
        return grid.size if len(self.counts_by_factor(grid)) == 1 else None

    def deviations(self, tokens: VisualTokens) -> Float[Tensor, "batch factors"]:
        """The deviation of every factor beyond 1, ascending; in float32."""
        grid = self.grid_of(tokens)
        if self.measure == "pixels":
            values = tokens.pixels.float().permute(0, 2, 3, 1)[:, None]
        else:
            values = self._normalized(tokens.features[:, tokens.prefix :].float()).unflatten(1, tuple(grid))
        side = values.shape[2] // grid.rows
        found = [self._deviation(values, f * side) for f in self.counts_by_factor(grid) if f > 1]
        return torch.stack(found, dim=1) if found else values.new_zeros(len(values), 0)

    def choose(self, tokens: VisualTokens) -> Int[Tensor, " batch"]:
        """For each image which of the factors in `counts_by_factor` it gets, counted from 0."""
        deviations = self.deviations(tokens)
        qualifies = pad(deviations < self.tau, (1, 0), value=True)  # factor 1 always does
        return (qualifies * torch.arange(qualifies.shape[1], device=qualifies.device)).amax(1)

    def assign(self, tokens: VisualTokens) -> TokenMap:
        choice, grid = self.choose(tokens), self.grid_of(tokens)
        groups = [output_of_each(tokens, grid, factor) for factor in self.counts_by_factor(grid)]
        return TokenMap.merge(torch.stack(groups)[choice])

    def _normalized(self, features: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        if self.normalize == "layer":
            return layer_norm(features, features.shape[-1:])
        return normalize(features, dim=-1) if self.normalize == "l2" else features

    def _deviation(
        self, values: Float[Tensor, "batch frames rows cols channels"], side: int
    ) -> Float[Tensor, " batch"]:
        inside: Tensor = values.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        by_window = inside.var(dim=(3, 5), correction=0).sqrt().mean(-1).flatten(1)
        return by_window.mean(1) if self.windows == "mean" else by_window.amax(1)
