"""PruneSID: group tokens by principal components, and keep each group's attended and distinct tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep
from vlmzip.schema import Seed
from vlmzip.token_map import TokenMap, rows_at
from vlmzip.visual_tokens import Signal, Site, VisualTokens

#: Number of patches whose similarities to the later patches of their groups are computed at a time.
CHUNK = 64
#: Power iterations of the randomised analysis, as in `torch.pca_lowrank`.
ITERATIONS = 2
#: Halvings of the range of a step that is searched for: enough for groups of up to 2**24 patches.
HALVINGS = 24


@dataclass(frozen=True, kw_only=True)
class PruneSID(BudgetedCompressor):
    """Group tokens by principal components, and keep from each group the most attended tokens that differ.

    Fang et al., ICLR 2026 (arXiv:2603.09480), for a budget of k tokens of which CLS is one:

    1. A randomised principal component analysis of the patches' features, after a sigmoid, gives k/4 components. A
       patch belongs to the component that weighs it most.
    2. In each group, the patch with the most attention from CLS survives and suppresses those whose cosine similarity
       to it exceeds (k/32)·ρ, then the next one, and so on. ρ is the mean similarity of all pairs.
    3. Each group has a quota: 1, and a share of the rest in proportion to its survivors, by rounding of the running
       total. A quota is at most 5·⌈k/64⌉, the survivors and the group. If these limits sum to less than k, all of them
       rise, up to the groups. What the limits leave goes to the groups with the most survivors.
    4. A group keeps its survivors by attention, then suppressed patches by attention, up to its quota.
    5. The output is CLS, and then the groups one after the other. It is not in raster order.

    An encoder without CLS uses the attention that patches receive from all tokens, as `visionzip` does, and spends the
    whole budget on patches.

    Differences from the authors' code:

    - The analysis starts from `seed`, so that an image keeps the same tokens in every run and every batch. Theirs draws
      new numbers for each batch.
    - Budgets below 4 work, with one group. Any batch size works without a loop over its groups.
    - Of patches with equal attention, the first in raster order comes first.
    - Similarities are computed inside groups only, and memory is linear in the patches, instead of k·N² numbers.

    Not here: the paper's variant in which the budget depends on the image.

    When it fails: at large budgets. From k = 128 on, the threshold is often above 1, where it suppresses nothing.
    """

    paper = "arXiv:2603.09480"
    examples = ("keep=64", "keep=25%,seed=1")
    needs = frozenset({Signal.CLS_ATTENTION})
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)
    cost = "N²"
    published = {128: 96.3, 64: 95.3}
    published_in = "rerun of the authors' code with 11 benchmarks of lmms-eval (Cen-Prune)"

    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%"), including the CLS tokens of its views."""
    seed: Seed = 0
    """Seed of the randomised principal component analysis."""

    def assign(self, tokens: VisualTokens) -> TokenMap:
        attention = tokens.cls_attention[:, tokens.prefix :].float()
        count = self.count(attention.shape[1])
        patches = max(count - tokens.prefix, 0)
        features = tokens.features[:, tokens.prefix :].float()
        groups = min(max(count // 4, 1), *features.shape[1:])
        # Features that are not numbers, such as those of an overflow in float16, have no components: they count as 0.
        group = _components(features.sigmoid().nan_to_num(nan=0.5), groups, self.seed).argmax(dim=-1)
        survives = _survivors(normalize(features, dim=-1), attention, group, count / 32)

        sizes, survivors = _per_group(torch.ones_like(group), group, groups), _per_group(survives.long(), group, groups)
        quota = _quotas(sizes, survivors, count, patches)
        # The patches by group, in it first those that survive, and among equals by attention.
        order = attention.argsort(dim=1, descending=True, stable=True)
        for key in (~survives, group):
            order = order.gather(1, key.long().gather(1, order).argsort(dim=1, stable=True))
        rank = order.argsort(dim=1) - (sizes.cumsum(dim=1) - sizes).gather(1, group)
        kept = rank < quota.gather(1, group)
        output = (quota.cumsum(dim=1) - quota).gather(1, group) + rank
        return _with_prefix(kept, output, tokens.prefix, count)


def _components(x: Float[Tensor, "batch patches dim"], count: int, seed: int) -> Float[Tensor, "batch patches count"]:
    """Return the absolute weights of each patch in the principal components over channels, largest first.

    Halko et al. (arXiv:0909.4061), algorithms 4.4 and 5.1. Patches are the variables: each is centred over channels.
    """
    channels = (x - x.mean(dim=-1, keepdim=True)).transpose(1, 2)
    # Draw on the CPU: with the same seed, other devices draw different numbers.
    start = torch.randn(x.shape[1], count, generator=torch.Generator().manual_seed(seed)).to(x.device)
    basis = torch.linalg.qr(channels @ start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(channels.transpose(1, 2) @ basis).Q
        basis = torch.linalg.qr(channels @ basis).Q
    weights: Tensor = torch.linalg.svd(basis.transpose(1, 2) @ channels, full_matrices=False).Vh
    return weights.transpose(1, 2).abs()


def _survivors(
    x: Float[Tensor, "batch patches dim"],
    attention: Float[Tensor, "batch patches"],
    group: Int[Tensor, "batch patches"],
    ratio: float,
) -> Bool[Tensor, "batch patches"]:
    """Mark the patches that no survivor of their group with more attention suppresses. `x` has length 1."""
    size = x.shape[1]
    pairs = max(size * (size - 1), 1)
    threshold = ratio * (x.sum(dim=1).square().sum(dim=-1) - x.square().sum(dim=(1, 2))) / pairs
    order = attention.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))  # by group, in it by attention
    x, group = rows_at(x, order), group.gather(1, order)
    suppressed = torch.zeros_like(group, dtype=torch.bool)
    # A chunk needs the patches up to the end of the group of its last patch, in the view where that comes last.
    stops = torch.searchsorted(group, group[:, CHUNK - 1 :: CHUNK].contiguous(), right=True).amax(dim=0).tolist()
    for start, stop in zip(range(0, size, CHUNK), [*stops, size], strict=False):
        some, later = slice(start, start + CHUNK), slice(start, stop)
        conflict = (group[:, some, None] == group[:, None, later]) & (
            x[:, some] @ x[:, later].transpose(1, 2) > threshold[:, None, None]
        )
        for number, similar in enumerate(conflict.unbind(dim=1), start + 1):  # a patch suppresses later ones only
            suppressed[:, number:stop] |= similar[:, number - start :] & ~suppressed[:, number - 1, None]
    return torch.empty_like(suppressed).scatter(1, order, ~suppressed)


def _quotas(
    sizes: Int[Tensor, "batch groups"], survivors: Int[Tensor, "batch groups"], count: int, patches: int
) -> Int[Tensor, "batch groups"]:
    """Return how many patches each group keeps, `patches` in all; `count` is the whole budget."""
    least = sizes.clamp(max=min(1, patches))
    most = _raised(torch.minimum(sizes, survivors).clamp(max=5 * math.ceil(count / 64)), sizes, count)
    rest = (patches - least.sum(dim=1, keepdim=True)).clamp(min=0)
    running = survivors.cumsum(dim=1)
    shares = (running * rest).double().div(running[:, -1:]).round().long().diff(dim=1, prepend=torch.zeros_like(rest))
    quota = torch.minimum(least + shares, most)
    # Fill the groups with the most survivors first. `before` is the room of the groups that are filled earlier.
    missing = least.sum(dim=1, keepdim=True) + rest - quota.sum(dim=1, keepdim=True)
    order = survivors.argsort(dim=1, descending=True, stable=True)
    room = (most - quota).gather(1, order)
    before = room.cumsum(dim=1) - room
    filled = torch.minimum((missing - before).clamp(min=0), room)
    return quota.scatter_add(1, order, filled)


def _raised(
    most: Int[Tensor, "batch groups"], sizes: Int[Tensor, "batch groups"], count: int
) -> Int[Tensor, "batch groups"]:
    """Return the limits raised by the smallest equal step, up to the sizes, with which they sum to `count`."""
    low, high = torch.zeros_like(most[:, :1]), sizes.amax(dim=1, keepdim=True)
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        enough = torch.minimum(most + middle, sizes).sum(dim=1, keepdim=True) >= count
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return torch.minimum(most + high, sizes)


def _per_group(
    value: Int[Tensor, "batch patches"], group: Int[Tensor, "batch patches"], groups: int
) -> Int[Tensor, "batch groups"]:
    """Return the sum of `value` over each group's patches."""
    return value.new_zeros(len(value), groups).scatter_add(1, group, value)


def _with_prefix(
    kept: Bool[Tensor, "batch patches"], output: Int[Tensor, "batch patches"], prefix: int, count: int
) -> TokenMap:
    """Return the map that keeps the prefix, up to `count` tokens, and then the marked patches at their outputs."""
    first = torch.arange(prefix, device=kept.device).expand(len(kept), -1)
    stays = first < count
    kept = torch.cat([stays, kept], dim=1)
    group = torch.where(kept, torch.cat([first, min(prefix, count) + output], dim=1), -1)
    return TokenMap(group, kept.float(), kept, kept.sum(dim=1))
