"""K-means: cluster the visual tokens of each image and keep the cluster means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Site, VisualTokens

#: Number of tokens that are compared with the centroids at a time.
CHUNK = 1024
#: Squared distances that differ by at most this fraction count as equal.
SAME = 1e-4


@dataclass(frozen=True, kw_only=True)
class KMeans(BudgetedCompressor):
    """Cluster the visual tokens of each image and keep the mean of every cluster.

    This is the K-Means baseline of LLaVolta (arXiv:2406.20092, Table 3: L / S centroids). The authors did not publish
    their code for it, so these are our choices:

    - Centroids start at tokens that are evenly spaced in raster order. Lloyd's iterations follow. There is no
      randomness.
    - An empty cluster takes the token that is farthest from its centroid, so the number of output tokens is exact.
    - The means are ordered by their clusters' first tokens. A cluster's anchor is its token nearest to the mean.
    - Tokens outside the grid (CLS) are dropped.

    Time is proportional to tokens times clusters, memory to `CHUNK` times clusters.

    When it fails: on videos and other long inputs, if the clusters are a share of the tokens. A ninth of 18,432 tokens
    takes 2.5 times as long as encoding one of their 32 views (docs/results.md).
    """

    paper = "baseline of arXiv:2406.20092"
    kind = "merge"
    cost = "N·k"
    examples = ("keep=64", "keep=25%,metric=cosine")
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)

    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%"): the number of clusters."""
    iterations: Annotated[int, Ge(1)] = 10
    """Lloyd's iterations: assign each token to the nearest centroid, then move each centroid to its cluster's mean."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """Squared Euclidean distance between features ("euclidean"), or between features scaled to length 1 ("cosine")."""
    layer: Annotated[int, Ge(0)] = 2
    """K, the first LLM layer that sees fewer tokens, 0-based; used at site in_llm."""

    def assign(self, tokens: VisualTokens) -> TokenMap:
        x = tokens.features[:, tokens.prefix :].float()
        x = normalize(x, dim=-1) if self.metric == "cosine" else x
        x = x - x.mean(dim=1, keepdim=True)  # distances stay the same; small values lose fewer digits to rounding
        size = x.shape[1]
        clusters = self.count(size)
        start = (2 * torch.arange(clusters, device=x.device) + 1) * size // (2 * clusters)
        centroids = x[:, start]
        cluster = torch.full(x.shape[:2], -1, device=x.device)
        for _ in range(self.iterations):
            before, cluster = cluster, _fill_empty(*_nearest(x, centroids), clusters)
            # If no token moves, no later iteration moves one. Other devices would have to wait for the comparison.
            if x.device.type == "cpu" and torch.equal(cluster, before):
                break
            centroids = _means(x, cluster, clusters)
        distance = (x - centroids.gather(1, cluster[..., None].expand_as(x))).square().sum(-1)
        anchor = _first_smallest(distance, cluster, clusters)
        return TokenMap.merge(_in_raster_order(cluster, clusters), anchor=anchor).after_dropping(tokens.prefix)


def _nearest(
    x: Float[Tensor, "batch tokens dim"], centroids: Float[Tensor, "batch clusters dim"]
) -> tuple[Int[Tensor, "batch tokens"], Float[Tensor, "batch tokens"]]:
    """Return the index of each token's nearest centroid and its squared distance. On a tie, take the first centroid."""
    squares, directions = centroids.square().sum(-1)[:, None], centroids.transpose(1, 2)
    nearest = [(squares - 2 * part @ directions).min(dim=-1) for part in x.split(CHUNK, dim=1)]
    distance = torch.cat([values for values, _ in nearest], dim=1) + x.square().sum(-1)
    return torch.cat([indices for _, indices in nearest], dim=1), distance.clamp(min=0)


def _fill_empty(
    cluster: Int[Tensor, "batch tokens"], distance: Float[Tensor, "batch tokens"], clusters: int
) -> Int[Tensor, "batch tokens"]:
    """Give each empty cluster one token, starting with the token that is farthest from its centroid.

    The nearest token of each cluster never moves, so no other cluster becomes empty.
    """
    batch, tokens = cluster.shape
    stays = _first_smallest(distance, cluster, clusters)
    farthest = distance.masked_fill(stays, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :clusters]
    filled = torch.zeros(batch, clusters, dtype=torch.bool, device=cluster.device)
    empty = ~filled.scatter(1, cluster, True)
    token = farthest.gather(1, (empty.cumsum(dim=1) - 1).clamp(min=0))
    # Only empty clusters take a token. The others write to an extra last column, which is cut off again.
    slot = torch.where(empty, token, tokens)
    number = torch.arange(clusters, device=cluster.device).expand(batch, clusters)
    return torch.cat([cluster, cluster[:, :1]], dim=1).scatter(1, slot, number)[:, :-1]


def _first_smallest(
    value: Float[Tensor, "batch tokens"], cluster: Int[Tensor, "batch tokens"], clusters: int
) -> Bool[Tensor, "batch tokens"]:
    """Mark the member of each cluster with the smallest value. On a tie, mark the first one in raster order.

    The two tokens of a pair are equally far from their mean. The tolerance `SAME` keeps rounding from deciding.
    """
    batch, tokens = value.shape
    least = value.new_full((batch, clusters), torch.inf).scatter_reduce(1, cluster, value, "amin")
    place = torch.arange(tokens, device=value.device).expand(batch, tokens)
    candidate = torch.where(value <= (1 + SAME) * least.gather(1, cluster), place, tokens)
    first = torch.full_like(least, tokens, dtype=torch.long).scatter_reduce(1, cluster, candidate, "amin")
    return place == first.gather(1, cluster)


def _means(
    x: Float[Tensor, "batch tokens dim"], cluster: Int[Tensor, "batch tokens"], clusters: int
) -> Float[Tensor, "batch clusters dim"]:
    sums = x.new_zeros(len(x), clusters, x.shape[-1]).scatter_add(1, cluster[..., None].expand_as(x), x)
    sizes = x.new_zeros(len(x), clusters).scatter_add(1, cluster, torch.ones_like(x[..., 0]))
    return sums / sizes[..., None]


def _in_raster_order(cluster: Int[Tensor, "batch tokens"], clusters: int) -> Int[Tensor, "batch tokens"]:
    """Renumber the clusters by the raster order of their first members."""
    batch, tokens = cluster.shape
    place = torch.arange(tokens, device=cluster.device).expand(batch, tokens)
    first = torch.full((batch, clusters), tokens, device=cluster.device).scatter_reduce(1, cluster, place, "amin")
    number = first.argsort(dim=1).argsort(dim=1)
    return number.gather(1, cluster)
