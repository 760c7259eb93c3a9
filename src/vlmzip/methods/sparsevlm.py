"""SparseVLM: keep the visual tokens that the question's relevant words attend to, and recycle some of the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmzip.compressor import BudgetError, Compressor, Profile, check_ascending, keep_all, nearest_to
from vlmzip.errors import UserError, check_choice
from vlmzip.keep import Keep, count_to_keep, round_half_up
from vlmzip.token_map import TokenMap, rows_at
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens

#: Number of tokens that are compared with all others at a time.
CHUNK = 1024
#: Distances between points that are kept in memory instead of being computed twice: 128 MiB in float32.
STORED = 2**25
#: Similarities, and mean squared distances, that differ by at most this fraction count as equal.
SAME = 1e-5
#: Visual tokens and LLM layers of LLaVA-1.5-7B, for which the schedules were published, and the schedules' layers.
PUBLISHED_TOKENS, PUBLISHED_DEPTH, PUBLISHED_LAYERS = 576, 32, (3, 7, 16)
#: Tokens kept by attention at each of the three layers, by version and budget (v1: SparseVLM 1.5; v2: SparseVLM+).
SCHEDULES = {
    "v1": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
#: The fraction of the pruned tokens that each version recycles.
RECYCLE = {"v1": 0.3, "v2": 0.0}


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Compressor):
    """Keep the visual tokens that the most visual words of the question attend to, and merge the best of the rest.

    Zhang et al., ICML 2025 (arXiv:2410.04417), section 3:

    1. Raters are the question tokens with above-average similarity to the image. Similarity is measured once, on the
       tokens that enter the LLM: take the dot product of each visual token with each question token, softmax over the
       question tokens, and average over the visual tokens.
    2. At each of several layers, a visual token's score is the attention that it gets from the raters, mean over raters
       and heads. The tokens with the highest scores stay.
    3. Of the others, the best 30 % plus one are recycled, as in the authors' code. These n tokens are clustered by
       density peaks (DPC-KNN) and become n // 10 + 1 tokens, the cluster means.

    **Layers.** The authors score by the attention of layers 2, 6 and 15 and drop tokens after them, so the first layers
    that see fewer tokens are 3, 7 and 16.

    **Budgets.** The authors average the tokens that each layer *leaves*: 192.03 in the schedule for 192. We report the
    tokens that each layer *sees*, on average 206.5 in that schedule. `at_budget` scales all counts of a schedule
    together until this average fits. It uses the layers that are set, or proportional ones in a smaller LLM. On other
    grids, the published counts become the same fractions of the tokens that reach each layer.

    Differences from the authors' code:

    - Any batch size works. Each image of a prompt is rated separately, by the text after it.
    - A merged token takes the place of its cluster's centre; theirs come after the last kept token. Tokens keep their
      positions; the authors renumber them in v1 and keep them in v2.
    - Equally dense tokens are ranked in raster order; the authors add random noise.
    - If no question token is above average (as in a question of one token), the last one is the rater.
    - Keeping all tokens is possible.
    - "v2" means the counts of SparseVLM+ without recycling. Its corrected attention and its choice of heads are left
      out.
    - Counts do not depend on the rank of the attention matrix (section 3.2); the authors' code uses these fixed counts,
      too.

    With labels, an image's question ends at the token before the first label after the image. Without labels, it ends
    at the last token of the prompt, so answers in the prompt count as part of the question.

    Memory is linear in an image's tokens. Clustering time is quadratic in the recycled tokens.

    When it fails: on single short prompts, which it makes slower, because it selects in three layers: 0.54x the plain
    prefill's speed for one image of LLaVA-1.5-7B on an H200. Small average budgets are out of reach in a shallow LLM,
    because the first layers see all tokens (docs/results.md).
    """

    paper = "arXiv:2410.04417"
    kind = "prune and merge"
    cost = "N²"
    published = {192: 95.5, 128: 92.9, 64: 86.9}
    published_in = "MMTok (arXiv:2508.18264)"
    examples = ("budget=64", "schedule=v2,budget=64", "counts=300,200,110,recycle=0.3")
    needs = frozenset({Signal.TEXT_ATTENTION, Signal.TEXT_FEATURES})
    sites = (Site.IN_LLM,)
    budget_fields = ("budget", "counts")

    site: Site = Site.IN_LLM
    schedule: Literal["v1", "v2"] = "v1"
    """The published counts: "v1" with recycling, or "v2" (SparseVLM+) without."""
    budget: int = 192
    """The authors' average number of tokens, out of 576, which selects the published schedule: 192, 128, 96 or 64."""
    counts: tuple[Keep, ...] | None = None
    """Tokens to keep at each layer, or fractions of the tokens that reach it, instead of `budget`: 300,200,110."""
    layer: tuple[int, ...] = PUBLISHED_LAYERS
    """The first layers that see fewer tokens, 0-based, ascending. Each ranks by the attention of the layer before."""
    recycle: Annotated[float, Ge(0), Le(1)] | None = None
    """Fraction of the pruned tokens to merge instead of dropping; default 0.3 in v1 and 0 in v2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("budget", self.budget, map(str, SCHEDULES[self.schedule]))
        check_ascending(self.layer, "3,7,16")
        counts = self._published if self.counts is None else self.counts
        if len(counts) != len(self.layer):
            raise UserError(f"got {len(counts)} counts for {len(self.layer)} layers; give one count per layer")

    # --- how many ---------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        return self.layer

    def count_at(self, layer: int | None, views: Sequence[Grid]) -> int:
        available = sum(grid.size for grid in views)
        return self._left(self._count(layer, available), available)

    def at_budget(self, keep: Keep, profile: Profile) -> tuple[SparseVLM, float]:
        """Return the configuration with all counts scaled down towards 1, or up towards the whole image.

        The class docstring says which layers it uses.
        """
        target = count_to_keep(keep, profile.size) / profile.size
        least = self._scaled(0.0, profile)
        if target < least.reached(profile):
            raise least._too_small(least.reached(profile), profile.layers)
        nearest = self._nearest_scale(profile, target, lambda candidate: candidate.reached(profile))
        return nearest, nearest.reached(profile)

    def at_keep(self, keep: Keep, profile: Profile) -> tuple[SparseVLM, float]:
        """Return the configuration whose scaled counts leave nearest to `keep` tokens after its last layer."""
        target = count_to_keep(keep, profile.size) / profile.size
        nearest = self._nearest_scale(profile, target, lambda candidate: candidate.left(profile))
        return nearest, nearest.left(profile)

    def _nearest_scale(self, profile: Profile, target: float, ratio: Callable[[SparseVLM], float]) -> SparseVLM:
        steps = range(8 * profile.size + 1)  # fine enough that each count changes by at most 1 per step
        return nearest_to(target, lambda step: self._scaled(step / steps[-1], profile), ratio, steps)

    def placed(self, profile: Profile) -> SparseVLM:
        fits = profile.first_layer <= self.layer[0] and self.layer[-1] < profile.layers
        return self if fits or self.layer != PUBLISHED_LAYERS else self._scaled(0.5, profile)

    @property
    def _published(self) -> tuple[int, ...]:
        """The number of tokens that the published schedule keeps at each layer."""
        return SCHEDULES[self.schedule][self.budget]

    @property
    def _recycle(self) -> float:
        return RECYCLE[self.schedule] if self.recycle is None else self.recycle

    def _count(self, layer: int | None, available: int) -> int:
        """Return how many of the available tokens stay unmerged at `layer`; `None` means the first layer."""
        stage = 0 if layer is None else self.layer.index(layer)
        if self.counts is not None:
            return count_to_keep(self.counts[stage], available)
        reaching = PUBLISHED_TOKENS
        for before in self._published[:stage]:
            reaching = self._left(before, reaching)
        return count_to_keep(self._published[stage] / reaching, available)

    def _recycled(self, pruned: int) -> tuple[int, int]:
        """Return how many of the pruned tokens are recycled, and how many tokens they become."""
        if pruned == 0 or self._recycle == 0:
            return 0, 0
        recycled = min(int(pruned * self._recycle) + 1, pruned)
        return recycled, recycled // 10 + 1

    def _left(self, count: int, available: int) -> int:
        """Return how many tokens are left if a layer keeps `count`, including the merged ones."""
        return count + self._recycled(available - count)[1]

    def _scaled(self, scale: float, profile: Profile) -> SparseVLM:
        """Return this compressor with scaled counts: 0 is one token per layer, 0.5 its own counts, 1 all tokens."""
        depth, size = profile.layers, profile.size
        too_deep = self.layer[-1] >= depth
        if depth < 2:
            raise BudgetError("in-LLM compression needs at least 2 decoder layers")
        counts, left = {}, size
        for layer in self.layer:
            count = self._count(layer, left)
            left = self._left(count, left)
            scaled = 2 * scale * count if scale < 0.5 else count + (2 * scale - 1) * (size - count)
            # Move layers that this LLM cannot use. Of several that meet, the last one counts.
            if too_deep:
                layer = min(round_half_up(layer * depth / PUBLISHED_DEPTH), depth - 1)
            if too_deep or self.layer == PUBLISHED_LAYERS:
                layer = max(layer, profile.first_layer)
            counts[layer] = max(round_half_up(scaled), 1)
        return dataclasses.replace(self, layer=tuple(counts), counts=tuple(counts.values()))

    # --- which tokens ------------------------------------------------------------------------------------------------

    def assign(self, tokens: VisualTokens) -> TokenMap:
        available = tokens.features.shape[1] - tokens.prefix
        count = self._count(tokens.layer, available)
        if count >= available:
            return keep_all(tokens)
        score = _mean(tokens.text_attention[..., tokens.prefix :], _raters(tokens))
        ranking = score.argsort(dim=1, descending=True, stable=True)
        best = torch.zeros_like(score, dtype=torch.bool).scatter(1, ranking[:, :count], True)
        kept = TokenMap.keep(best)
        recycled, clusters = self._recycled(available - count)
        if recycled == 0:
            return kept.after_dropping(tokens.prefix)
        place = ranking[:, count : count + recycled].sort(dim=1).values
        features = tokens.features[:, tokens.prefix :]
        cluster, centre = _density_peaks(rows_at(features, place), clusters)
        group = kept.group.scatter(1, place, count + cluster)
        return TokenMap.merge(group, anchor=best.scatter(1, place, centre)).after_dropping(tokens.prefix)


def _raters(tokens: VisualTokens) -> Bool[Tensor, "batch queries"]:
    """Mark the raters: the question tokens with above-average similarity to the image, or else the last one."""
    mask, text = tokens.query_mask, tokens.text_features.float().transpose(1, 2)
    similarity = torch.zeros(mask.shape, device=mask.device)
    for part in tokens.llm_input.split(CHUNK, dim=1):
        products = (part.float() @ text).masked_fill(~mask[:, None], -torch.inf)
        similarity += products.softmax(dim=-1).sum(dim=1)
    raters = mask & (similarity > (1 + SAME) * _mean(similarity[..., None], mask))  # `SAME` absorbs rounding
    raters[:, -1] |= ~raters.any(dim=1)
    return raters


def _mean(
    values: Float[Tensor, "batch queries tokens"], chosen: Bool[Tensor, "batch queries"]
) -> Float[Tensor, "batch tokens"]:
    """Return the mean over the chosen queries of each row."""
    total = values.float().masked_fill(~chosen[..., None], 0.0).sum(dim=1)
    return total / chosen.sum(dim=1, keepdim=True).clamp(min=1)


def _density_peaks(
    x: Float[Tensor, "batch points dim"], clusters: int
) -> tuple[Int[Tensor, "batch points"], Bool[Tensor, "batch points"]]:
    """Return each point's cluster, and a mask of the cluster centres (DPC-KNN; Du et al., 2016).

    A point's density is exp(-mean squared distance to its `clusters` nearest neighbours, itself included). Centres are
    the points with the largest product of density and distance to the nearest denser point. The other points join the
    nearest centre. Squared distances are means over `dim`. Products are compared by their logarithms, because a density
    can round to 0.
    """
    x = x.float()
    x = x - x.mean(dim=1, keepdim=True)  # distances stay the same; small values lose fewer digits to rounding
    batch, points, _ = x.shape
    chunks: Iterable[tuple[int, Tensor]] = _Distances(x)
    if batch * points**2 <= STORED:
        chunks = list(chunks)
    parts = [d.topk(clusters, largest=False, sorted=False).values.mean(dim=-1) for _, d in chunks]
    order = _ascending(spread := torch.cat(parts, dim=1))  # densest first
    rank = order.argsort(dim=1)

    nearest, farthest = [], x.new_zeros(batch)
    for start, d in chunks:
        denser = rank[:, None] < rank[:, start : start + d.shape[1], None]
        nearest.append(d.masked_fill(~denser, torch.inf).amin(dim=-1))
        farthest = torch.maximum(farthest, d.amax(dim=(1, 2)))
    # The densest point has no denser neighbour.
    gap = torch.cat(nearest, dim=1).scatter(1, order[:, :1], farthest[:, None])
    score = (gap.log() / 2 - spread).gather(1, order)  # of equal points, the densest comes first
    centre = order.gather(1, score.argsort(dim=1, descending=True, stable=True)[:, :clusters])

    columns = centre[:, None]
    nearest_centre = [d.gather(2, columns.expand(-1, d.shape[1], -1)).argmin(dim=-1) for _, d in chunks]
    number = torch.arange(clusters, device=x.device).expand(batch, -1)
    cluster = torch.cat(nearest_centre, dim=1).scatter(1, centre, number)
    return cluster, torch.zeros_like(cluster, dtype=torch.bool).scatter(1, centre, True)


def _ascending(value: Float[Tensor, "batch points"]) -> Int[Tensor, "batch points"]:
    """Return the indices that sort points by ascending value. Equal points keep their order.

    Two points that are each other's nearest neighbour can be equally dense. The tolerance `SAME` keeps rounding from
    deciding.
    """
    ordered, order = value.sort(dim=1)
    higher = ordered > (1 + SAME) * torch.cat([ordered[:, :1], ordered[:, :-1]], dim=1)
    level = torch.empty_like(order).scatter(1, order, higher.cumsum(dim=1))
    return level.argsort(dim=1, stable=True)


class _Distances:
    """The squared distances between all points, means over `dim`, in chunks with the number of their first point.

    Each iteration computes them anew.
    """

    def __init__(self, x: Float[Tensor, "batch points dim"]) -> None:
        self._x = x

    def __iter__(self) -> Iterator[tuple[int, Float[Tensor, "batch chunk points"]]]:
        x = self._x
        squares, directions = x.square().sum(dim=-1)[:, None], x.transpose(1, 2)
        for start in range(0, x.shape[1], CHUNK):
            part = x[:, start : start + CHUNK]
            squared = part.square().sum(dim=-1, keepdim=True) + squares - 2 * part @ directions
            squared.diagonal(start, 1, 2).zero_()  # a point's distance to itself is 0, also after rounding
            yield start, squared.clamp(min=0) / x.shape[-1]
