"""VisPruner: keep the patches that CLS attends to most, and of the others the most diverse ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge, Le
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Signal, Site, VisualTokens

#: The most patches that a round drops, as in the authors' code.
ROUND = 8
#: The largest matrix of similarities that is computed once for all rounds, in numbers: 2 GiB.
LARGEST_MATRIX = 2**29
#: Number of patches that are compared at a time, and of which the most similar others are listed.
CHUNK = 1024
#: How many of the most similar others are listed for each patch.
LISTED = 32
#: The most patches for which reading whole rows of similarities is faster than lists.
SHORT = 1024


@dataclass(frozen=True, kw_only=True)
class VisPruner(BudgetedCompressor):
    """Keep patches with high attention from CLS, and fill the budget with patches that resemble no other one.

    Zhang et al., ICCV 2025 (arXiv:2412.01818):

    1. Half of the budget goes to the patches with the highest attention from CLS, mean over heads, in the layer that
       gives the features.
    2. The other patches stand in the order of their attention. Each round compares those at even places with those at
       odd places, and drops up to 8 of the even ones: those with the highest cosine similarity to an odd one. The
       remaining even ones, the most similar first, and then the odd ones enter the next round. Rounds follow until the
       other half of the budget is left.
    3. Both halves remain in raster order. CLS goes, and nothing is merged.

    An encoder without CLS ranks patches by the attention that they receive from all tokens, as `visionzip` does.

    The N/8 rounds each compare half of the patches with the other half, so time grows with the cube of the tokens. The
    similarities of all pairs are computed once, which is faster than computing those of each round and takes N² memory.
    On a CPU, a list of the `LISTED` most similar others of each patch then answers nearly all comparisons, so that time
    grows with the square. Above `LARGEST_MATRIX` numbers, each round computes its similarities in chunks.

    Differences from the authors' code: any budget works; theirs fails if the number of patches of a round is odd. Of
    equal scores, the first patch wins; the authors' choice depends on the device.

    When it fails: on images with much plain ground. Attention ignores it, and then it fills the diverse half as soon as
    its patches differ a little.
    """

    paper = "arXiv:2412.01818"
    examples = ("keep=64", "keep=25%,important=0.75")
    needs = frozenset({Signal.CLS_ATTENTION})
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)
    cost = "N³"
    published = {128: 97.0, 64: 94.1}
    published_in = "rerun of the authors' code with 11 benchmarks of lmms-eval (Cen-Prune)"

    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%")."""
    important: Annotated[float, Ge(0), Le(1)] = 0.5
    """Share of the budget that goes to the patches with the highest attention, rounded down."""

    def assign(self, tokens: VisualTokens) -> TokenMap:
        score = tokens.cls_attention[:, tokens.prefix :].float()
        count = self.count(score.shape[1])
        important = int(count * self.important)
        ranking = score.argsort(dim=1, descending=True, stable=True)
        others = ranking[:, important:]
        diverse = _most_diverse(_of(tokens.features[:, tokens.prefix :].float(), others), count - important)
        chosen = torch.cat([ranking[:, :important], others.gather(1, diverse)], dim=1)
        kept = torch.zeros_like(score, dtype=torch.bool).scatter(1, chosen, True)
        return TokenMap.keep(kept).after_dropping(tokens.prefix)


def _most_diverse(x: Float[Tensor, "batch patches dim"], count: int) -> Int[Tensor, "batch count"]:
    """Return the indices of the `count` patches that are left after all rounds."""
    batch, size, _ = x.shape
    left = torch.arange(size, device=x.device).expand(batch, -1)
    if count == 0:
        return left[:, :0]
    x = normalize(x, dim=-1)
    nearest_of: Callable[[Tensor, Tensor], Tensor] = partial(_nearest, x)
    if batch * size**2 <= LARGEST_MATRIX:
        similarity = x @ x.transpose(1, 2)
        nearest_of = (
            _Listed(similarity) if x.device.type == "cpu" and size > SHORT else partial(_nearest_of, similarity)
        )
    while left.shape[1] > count:
        even, odd = left[:, ::2], left[:, 1::2]
        dropped = min(ROUND, left.shape[1] - count, even.shape[1])
        distinct = nearest_of(even, odd).argsort(dim=1, descending=True, stable=True)[:, dropped:]
        left = torch.cat([even.gather(1, distinct), odd], dim=1)
    return left


class _Listed:
    """The highest similarity of each even patch to an odd one, from lists of the most similar others of each patch.

    The first odd patch in an even patch's list is the nearest one. Only patches whose list has none need the whole row
    of similarities. To find them, a device other than the CPU would have to stop.
    """

    def __init__(self, similarity: Float[Tensor, "batch patches patches"]) -> None:
        self._similarity = similarity
        size = similarity.shape[1]
        listed = min(LISTED, size)
        chunks = [part.topk(listed, dim=-1) for part in similarity.split(CHUNK, dim=1)]
        self._value = torch.cat([values for values, _ in chunks], dim=1)
        first = torch.arange(len(similarity), device=similarity.device)[:, None, None] * size
        self._place = torch.cat([places for _, places in chunks], dim=1) + first

    def __call__(
        self, even: Int[Tensor, "batch evens"], odd: Int[Tensor, "batch odds"]
    ) -> Float[Tensor, "batch evens"]:
        is_odd = torch.zeros(self._similarity.shape[:2], dtype=torch.bool).scatter(1, odd, True)
        listed = is_odd.flatten()[_of(self._place, even)]
        nearest = _of(self._value, even).masked_fill_(~listed, -torch.inf).amax(dim=-1)
        view, row = nearest.isinf().nonzero(as_tuple=True)
        rows = self._similarity[view, even[view, row]]
        nearest[view, row] = rows.masked_fill_(~is_odd[view], -torch.inf).amax(dim=-1)
        return nearest


def _nearest_of(
    similarity: Float[Tensor, "batch patches patches"], even: Int[Tensor, "batch evens"], odd: Int[Tensor, "batch odds"]
) -> Float[Tensor, "batch evens"]:
    """Return the highest similarity of each even patch to an odd one, from those of all pairs.

    Reading whole rows and ruling out the other columns takes a fraction of the time of reading only the odd columns.
    """
    barred = similarity.new_full(similarity.shape[:2], -torch.inf).scatter(1, odd, 0.0)
    return _of(similarity, even).add_(barred[:, None]).amax(dim=-1)


def _nearest(
    x: Float[Tensor, "batch patches dim"], even: Int[Tensor, "batch evens"], odd: Int[Tensor, "batch odds"]
) -> Float[Tensor, "batch evens"]:
    """Return the highest similarity of each even patch to an odd one, in chunks of patches."""
    directions = _of(x, odd).transpose(1, 2)
    return torch.cat([(_of(x, part) @ directions).amax(dim=-1) for part in even.split(CHUNK, dim=1)], dim=1)


def _of(x: Shaped[Tensor, "batch patches dim"], index: Int[Tensor, "batch some"]) -> Shaped[Tensor, "batch some dim"]:
    """Return `rows_at(x, index)`. Copying whole rows is faster for rows of thousands of similarities."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    rows: Tensor = x.flatten(0, 1).index_select(0, (first + index).flatten()).unflatten(0, index.shape)
    return rows
