"""Greedy selections that several methods share: tokens that are far apart, and tokens that cover all others.

All steps run on the device, for a batch of views at once. On a tie, the first token in raster order is chosen.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

#: Tokens that are compared with others at a time.
CHUNK = 512
#: The most entries of a matrix of cosines between all tokens, over a batch, that is kept: 256 MiB.
KEPT = 2**26
#: Steps per unit to which cosines are rounded, so that rounding errors do not decide between equal tokens.
STEPS = 2**20


class Cosines:
    """The cosine similarities between the tokens of each view, as whole numbers of `1 / STEPS`.

    A matrix of all similarities is the faster choice, and is kept if the batch needs at most `most` entries. Otherwise,
    similarities are computed when they are needed, and memory stays linear in the tokens.
    """

    def __init__(self, features: Float[Tensor, "batch tokens dim"], most: int = KEPT) -> None:
        self.x = normalize(features.float(), dim=-1)
        batch, tokens, _ = features.shape
        self.whole = self._matrix() if batch * tokens * tokens <= most else None

    def of(self, token: Int[Tensor, " batch"]) -> Float[Tensor, "batch tokens"]:
        """Return the similarity of all tokens to one token of each view."""
        return self.steps_of(token).float() / STEPS

    def steps_of(self, token: Int[Tensor, " batch"]) -> Int[Tensor, "batch tokens"]:
        """Return the same as whole numbers."""
        if self.whole is not None:
            return at(self.whole, token)
        return _rounded(self.x @ at(self.x, token)[..., None])[..., 0]

    def nearest(self) -> Float[Tensor, "batch tokens"]:
        """Return each token's largest similarity to another token; -1 for a single token."""
        nearest = torch.full(self.x.shape[:2], -STEPS, dtype=torch.int32, device=self.x.device)
        for start in range(0, self.x.shape[1], CHUNK):
            # A chunk of rows of the symmetric matrix, from the diagonal on, shows the chunk's columns, too.
            end = start + CHUNK
            part = self._from_diagonal(start) if self.whole is None else self.whole[:, start:end, start:].clone()
            part.diagonal(0, 1, 2).fill_(-STEPS)  # a token is not its own neighbour
            nearest[:, start:end] = torch.maximum(nearest[:, start:end], part.amax(dim=2))
            nearest[:, start:] = torch.maximum(nearest[:, start:], part.amax(dim=1))
        return nearest.float() / STEPS

    def _matrix(self) -> Int[Tensor, "batch tokens tokens"]:
        batch, tokens, _ = self.x.shape
        matrix = torch.empty(batch, tokens, tokens, dtype=torch.int32, device=self.x.device)
        for start in range(0, tokens, CHUNK):
            part = self._from_diagonal(start)
            matrix[:, start : start + CHUNK, start:] = part
            matrix[:, start:, start : start + CHUNK] = part.transpose(1, 2)
        return matrix

    def _from_diagonal(self, start: int) -> Int[Tensor, "batch chunk rest"]:
        """Return the similarities of a chunk of tokens to themselves and to all tokens behind them."""
        return _rounded(self.x[:, start : start + CHUNK] @ self.x[:, start:].transpose(1, 2))


def spread(
    cosines: Cosines,
    first: Float[Tensor, "batch tokens"],
    count: int,
    weight: Float[Tensor, "batch tokens"] | None = None,
) -> Bool[Tensor, "batch tokens"]:
    """Mark `count` tokens of each view that are far apart.

    The first is the one with the largest value of `first`. Each further one has the largest distance, 1 minus the
    cosine, to the nearest of those already marked. `weight` multiplies the distances.
    """
    marked = torch.zeros_like(first, dtype=torch.bool)
    token = first.argmax(dim=1)
    distance = torch.full_like(first, torch.inf)
    for _ in range(count - 1):
        marked.scatter_(1, token[:, None], True)
        distance = torch.minimum(distance, 1 - cosines.of(token))
        score = distance if weight is None else distance * weight
        token = score.masked_fill(marked, -torch.inf).argmax(dim=1)
    return marked.scatter_(1, token[:, None], True)


def at(values: Tensor, token: Int[Tensor, " batch"]) -> Tensor:
    """Return `values[row, token[row]]` for each row of the batch."""
    return values[torch.arange(len(token), device=token.device), token]


def _rounded(cosines: Float[Tensor, "batch some others"]) -> Int[Tensor, "batch some others"]:
    return cosines.mul_(STEPS).round_().int()
