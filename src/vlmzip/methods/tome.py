"""ToMe: merge similar tokens in every layer of the vision encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep
from vlmzip.selection import CHUNK, STEPS
from vlmzip.token_map import TokenMap, highest, means_by_size
from vlmzip.visual_tokens import Signal, Site, VisualTokens


@dataclass(frozen=True, kw_only=True)
class ToMe(BudgetedCompressor):
    """Merge the most similar tokens in every layer of the vision encoder, which then runs with fewer tokens.

    Bolya et al., ICLR 2023 (arXiv:2210.09461), section 3. Between attention and MLP of every layer:

    1. The tokens are split into two sets, those at even and those at odd places. CLS counts as the first token.
    2. Each token of the first set points to the token of the second set with the most similar key: the highest cosine
       similarity of the layer's attention keys, mean over heads. CLS points to none.
    3. The r tokens with the highest similarity are merged into the tokens to which they point: means, weighted by the
       number of patches in each token.
    4. The tokens of the first set that are left, in their order, and then the second set go on. In the attention of
       later layers, log s is added to the scores of a token of s patches, as if its patches were all there
       (proportional attention).

    All layers up to the one that gives the features merge. r is the smallest number that is enough for the budget if it
    is the same in every layer; the last layers that merge take what is left. A layer merges at most half of its tokens.
    The LLM gets the tokens in raster order, each at the place of the middle one of its patches.

    This site (`encoder`) needs an encoder of CLIP's or SigLIP's kind that encodes each view by itself and makes one
    visual token of each patch: LLaVA, LLaVA-NeXT, Video-LLaVA, PaliGemma. For other models there is `pre_projector`,
    which is our own variant: the finished features are merged in one go, by the keys of the layer that gives them. It
    saves no time in the encoder, and CLS takes no part.

    Differences from the authors' code: any batch size works. Cosines that differ by less than a millionth count as
    equal; of equally similar tokens, the first are merged, into the first. Without CLS, tokens that are left keep their
    order, too. If half of the tokens of every layer is not enough for the budget, which happens in encoders of a few
    layers, the last layer merges in several rounds, by the means of the keys; so does `pre_projector`.

    Not confirmed: where the papers that compare with ToMe in LLaVA place it, and in which layers. Their scores are
    therefore not given here.

    When it fails: at small budgets, because half of the layers then see means of many patches, with which the encoder
    was not trained, and on small things beside a surface of a similar kind, whose mean they join.
    """

    paper = "arXiv:2210.09461"
    kind = "merge"
    cost = "N²"
    examples = ("keep=64", "keep=25%,site=pre_projector")
    needs = frozenset({Signal.KEYS})
    sites = (Site.ENCODER, Site.PRE_PROJECTOR)

    site: Site = Site.ENCODER
    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%")."""

    def counts_by_layer(self, size: int, left: int, layers: int) -> Sequence[int]:
        """Return the number of tokens after each of `layers` layers, which begin with `size` and leave `left`."""
        counts: list[int] = []
        for each in range(-(-(size - left) // layers), size // 2 + 1):  # a layer cannot merge more than half
            counts = list(accumulate([each] * layers, lambda now, r: max(left, now - min(r, now // 2)), initial=size))
            if counts[-1] == left:
                break
        return [*counts[1:-1], left]

    def join(
        self, keys: Float[Tensor, "batch tokens key_dim"], sizes: Float[Tensor, "batch tokens"], prefix: int, count: int
    ) -> Int[Tensor, "batch tokens"]:
        """Return the group that each token joins: first the prefix, each token alone, and then `count` groups."""
        keys, sizes = keys.float(), sizes.float()
        left = keys.shape[1] - prefix
        group = torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[:2])
        while left > count:
            merged = min(left - count, left // 2)
            step = _matched(keys, prefix, merged)
            left -= merged
            group = step.gather(1, group)
            if left > count:
                keys, sizes = means_by_size(keys, step, sizes, prefix + left)
        return group

    def assign(self, tokens: VisualTokens) -> TokenMap:
        keys = tokens.keys[:, tokens.prefix :]
        group = self.join(keys, torch.ones_like(keys[..., 0]), 0, self.count(keys.shape[1]))
        return TokenMap.merge(group).in_anchor_order().after_dropping(tokens.prefix)


def _matched(keys: Float[Tensor, "batch tokens key_dim"], prefix: int, merged: int) -> Int[Tensor, "batch tokens"]:
    """Return each token's group after one bipartite matching, which merges `merged` tokens of the first set."""
    x = normalize(keys, dim=-1)
    first, second = x[:, ::2], x[:, 1::2].transpose(1, 2)
    # Cosines are rounded, so that rounding errors do not decide between equal tokens. The prefix takes no part.
    barred = torch.where(torch.arange(second.shape[2], device=x.device) < prefix // 2, -torch.inf, 0.0)
    nearest = [(part @ second).mul_(STEPS).round_().add_(barred).max(dim=-1) for part in first.split(CHUNK, dim=1)]
    similarity = torch.cat([values for values, _ in nearest], dim=1)
    similarity[:, : (prefix + 1) // 2] = -torch.inf
    joins = highest(similarity, merged)
    # The tokens of the first set that are left come first, and then the second set.
    start = first.shape[1] - merged
    group = torch.empty(keys.shape[:2], dtype=torch.long, device=keys.device)
    group[:, ::2] = torch.where(joins, start + torch.cat([places for _, places in nearest], dim=1), 0)
    group[:, ::2] += torch.where(joins, 0, (~joins).cumsum(dim=1) - 1)
    group[:, 1::2] = start + torch.arange(second.shape[2], device=keys.device)
    return group
