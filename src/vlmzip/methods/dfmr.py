"""DFMR: pool plain images by a large factor, and detailed images by a small factor or not at all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import layer_norm, normalize, pad

from vlmzip.compressor import Compressor, Measured
from vlmzip.methods.pool2d import output_of_each
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens


@dataclass(frozen=True, kw_only=True)
class DFMR(Compressor):
    """Average square windows of visual tokens, with a window size that depends on the image's detail.

    This is the dynamic feature map reduction of LLaVA-Zip (arXiv:2412.08771). The authors published no code, and
    sources disagree about the method's details, so this is our reading:

    1. For each factor s of 1 to `max_factor` that divides both sides of the grid, split the grid into s x s windows.
    2. The deviation of s is the population standard deviation of each channel inside a window, averaged over channels
       and then over windows.
    3. Choose the largest s with a deviation below `tau`. Factor 1 always qualifies, because a single token has no
       deviation. An image with much detail therefore keeps all its tokens.
    4. Average each s x s window into one token.

    LLaVA-1.5's 24 x 24 tokens become 576, 144 or 64. The images of a batch can keep different numbers of tokens.

    No source confirms what to measure, the normalization, the mean over windows or the value of `tau`; these are
    settings. Nor does any source confirm the mean over channels, or that factor 3 is tried even if factor 2 fails.

    When it fails: on images whose small things lie on a plain ground, because plain images get the largest windows. On
    mini, which was not trained with it, it loses to `random_tokens` from 75 to 25 % of the tokens (docs/results.md).
    """

    paper = "arXiv:2412.08771, our reading"
    kind = "pool"
    examples = ("tau=0.5", "tau=0.1,measure=pixels,windows=max")
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)
    threshold: ClassVar[str] = "tau"
    budget_fields = ("tau",)

    tau: Annotated[float, Ge(0)] = 0.3
    """Use only factors with a deviation below this threshold. The paper's value is unknown. With the default, mini's
    images get all three factors. Set it for another model or budget with `vlmzip calibrate`."""
    max_factor: Annotated[int, Ge(1)] = 3
    """Side of the largest window, in tokens."""
    normalize: Literal["layer", "l2", "none"] = "layer"
    """Scale each token's features before measuring: "layer" to mean 0 and variance 1, "l2" to length 1, "none" not."""
    measure: Literal["features", "pixels"] = "features"
    """Measure the visual tokens at `site`, or the image's pixels in [0, 1] under each window."""
    windows: Literal["mean", "max"] = "mean"
    """Take the "mean" deviation of all windows, or the "max": then one detailed window suffices to keep tokens."""

    tiles: Literal["each", "together"] = "each"
    """Choose the factor of "each" view of an image by itself, or one for the first view (LLaVA-NeXT's base image) and
    one for all tiles "together", by their mean deviation. Together, the tokens of tiles stay on one regular grid, but
    plain and detailed tiles are pooled alike. No paper says which; the default treats a tile as an image. The frames of
    a video are equal: together, all share one factor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure == "pixels":
            object.__setattr__(self, "needs", type(self).needs | {Signal.PIXELS})

    def counts_by_factor(self, grid: Grid) -> dict[int, int]:
        factors = range(1, min(self.max_factor, grid.rows, grid.cols) + 1)
        return {f: grid.size // f**2 for f in factors if grid.rows % f == 0 and grid.cols % f == 0}

    def token_count(self, grid: Grid) -> int | None:
        return grid.size if len(self.counts_by_factor(grid)) == 1 else None

    @property
    def compares_views(self) -> bool:
        return self.tiles == "together"

    def measured(self, tokens: VisualTokens) -> list[Measured]:
        return Measured.of(self, tokens)

    def shared_by_content(self, views: Sequence[Measured], *, are_frames: bool) -> list[Compressor]:
        return with_one_factor(self, self.tau, Measured.parts(views, are_frames=are_frames))

    def deviations(self, tokens: VisualTokens) -> Float[Tensor, "batch factors"]:
        """Return the deviation of each factor above 1, in ascending order of factors, in float32."""
        grid = self.grid_of(tokens)
        if self.measure == "pixels":
            values = tokens.pixels.float().permute(0, 2, 3, 1)[:, None]
        else:
            values = self._normalized(tokens.features[:, tokens.prefix :].float()).unflatten(1, tuple(grid))
        side = values.shape[2] // grid.rows
        deviations = [self._deviation(values, f * side) for f in self.counts_by_factor(grid) if f > 1]
        return torch.stack(deviations, dim=1) if deviations else values.new_zeros(len(values), 0)

    def choose(self, tokens: VisualTokens) -> Int[Tensor, " batch"]:
        """Return the factor of each image as a 0-based index into `counts_by_factor`."""
        deviations = self.deviations(tokens)
        qualifies = pad(deviations < self.tau, (1, 0), value=True)  # factor 1 always qualifies
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
        by_window = _variances(values, side).sqrt().mean(-1).flatten(1)
        return by_window.mean(1) if self.windows == "mean" else by_window.amax(1)


def _variances(
    values: Float[Tensor, "batch frames rows cols channels"], side: int
) -> Float[Tensor, "batch frames window_rows window_cols channels"]:
    """Return the variance of each channel inside each window.

    On a CPU, `torch.var` takes many times as long for windows of a few tokens. It adds up in float64 there,
    and so do we.
    """
    inside: Tensor = values.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    if values.device.type != "cpu":
        return inside.var(dim=(3, 5), correction=0)
    by_place = inside.permute(3, 5, 0, 1, 2, 4, 6).flatten(0, 1).double()  # the places in a window come first
    return (by_place - by_place.mean(0)).square_().mean(0).to(values.dtype)


def with_one_factor(method: Compressor, tau: float, parts: Sequence[Sequence[Measured]]) -> list[Compressor]:
    """Return the method for each view of an image: the views of a part share one factor.

    No deviation reaches the new threshold, so a view gets the largest factor that is allowed: the one chosen here.
    """
    shares: list[Compressor] = []
    for part in parts:
        factor = Measured.joined(part).factor_below(tau)
        shares += [method.with_fields(tau=sys.float_info.max, max_factor=factor, tiles="each")] * len(part)
    return shares
