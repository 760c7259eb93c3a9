"""Greedy selections that several methods share: tokens that are far apart, and tokens that cover all others.

All steps run on the device, for a batch of views at once. On a tie, the first token in raster order is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

#: Tokens that are compared with others at a time.
CHUNK = 512
#: The most entries of a matrix of cosines between all tokens, over a batch, that is kept: 256 MiB.
KEPT = 2**26
#: The most entries of all matrices that are kept at a time while tokens cover others: 2 GiB.
KEPT_TO_COVER = 2**29
#: Entries of these matrices that are read at a time.
READ = 2**21
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
        self.whole = _matrix(self.x) if batch * tokens * tokens <= most else None

    def of(self, token: Int[Tensor, " batch"]) -> Float[Tensor, "batch tokens"]:
        """Return the similarity of all tokens to one token of each view."""
        if self.whole is not None:
            return at(self.whole, token) / STEPS
        return in_steps(self.x @ at(self.x, token)[..., None])[..., 0] / STEPS

    def nearest(self) -> Float[Tensor, "batch tokens"]:
        """Return each token's largest similarity to another token; -1 for a single token."""
        nearest = torch.full(self.x.shape[:2], -STEPS, dtype=torch.int32, device=self.x.device)
        for start in range(0, self.x.shape[1], CHUNK):
            # A chunk of rows of the symmetric matrix, from the diagonal on, shows the chunk's columns, too.
            end = start + CHUNK
            part = _from_diagonal(self.x, start) if self.whole is None else self.whole[:, start:end, start:].clone()
            part.diagonal(0, 1, 2).fill_(-STEPS)  # a token is not its own neighbour
            nearest[:, start:end] = torch.maximum(nearest[:, start:end], part.amax(dim=2))
            nearest[:, start:] = torch.maximum(nearest[:, start:], part.amax(dim=1))
        return nearest / STEPS


def cosine_matrix(features: Float[Tensor, "batch tokens dim"]) -> Int[Tensor, "batch tokens tokens"]:
    """Return the cosine similarities between all tokens of each view, as whole numbers of `1 / STEPS`."""
    return _matrix(normalize(features.float(), dim=-1))


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


def views_at_once(batch: int, entries: int) -> Iterator[slice]:
    """Yield slices of a batch whose matrices, of `entries` for each view, fit into the memory for covering."""
    step = max(1, KEPT_TO_COVER // entries)
    for start in range(0, batch, step):
        yield slice(start, start + step)


def cover(
    similarities: Sequence[Int[Tensor, "batch _ tokens"]],
    count: int,
    score: Callable[[list[Int[Tensor, "batch tokens"]]], Float[Tensor, "batch tokens"]],
) -> Bool[Tensor, "batch tokens"]:
    """Mark `count` tokens of each view that cover all targets.

    Each matrix has the similarities of targets (rows) to tokens (columns). A target is covered as well as by the
    nearest marked token, and at least by 0. A token's gain is what it would add to the coverage of all targets. Each
    step marks the token with the largest `score`, which gets the gains for each matrix.

    Similarities and gains are whole numbers. Sums of them are exact, so that neither the order of addition nor the
    batch nor the device decides between tokens.
    """
    covered = [torch.zeros_like(matrix[..., 0]) for matrix in similarities]
    gains = [gains_at(*pair) for pair in zip(similarities, covered, strict=True)]
    marked = torch.zeros_like(gains[0], dtype=torch.bool)
    for step in range(count):
        token = score(gains).masked_fill(marked, -torch.inf).argmax(dim=1)
        marked.scatter_(1, token[:, None], True)
        if step == count - 1:
            break
        for n, matrix in enumerate(similarities):
            column = matrix.gather(2, token[:, None, None].expand(-1, matrix.shape[1], 1))[..., 0]
            after = torch.maximum(covered[n], column)
            if matrix.device.type == "cpu":
                gains[n] -= gains_lost(matrix, covered[n], after)
            else:  # to select the targets that change, the device would have to stop and count them
                gains[n] = gains_at(matrix, after)
            covered[n] = after
    return marked


def gains_at(
    matrix: Int[Tensor, "batch targets tokens"], covered: Int[Tensor, "batch targets"]
) -> Int[Tensor, "batch tokens"]:
    """Return what each token would add to the coverage of all targets."""
    batch, _, tokens = matrix.shape
    at_once = max(1, READ // (batch * tokens))
    gains = torch.zeros(batch, tokens, dtype=torch.int64, device=matrix.device)
    for some, already in zip(matrix.split(at_once, 1), covered.split(at_once, 1), strict=True):
        gains += (some - already[..., None]).clamp_(min=0).sum(1)
    return gains


def gains_lost(
    matrix: Int[Tensor, "batch targets tokens"],
    before: Int[Tensor, "batch targets"],
    after: Int[Tensor, "batch targets"],
) -> Int[Tensor, "batch tokens"]:
    """Return how much smaller the gains become if the coverage of the targets grows from `before` to `after`.

    A new token covers few targets better. Only their rows are read, which makes `k` steps about as much work as log(k).
    """
    batch, _, tokens = matrix.shape
    lost = torch.zeros(batch, tokens, dtype=torch.int64, device=matrix.device)
    views, targets = (after > before).nonzero(as_tuple=True)
    for view, target in zip(views.split(READ // tokens + 1), targets.split(READ // tokens + 1), strict=True):
        low, high = before[view, target, None], after[view, target, None]
        part = matrix[view, target].clamp_(min=low, max=high).sub_(low)
        lost.index_add_(0, view, part.long())
    return lost


def at(values: Tensor, token: Int[Tensor, " batch"]) -> Tensor:
    """Return `values[row, token[row]]` for each row of the batch."""
    return values[torch.arange(len(token), device=token.device), token]


def _matrix(x: Float[Tensor, "batch tokens dim"]) -> Int[Tensor, "batch tokens tokens"]:
    batch, tokens, _ = x.shape
    matrix = torch.empty(batch, tokens, tokens, dtype=torch.int32, device=x.device)
    for start in range(0, tokens, CHUNK):
        part = _from_diagonal(x, start)
        matrix[:, start : start + CHUNK, start:] = part
        matrix[:, start:, start : start + CHUNK] = part.transpose(1, 2)
    return matrix


def _from_diagonal(x: Float[Tensor, "batch tokens dim"], start: int) -> Int[Tensor, "batch chunk rest"]:
    """Return the similarities of a chunk of tokens to themselves and to all tokens behind them."""
    return in_steps(x[:, start : start + CHUNK] @ x[:, start:].transpose(1, 2))


def in_steps(cosines: Float[Tensor, "batch some others"]) -> Int[Tensor, "batch some others"]:
    """Return cosines as whole numbers of `1 / STEPS`. It changes `cosines`."""
    return cosines.mul_(STEPS).round_().int()
