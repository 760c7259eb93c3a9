"""SparseVLM: inside the LLM, keep what the question's relevant words attend to, and recycle part of the rest."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmzip.compressor import BudgetError, Compressor, Profile, keep_all
from vlmzip.errors import UserError, check_choice
from vlmzip.keep import Keep, count_to_keep, round_half_up
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Signal, Site, VisualTokens

#: Tokens that are compared with all others at a time.
CHUNK = 1024
#: Similarities, and densities' mean squared distances, that differ by this share count as equal.
SAME = 1e-5
#: What the published schedules were made for: LLaVA-1.5-7B.
PUBLISHED_TOKENS, PUBLISHED_DEPTH, PUBLISHED_LAYERS = 576, 32, (3, 7, 16)
#: Tokens kept by attention at each of the three layers, by budget ("v1": SparseVLM 1.5; "v2": SparseVLM+).
SCHEDULES = {
    "v1": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
#: The share of the pruned tokens that each version recycles.
RECYCLE = {"v1": 0.3, "v2": 0.0}


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Compressor):
    """Keep the visual tokens that the question's raters attend to, and merge the best of the rest into a few.

    Zhang et al., ICML 2025 (arXiv:2410.04417), section 3. Raters are the question's tokens to which the image's
    tokens are similar above average, on entering the LLM: softmax over the question of each dot product, mean over the
    image. At each of several layers a visual token's score is its attention from the raters, mean over them and over
    heads. The best stay; of the others the next best 30 % (and one more) are recycled: n of them become n // 10 + 1
    tokens, the means of clusters by density peaks (DPC-KNN), as in the authors' code.

    Layers: the authors score by the attention of layers 2, 6 and 15 and drop behind them, so the first layers that see
    fewer tokens are 3, 7 and 16. Budgets: theirs are averages over the layers of what each *leaves*, 192.03 tokens in
    the schedule for 192; what each layer *sees* is 206.5 there, and that is what is reported here. `at_budget` scales
    a schedule's counts together until that average fits, on the set layers or, in a smaller LLM, on proportional ones.
    On other grids the published counts are the same shares of the tokens that reach each layer.

    Differences from the authors' code: any batch size; each image of a prompt is rated on its own, by the text behind
    it; a merged token stands where its cluster's centre stood (theirs follow the last kept one), and tokens keep their
    positions (theirs are renumbered in v1, kept in v2); equally dense tokens rank in raster order (theirs get random
    noise); no raters above the average (a question of one token): the last; keeping all is possible. "v2" stands for
    counts and no recycling: the corrected attention and the choice of heads of SparseVLM+ are left out. So is the
    number of tokens by the rank of the attention matrix (section 3.2), which their code has replaced by these counts.

    Labels decide where an image's question ends: at the token before the first label behind the image. Without labels
    it ends at the last token of the prompt, so answers in the prompt count as question.

    Memory is linear in an image's tokens; clustering takes time by the square of the recycled ones.
    """

    paper = "arXiv:2410.04417"
    examples = ("budget=64", "schedule=v2,budget=64", "counts=300,200,110,recycle=0.3")
    needs = frozenset({Signal.TEXT_ATTENTION, Signal.TEXT_FEATURES})
    sites = (Site.IN_LLM,)
    budget_fields = ("budget", "counts")

    site: Site = Site.IN_LLM
    schedule: Literal["v1", "v2"] = "v1"
    """The published counts: "v1" with recycling, or "v2" (SparseVLM+) without."""
    budget: int = 192
    """The schedule for this many of 576 tokens by the authors' count: 192, 128, 96 or 64."""
    counts: tuple[Keep, ...] | None = None
    """Instead of published ones: tokens to keep at each layer, or fractions of those that reach it: 300,200,110."""
    layer: tuple[int, ...] = PUBLISHED_LAYERS
    """The first layers that see fewer tokens, 0-based, ascending; ranked by the attention of the layers before."""
    recycle: Annotated[float, Ge(0), Le(1)] | None = None
    """Share of the pruned tokens that is merged and not lost; 0: none. Left out, 0.3 in v1 and none in v2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("budget", self.budget, map(str, SCHEDULES[self.schedule]))
        if not self.layer or list(self.layer) != sorted(set(self.layer)):
            raise UserError(f"layer={self.layer!r}: give layers in ascending order, such as 3,7,16")
        counts = self._published if self.counts is None else self.counts
        if len(counts) != len(self.layer):
            raise UserError(f"{len(counts)} counts for {len(self.layer)} layers: give one for each")

    # --- how many ---------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        return self.layer

    def tokens_by_layer(self, profile: Profile) -> list[int]:
        left, counts = profile.size, []
        for layer in range(profile.layers):
            if layer in self.layer:
                left = self._left(self._count(layer, left), left)
            counts.append(left)
        return counts

    def at_budget(self, keep: Keep, profile: Profile) -> tuple[SparseVLM, float]:
        """Its counts, all scaled down towards 1 or all up towards the whole image; see the class for the layers."""
        wanted = count_to_keep(keep, profile.size) / profile.size
        steps = range(8 * profile.size + 1)  # so fine that counts change one by one
        least = self._scaled(0.0, profile)
        if wanted < least.reached(profile):
            raise BudgetError(
                f"{least.layer[0]} of {profile.layers} layers see all tokens before sparsevlm acts:"
                f" on average at least {least.reached(profile):.1%}"
            )
        above = bisect_right(steps, wanted, key=lambda step: self._scaled(step / steps[-1], profile).reached(profile))
        near = [self._scaled(step / steps[-1], profile) for step in steps[above - 1 : above + 1]]
        nearest = min(near, key=lambda candidate: abs(candidate.reached(profile) - wanted))
        return nearest, nearest.reached(profile)

    def placed(self, profile: Profile) -> SparseVLM:
        moves = self.layer == PUBLISHED_LAYERS and self.layer[-1] >= profile.layers
        return self._scaled(0.5, profile) if moves else self

    @property
    def _published(self) -> tuple[int, ...]:
        """The tokens that the published schedule keeps at each layer."""
        return SCHEDULES[self.schedule][self.budget]

    @property
    def _recycle(self) -> float:
        return RECYCLE[self.schedule] if self.recycle is None else self.recycle

    def _count(self, layer: int | None, available: int) -> int:
        """Tokens that stay as they are at a layer; without one, at the first."""
        stage = 0 if layer is None else self.layer.index(layer)
        if self.counts is not None:
            return count_to_keep(self.counts[stage], available)
        reaching = PUBLISHED_TOKENS
        for before in self._published[:stage]:
            reaching = self._left(before, reaching)
        return count_to_keep(self._published[stage] / reaching, available)

    def _recycled(self, pruned: int) -> tuple[int, int]:
        """How many of the pruned tokens are recycled, and into how many."""
        if pruned == 0 or self._recycle == 0:
            return 0, 0
        recycled = min(int(pruned * self._recycle) + 1, pruned)
        return recycled, recycled // 10 + 1

    def _left(self, count: int, available: int) -> int:
        """Tokens behind a layer that keeps `count`."""
        return count + self._recycled(available - count)[1]

    def _scaled(self, scale: float, profile: Profile) -> SparseVLM:
        """Counts for the profile's grid at `scale` 1/2; towards 0 they shrink to 1, towards 1 they grow to all."""
        depth, size = profile.layers, profile.size
        if depth < 2:
            raise BudgetError("an LLM of one layer has no place inside")
        counts, left = {}, size
        for layer in self.layer:
            count = self._count(layer, left)
            left = self._left(count, left)
            scaled = 2 * scale * count if scale < 0.5 else count + (2 * scale - 1) * (size - count)
            if self.layer[-1] >= depth:  # stages that fall on one layer act as the last of them
                layer = min(max(round_half_up(layer * depth / PUBLISHED_DEPTH), 1), depth - 1)
            counts[layer] = max(round_half_up(scaled), 1)
        return dataclasses.replace(self, layer=tuple(counts), counts=tuple(counts.values()))

    # --- which ------------------------------------------------------------------------------------------------

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
        cluster, centre = _density_peaks(
            features.gather(1, place[..., None].expand(-1, -1, features.shape[-1])), clusters
        )
        group = kept.group.scatter(1, place, count + cluster)
        return TokenMap.merge(group, anchor=best.scatter(1, place, centre)).after_dropping(tokens.prefix)


def _raters(tokens: VisualTokens) -> Bool[Tensor, "batch queries"]:
    """The question's tokens that rate: those to which the image's tokens, on entering the LLM, are similar above
    average; where none is, the last."""
    asked, text = tokens.query_mask, tokens.text_features.float().transpose(1, 2)
    similarity = torch.zeros(asked.shape, device=asked.device)
    for part in tokens.llm_input.split(CHUNK, dim=1):
        products = (part.float() @ text).masked_fill(~asked[:, None], -torch.inf)
        similarity += products.softmax(dim=-1).sum(dim=1)
    raters = asked & (similarity > (1 + SAME) * _mean(similarity[..., None], asked))  # rounding must not rate
    raters[:, -1] |= ~raters.any(dim=1)
    return raters


def _mean(
    values: Float[Tensor, "batch queries tokens"], chosen: Bool[Tensor, "batch queries"]
) -> Float[Tensor, "batch tokens"]:
    """The mean over the chosen queries of each row."""
    total = values.float().masked_fill(~chosen[..., None], 0.0).sum(dim=1)
    return total / chosen.sum(dim=1, keepdim=True).clamp(min=1)


def _density_peaks(
    x: Float[Tensor, "batch points dim"], clusters: int
) -> tuple[Int[Tensor, "batch points"], Bool[Tensor, "batch points"]]:
    """The cluster of each point, and which points are the clusters' centres (DPC-KNN; Du et al., 2016).

    A point is dense where its nearest neighbours, as many as there are clusters and itself among them, are near:
    exp(-mean squared distance). Centres are far from all denser points: those with the largest product of density and
    distance to the nearest denser one. The others join the nearest centre. Squared distances are means over `dim`;
    products are compared by their logarithms, where no density rounds to 0.
    """
    batch, points, _ = x.shape
    x = x.float()
    x = x - x.mean(dim=1, keepdim=True)  # distances stay, and what the points have in common costs no digits
    parts = [d.topk(clusters, largest=False).values.mean(dim=-1) for _, d in _distances(x)]
    order = _ascending(spread := torch.cat(parts, dim=1))  # densest first: a denser point is an earlier one
    x, log_density = x.gather(1, order[..., None].expand_as(x)), -spread.gather(1, order)

    index = torch.arange(points, device=x.device)
    nearest, farthest = [], x.new_zeros(batch)
    for start, d in _distances(x):
        denser = index < index[start : start + d.shape[1], None]
        nearest.append(d.masked_fill(~denser, torch.inf).amin(dim=-1))
        farthest = torch.maximum(farthest, d.amax(dim=(1, 2)))
    gap = torch.cat(nearest, dim=1)
    gap[:, 0] = farthest  # the densest point of all
    centre = (log_density + gap.log() / 2).argsort(dim=1, descending=True, stable=True)[:, :clusters]

    number = torch.arange(clusters, device=x.device).expand(batch, -1)
    centres = x.gather(1, centre[..., None].expand(-1, -1, x.shape[-1]))
    cluster = torch.cat([d.argmin(dim=-1) for _, d in _distances(x, centres)], dim=1).scatter(1, centre, number)
    is_centre = torch.zeros_like(cluster, dtype=torch.bool).scatter(1, centre, True)
    back = order.argsort(dim=1)
    return cluster.gather(1, back), is_centre.gather(1, back)


def _ascending(value: Float[Tensor, "batch points"]) -> Int[Tensor, "batch points"]:
    """The points by rising value, equal ones in their order.

    Two points are equally dense where each is the other's nearest; rounding must not decide, hence the tolerance.
    """
    ordered, order = value.sort(dim=1)
    higher = ordered > (1 + SAME) * torch.cat([ordered[:, :1], ordered[:, :-1]], dim=1)
    level = torch.empty_like(order).scatter(1, order, higher.cumsum(dim=1))
    return level.argsort(dim=1, stable=True)


def _distances(
    x: Float[Tensor, "batch points dim"], others: Float[Tensor, "batch others dim"] | None = None
) -> Iterator[tuple[int, Float[Tensor, "batch chunk others"]]]:
    """Squared distances from `CHUNK` points at a time, and the number of the first of them, to other points or to all
    of `x`; means over `dim`."""
    y = x if others is None else others
    squares, directions = y.square().sum(dim=-1)[:, None], y.transpose(1, 2)
    for start in range(0, x.shape[1], CHUNK):
        part = x[:, start : start + CHUNK]
        squared = part.square().sum(dim=-1, keepdim=True) + squares - 2 * part @ directions
        if others is None:
            squared.diagonal(start, 1, 2).zero_()  # a point lies at itself, whatever was rounded
        yield start, squared.clamp(min=0) / x.shape[-1]
