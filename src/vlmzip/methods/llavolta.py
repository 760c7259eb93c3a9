"""LLaVolta's visual context compressor: average pooling of the visual tokens inside the LLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Int
from torch import Tensor

from vlmzip.compressor import BudgetError, Compressor, Profile, at_least
from vlmzip.errors import UserError
from vlmzip.keep import Keep, count_to_keep
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Site, VisualTokens

BEFORE_THE_LLM = -1
Stride = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class LLaVolta(Compressor):
    """Average each run of `stride` consecutive visual tokens into one, from layer K on.

    Chen et al., NeurIPS 2024 (arXiv:2406.20092), section 3.2. The tokens of an image are taken in raster order. In
    LLaVA's 24 x 24 grid a run of 8 tokens lies in one row; a run crosses rows if the stride does not divide 24. Each
    average gets the position of its run's middle token, index (stride - 1) // 2. Text keeps its positions.

    Several layers give the paper's layer-wise variant (Table 7): each layer pools the tokens that the previous one
    left. `window="2d"` pools squares of stride x stride tokens instead; the authors did not try this.

    A video is pooled frame by frame, as the paper does with the 8 frames of Video-LLaVA: no run crosses the border of a
    frame, and CLS of a frame is dropped.

    Differences from the authors' code:

    - Any number of tokens and images, text-only rows, ragged batches and padding on either side work.
    - Positions are exact; theirs are averaged in float16.
    - An image with fewer tokens than the stride becomes one token; in their code it vanishes.

    When it fails: in early layers and before the LLM, where a run of a row mixes small things with their surroundings.
    At stride 4, mini loses 13 points from layer 1 on, and 0.3 from layer 4 on (docs/studies.md).
    """

    paper = "arXiv:2406.20092"
    kind = "pool"
    examples = ("layer=2,stride=8", "layer=2,16,stride=8,2", "layer=-1,stride=4,window=2d")
    sites = (Site.IN_LLM, Site.POST_PROJECTOR)
    budget_fields = ("stride",)
    label_fields = ("layer", "stride")
    by_frame = True

    site: Site = Site.IN_LLM
    layer: int | tuple[int, ...] = 2
    """K, the first layer that sees fewer tokens, 0-based; -1 pools projected tokens before the LLM; several: 4,8."""
    stride: Stride | tuple[Stride, ...] = 8
    """Tokens that are averaged into one: a number for all layers, or a number for each layer: 2,4."""
    window: Literal["1d", "2d"] = "1d"
    """Pool runs of tokens in raster order ("1d", as the paper does) or squares of the grid ("2d")."""
    last: Literal["drop", "keep"] = "drop"
    """If the last run is shorter than the stride, "drop" it as the authors do, or "keep" its mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer == BEFORE_THE_LLM:
            object.__setattr__(self, "site", Site.POST_PROJECTOR)
        elif self.site == Site.POST_PROJECTOR:
            if self.layer != LLaVolta.layer:
                raise UserError(
                    f"layer={self.layer!r} is inside the LLM, but site={self.site!s} is before it; give only one"
                )
            object.__setattr__(self, "layer", BEFORE_THE_LLM)
        layers, strides = _several(self.layer), _several(self.stride)
        if not layers or list(layers) != sorted(set(layers)) or (len(layers) > 1 and layers[0] < 1):
            raise UserError(f"layer must be one layer, or several in ascending order, got {self.layer!r}")
        if len(strides) not in (1, len(layers)):
            raise UserError(f"got {len(strides)} strides for {len(layers)} layers; give one stride, or one per layer")
        if len(layers) > 1 and self.window == "2d":
            raise UserError("window='2d' needs a grid, and none is left after the first layer; give one layer")

    @property
    def layers(self) -> tuple[int, ...]:
        return _several(self.layer) if self.site is Site.IN_LLM else ()

    @property
    def by_view(self) -> bool:
        return self.window == "2d" or super().by_view

    def stride_at(self, layer: int | None) -> int:
        strides = _several(self.stride)
        return strides[0] if len(strides) == 1 or layer is None else strides[self.layers.index(layer)]

    def token_count(self, grid: Grid) -> int | None:
        return self._count(grid, _several(self.stride)[0]) if len(self.layers) < 2 else None

    def count_at(self, layer: int | None, views: Sequence[Grid]) -> int:
        return sum(self._count(grid, self.stride_at(layer)) for grid in self.acts_on(views))

    def at_budget(self, keep: Keep, profile: Profile) -> tuple[Compressor, float]:
        """Return the configuration with the nearest stride. All layers share one stride."""
        method = self.placed(profile)
        method.check_layers(profile.layers, profile.first_layer)
        target = count_to_keep(keep, profile.size) / profile.size
        if method.layers and method.layers[0] / profile.layers >= target:
            raise BudgetError(
                f"{method.layers[0]} of {profile.layers} layers see all tokens before llavolta acts: on average more"
                f" than {method.layers[0] / profile.layers:.1%}",
                remedy=at_least(method.layers[0] / profile.layers + 1 / profile.size),
            )
        nearest = method._nearest_stride(profile, target, lambda candidate: candidate.reached(profile))
        return nearest, nearest.reached(profile)

    def at_keep(self, keep: Keep, profile: Profile) -> tuple[Compressor, float]:
        """Return the configuration with the nearest stride. All layers share one stride."""
        method = self.placed(profile)
        method.check_layers(profile.layers, profile.first_layer)
        target = count_to_keep(keep, profile.size) / profile.size
        nearest = method._nearest_stride(profile, target, lambda candidate: candidate.left(profile))
        return nearest, nearest.left(profile)

    def _nearest_stride(self, profile: Profile, target: float, ratio: Callable[[LLaVolta], float]) -> LLaVolta:
        candidates = [self.with_fields(stride=stride) for stride in range(1, profile.size + 1)]
        return min(candidates, key=lambda candidate: (abs(ratio(candidate) - target), ratio(candidate)))

    def assign(self, tokens: VisualTokens) -> TokenMap:
        stride = self.stride_at(tokens.layer)
        batch, count, _ = tokens.features.shape
        device = tokens.features.device
        if self.window == "2d":
            group = self._squares(self.grid_of(tokens), stride, device)
        else:
            group = self._runs(count - tokens.prefix, stride, device)
        return TokenMap.merge(group.expand(batch, -1)).after_dropping(tokens.prefix)

    def _count(self, grid: Grid, stride: int) -> int:
        if self.window == "1d":
            return _windows(grid.size, stride, self.last)
        return grid.frames * _windows(grid.rows, stride, self.last) * _windows(grid.cols, stride, self.last)

    def _runs(self, count: int, stride: int, device: torch.device) -> Int[Tensor, " tokens"]:
        group = torch.arange(count, device=device) // stride
        return torch.where(group < _windows(count, stride, self.last), group, -1)

    def _squares(self, grid: Grid, stride: int, device: torch.device) -> Int[Tensor, " tokens"]:
        down, across = _windows(grid.rows, stride, self.last), _windows(grid.cols, stride, self.last)
        frame = torch.arange(grid.frames, device=device)[:, None, None]
        row = (torch.arange(grid.rows, device=device) // stride)[None, :, None]
        col = (torch.arange(grid.cols, device=device) // stride)[None, None, :]
        inside = (row < down) & (col < across)
        return torch.where(inside, (frame * down + row) * across + col, -1).reshape(-1)


def _windows(count: int, stride: int, last: str) -> int:
    """Return the number of windows. A partial last window counts if it is kept, or if it is the only one."""
    return max(count // stride, 1) if last == "drop" else -(-count // stride)


def _several(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)
