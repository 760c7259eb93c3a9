"""K-means: each image's visual tokens become the means of as many clusters as are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep, count_to_keep
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Site, VisualTokens

#: Tokens that are compared with the centroids at a time.
CHUNK = 1024
#: Squared distances that differ by this share count as equal.
SAME = 1e-4


@dataclass(frozen=True, kw_only=True)
class KMeans(BudgetedCompressor):
    """Cluster the visual tokens of each image and keep the mean of every cluster.

    The K-Means baseline of LLaVolta (arXiv:2406.20092, Table 3: L / S centroids). The authors' code of it is not
    public; these are our choices. Nothing is drawn at random: centroids start at tokens evenly spaced in raster order,
    and Lloyd's steps follow. A cluster that is left empty takes the token farthest from its own centroid, so exactly as
    many tokens come out as are wanted. The means stand in the order of their first members; the member nearest to the
    mean is the anchor. Tokens outside the grid (CLS) take no part.

    Time grows with tokens times clusters, memory with `CHUNK` times clusters.
    """

    paper = "baseline of arXiv:2406.20092"
    examples = ("keep=64", "keep=25%,metric=cosine")
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)

    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%"): the number of clusters."""
    iterations: Annotated[int, Ge(1)] = 10
    """Lloyd's steps: assign each token to the nearest centroid, then move the centroids to their members' means."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """Nearness of features: squared Euclidean distance, of the features as they are or ("cosine") at length 1."""
    layer: Annotated[int, Ge(0)] = 2
    """The first LLM layer that sees fewer tokens (site in_llm)."""

    def token_count(self, grid: Grid) -> int:
        return count_to_keep(self.keep, grid.size)

    def assign(self, tokens: VisualTokens) -> TokenMap:
        x = tokens.features[:, tokens.prefix :].float()
        x = normalize(x, dim=-1) if self.metric == "cosine" else x
        x = x - x.mean(dim=1, keepdim=True)  # distances stay, and what the tokens have in common costs no digits
        size = x.shape[1]
        clusters = count_to_keep(self.keep, size)
        start = (2 * torch.arange(clusters, device=x.device) + 1) * size // (2 * clusters)
        centroids = x[:, start]
        for _ in range(self.iterations):
            cluster = _fill_empty(*_nearest(x, centroids), clusters)
            centroids = _means(x, cluster, clusters)
        own = (x - centroids.gather(1, cluster[..., None].expand_as(x))).square().sum(-1)
        anchor = _first_smallest(own, cluster, clusters)
        return TokenMap.merge(_in_raster_order(cluster, clusters), anchor=anchor).after_dropping(tokens.prefix)


def _nearest(
    x: Float[Tensor, "batch tokens dim"], centroids: Float[Tensor, "batch clusters dim"]
) -> tuple[Int[Tensor, "batch tokens"], Float[Tensor, "batch tokens"]]:
    """The nearest centroid of each token, the first of equals, and its squared distance."""
    squares, directions = centroids.square().sum(-1)[:, None], centroids.transpose(1, 2)
    found = [(squares - 2 * part @ directions).min(dim=-1) for part in x.split(CHUNK, dim=1)]
    distance = torch.cat([values for values, _ in found], dim=1) + x.square().sum(-1)
    return torch.cat([indices for _, indices in found], dim=1), distance.clamp(min=0)


def _fill_empty(
    cluster: Int[Tensor, "batch tokens"], distance: Float[Tensor, "batch tokens"], clusters: int
) -> Int[Tensor, "batch tokens"]:
    """Gives each empty cluster one token: the one farthest from its centroid, the next empty one the next farthest.

    The nearest token of each cluster stays with it, so that no cluster becomes empty for another's sake.
    """
    batch, tokens = cluster.shape
    stays = _first_smallest(distance, cluster, clusters)
    farthest = distance.masked_fill(stays, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :clusters]
    filled = torch.zeros(batch, clusters, dtype=torch.bool, device=cluster.device)
    empty = ~filled.scatter(1, cluster, True)
    token = farthest.gather(1, (empty.cumsum(dim=1) - 1).clamp(min=0))
    # Clusters with members write into a slot behind the tokens that is cut off again.
    slot = torch.where(empty, token, tokens)
    number = torch.arange(clusters, device=cluster.device).expand(batch, clusters)
    return torch.cat([cluster, cluster[:, :1]], dim=1).scatter(1, slot, number)[:, :-1]


def _first_smallest(
    value: Float[Tensor, "batch tokens"], cluster: Int[Tensor, "batch tokens"], clusters: int
) -> Bool[Tensor, "batch tokens"]:
    """Marks one member of each cluster: the one with the smallest value, of equals the first in raster order.

    Two tokens are equally far from their mean but for rounding, which must not decide: hence the tolerance.
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
    """The same clusters, numbered by their first members."""
    batch, tokens = cluster.shape
    place = torch.arange(tokens, device=cluster.device).expand(batch, tokens)
    first = torch.full((batch, clusters), tokens, device=cluster.device).scatter_reduce(1, cluster, place, "amin")
    number = first.argsort(dim=1).argsort(dim=1)
    return number.gather(1, cluster)
