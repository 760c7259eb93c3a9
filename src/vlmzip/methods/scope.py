"""SCOPE: keep visual tokens that cover all others, weighted by the attention from CLS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float
from torch import Tensor

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep
from vlmzip.selection import STEPS, cosine_matrix, cover, views_at_once
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Signal, VisualTokens


@dataclass(frozen=True, kw_only=True)
class SCOPE(BudgetedCompressor):
    """Keep the visual tokens that resemble many others and that CLS attends to.

    Deng et al., NeurIPS 2025 (arXiv:2510.24214), saliency-coverage oriented token pruning:

    1. A set of tokens covers a token as well as the most similar token of the set does, by the cosine of their encoder
       features; coverage is at least 0.
    2. A token's gain is what it would add to the coverage of all tokens of the view.
    3. Its score is gain x attention^alpha. The attention is that from CLS in the layer that gives the features. In
       encoders without CLS it is the attention received from all tokens.
    4. The token with the highest score is selected, gains are computed again, and so on until the budget is reached.
    5. The selected tokens stay in raster order. CLS is dropped, and nothing is merged.

    Differences from the authors' code: cosines are computed in float32 in every precision and rounded to a millionth,
    so that gains are exact. Of equal scores, the first in raster order wins. The attention is the mean over heads where
    theirs is the sum, which changes no decision. Their variant that adds attention to the gain is not offered. Their
    code divides a budget by the number of views; `keep` does the same, `keep_per_view` does not.

    Time is at most that of reading N x N cosines once per selected token. On a CPU, only rows whose coverage changes
    are read: about log(k) times the matrix for k tokens. The matrix takes 1.3 GiB for a view of 18,432 tokens; views of
    a batch take turns beyond 2 GiB.

    When it fails: on small things that few tokens resemble, unless CLS attends to them, because it rewards tokens that
    stand for many others and does not read the question.
    """

    paper = "arXiv:2510.24214"
    kind = "prune"
    cost = "k·N²"
    published: ClassVar[Mapping[int, float]] = {64: 96.0}
    published_in = "SCOPE (arXiv:2510.24214)"
    examples = ("keep=64", "keep=25%,alpha=0.5")
    needs = frozenset({Signal.CLS_ATTENTION})

    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%")."""
    alpha: Annotated[float, Ge(0)] = 1.0
    """The exponent of the attention; 0 selects by coverage alone."""

    def assign(self, tokens: VisualTokens) -> TokenMap:
        features = tokens.features[:, tokens.prefix :]
        weight = tokens.cls_attention[:, tokens.prefix :].float() ** self.alpha
        batch, size, _ = features.shape
        kept = [self._kept(features[views], weight[views]) for views in views_at_once(batch, size * size)]
        return TokenMap.keep(torch.cat(kept)).after_dropping(tokens.prefix)

    def _kept(
        self, features: Float[Tensor, "batch tokens dim"], weight: Float[Tensor, "batch tokens"]
    ) -> Bool[Tensor, "batch tokens"]:
        similarity = cosine_matrix(features)
        return cover([similarity], self.count(features.shape[1]), lambda gains: gains[0] / STEPS * weight)
