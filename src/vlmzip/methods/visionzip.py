"""VisionZip: keep the tokens that the vision encoder attends to, and merge the rest into contextual tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.compressor import BudgetedCompressor
from vlmzip.errors import UserError
from vlmzip.keep import Keep, round_half_up
from vlmzip.token_map import TokenMap, highest, rows_at
from vlmzip.visual_tokens import Grid, Signal, VisualTokens

#: The paper's settings (54+10, 108+20, 162+30) all have 5.4 dominant tokens per contextual token.
TOKENS_PER_CONTEXTUAL = 6.4


@dataclass(frozen=True, kw_only=True)
class VisionZip(BudgetedCompressor):
    """Keep the dominant tokens that CLS attends to most, and merge the rest into a few contextual tokens.

    Yang et al., CVPR 2025 (arXiv:2412.04467), Algorithms 1 and 2:

    1. Dominant tokens are CLS and the patches with the highest attention from CLS. An encoder without CLS ranks patches
       by the attention that they receive from all tokens (appendix A.2).
    2. Of the remaining patches, `contextual` evenly spaced ones become targets. Every other patch joins the target with
       the nearest key (cosine similarity).
    3. The output is the dominant tokens in raster order, CLS first, and then one contextual token per target.

    The paper and the authors' code merge differently. The paper averages target and assigned tokens (`merge="mean"`).
    The code adds the mean of the assigned tokens to the target (`merge="reference"`, the default); the published
    numbers come from the code.

    Images with several views (LLaVA-NeXT) follow the authors' code: each view is compressed separately. The output is
    the base image's tokens, the tiles' dominant patches in the raster order of the whole image, the CLS tokens of the
    tiles, and the contextual tokens tile by tile, without newlines. The authors count tokens per view; their setting
    for 320 tokens is `VisionZip(dominant=54, contextual=10, whole_views=True)`. A `keep` is shared out over the views.

    Differences from the authors' code: any batch size and `contextual=0` work. Of patches with equal attention, the
    first in raster order are dominant; the authors' choice depends on the device.

    When it fails: if the question asks about something that attracts no attention from CLS, because the question is not
    read. On mini, counting suffers first: with half of the tokens it answers 30 % of these questions, a random subset
    48 % (docs/results.md).
    """

    paper = "arXiv:2412.04467"
    kind = "prune and merge"
    cost = "N·k"
    published = {192: 98.5, 128: 97.6, 64: 94.0}
    published_in = "VisionZip (arXiv:2412.04467), Table 1, 11 benchmarks"
    examples = ("keep=64", "keep=11%,merge=mean", "dominant=54,contextual=10")
    needs = frozenset({Signal.CLS_ATTENTION, Signal.KEYS})
    budget_fields = ("keep", "keep_per_view", "dominant", "contextual")

    keep: Keep | None = None
    """Tokens per image (int) or a fraction (float, "11%"), split 5.4 : 1 into dominant and contextual; default 1/9."""
    dominant: Annotated[int, Ge(0)] | None = None
    """Dominant tokens per view, including CLS. Give it together with `contextual`, instead of `keep`."""
    contextual: Annotated[int, Ge(0)] | None = None
    """Contextual tokens per view. Give it together with `dominant`, instead of `keep`."""
    merge: Literal["reference", "mean"] = "reference"
    """Target plus mean of the assigned tokens ("reference", the authors' code), or mean of all ("mean", the paper)."""
    whole_views: bool = False
    """Whether the padding of tiles (LLaVA-NeXT) counts as part of the image, as in the authors' code. By default, only
    tokens that the LLM would see without compression are kept or merged, so that the budget is spent on the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        split = (self.dominant, self.contextual)
        budget = (self.keep, self.keep_per_view)
        if split != (None, None) and (None in split or budget != (None, None)):
            raise UserError("visionzip takes keep alone, or dominant and contextual together")
        if split == (0, 0):
            raise UserError("dominant and contextual must not both be 0; give at least 1 of one of them")

    def split(self, size: int) -> tuple[int, int]:
        """Return the numbers of dominant tokens (including CLS) and contextual tokens for `size` grid tokens."""
        if self.dominant is not None and self.contextual is not None:
            return self.dominant, self.contextual
        count = self.count(size)
        contextual = round_half_up(count / TOKENS_PER_CONTEXTUAL)
        return count - contextual, contextual

    def token_count(self, grid: Grid) -> int:
        return sum(self.split(grid.size))

    def with_keep(self, keep: Keep) -> VisionZip:
        return dataclasses.replace(self, keep=keep, keep_per_view=None, dominant=None, contextual=None)

    def arrange(
        self, views: Sequence[Grid], prefix: int, ranks: Sequence[Int[Tensor, " _"]]
    ) -> Int[Tensor, " features"]:
        if len(views) == 1:
            return super().arrange(views, prefix, ranks)
        parts: list[list[Tensor]] = [[], [], []]  # outputs of the tiles: dominant patches, CLS, contextual tokens
        start = len(ranks[0])
        for share, grid, rank in zip(list(self.shared(views))[1:], views[1:], ranks[1:], strict=True):
            outputs = torch.arange(start, start + len(rank))
            dominant = share.split(grid.size)[0] if len(rank) < grid.size else len(rank)
            first = min(prefix, dominant) if len(rank) < grid.size else 0
            for part, values in zip(parts, (outputs[first:dominant], outputs[:first], outputs[dominant:]), strict=True):
                part.append(values)
            start += len(rank)
        patches = torch.cat(parts[0])
        patches = patches[torch.cat(list(ranks))[patches].argsort(stable=True)]
        return torch.cat([torch.arange(len(ranks[0])), patches, *parts[1], *parts[2]])

    def assign(self, tokens: VisualTokens) -> TokenMap:
        count = tokens.features.shape[1]
        dominant, contextual = self.split(count - tokens.prefix)
        is_dominant = _most_attended(tokens.cls_attention, tokens.prefix, dominant)
        # rest[b] holds the indices of the tokens that are neither dominant nor prefix. The stable sort of 0s and 1s
        # puts them first and keeps their raster order.
        taken = is_dominant.clone()
        taken[:, : tokens.prefix] = True
        rest_count = count - tokens.prefix - max(dominant - tokens.prefix, 0)
        rest = taken.to(torch.uint8).argsort(dim=1, stable=True)[:, :rest_count]
        nearest, target = _nearest_target(tokens.keys, rest, contextual)

        # Output tokens: first the dominant ones, then, from index `start`, the contextual ones.
        start = is_dominant.sum(dim=1, keepdim=True)
        group = torch.where(is_dominant, is_dominant.cumsum(dim=1) - 1, -1)
        group = group.scatter(1, rest, torch.where(nearest >= 0, nearest + start, -1))
        weight = is_dominant.to(torch.float32).scatter(1, rest, self._weights(nearest, target, contextual))
        anchor = is_dominant.scatter(1, rest, target)
        return TokenMap(group, weight, anchor, start[:, 0] + contextual)

    def _weights(
        self, nearest: Int[Tensor, "batch rest"], target: Tensor, contextual: int
    ) -> Float[Tensor, "batch rest"]:
        """Return the weight of each rest token in its contextual token."""
        if contextual == 0:
            return torch.zeros_like(nearest, dtype=torch.float32)
        others = torch.zeros(len(nearest), contextual, device=nearest.device)
        others = others.scatter_add(1, nearest, (~target).to(torch.float32)).gather(1, nearest)
        if self.merge == "mean":
            return 1 / (others + 1)
        return torch.where(target, 1.0, 1 / others.clamp(min=1))


def _most_attended(score: Float[Tensor, "batch tokens"], prefix: int, dominant: int) -> Tensor:
    """Mark `dominant` tokens: first the prefix (CLS), then the patches with the highest scores."""
    marked = torch.zeros_like(score, dtype=torch.bool)
    marked[:, : min(prefix, dominant)] = True
    marked[:, prefix:] = highest(score[:, prefix:], max(dominant - prefix, 0))
    return marked


def _nearest_target(
    keys: Float[Tensor, "batch tokens key_dim"], rest: Int[Tensor, "batch rest"], contextual: int
) -> tuple[Int[Tensor, "batch rest"], Tensor]:
    """Return each rest token's contextual token (0-based), and whether the rest token is its target.

    If `contextual` is 0, all indices are -1: the rest is dropped.
    """
    place = torch.arange(rest.shape[1], device=rest.device).expand_as(rest)
    if contextual == 0:
        return torch.full_like(rest, -1), torch.zeros_like(rest, dtype=torch.bool)
    step = max(1, rest.shape[1] // contextual)
    target = (place % step == 0) & (place < step * contextual)
    metric = normalize(rows_at(keys.float(), rest), dim=-1)
    cosine = metric @ metric[:, : step * contextual : step].transpose(1, 2)
    return torch.where(target, place // step, cosine.argmax(dim=-1)), target
