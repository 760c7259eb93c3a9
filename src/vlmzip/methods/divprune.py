"""DivPrune: keep the visual tokens that are farthest apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep
from vlmzip.selection import Cosines, spread
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Site, VisualTokens


@dataclass(frozen=True, kw_only=True)
class DivPrune(BudgetedCompressor):
    """Keep the visual tokens that are farthest apart, so that every kind of token is present.

    Alvar et al., CVPR 2025 (arXiv:2503.02175), section 3. It selects tokens so that the smallest distance between two
    of them is large (the max-min diversity problem), by the authors' greedy rule:

    1. The distance between two projected tokens is 1 minus their cosine similarity.
    2. The first token is the one with the largest distance to its nearest neighbour.
    3. Each further token is the one with the largest distance to the nearest token that was already selected.
    4. The selected tokens stay in raster order.

    It reads neither attention nor the question. The authors select behind the projector. Before the projector or inside
    the LLM, it compares the features that it finds there.

    Differences from the authors' code: any batch size works. Cosines are computed in float32 in every precision, and
    those that differ by less than a millionth count as equal. Of equally distant tokens, the first in raster order is
    selected, and a token is never selected twice. The authors' ratio of 0.098 (56 of 576 tokens) is a setting of
    `keep`.

    The nearest neighbours take time quadratic in the tokens of a view; selecting takes tokens times selected tokens.
    Up to 8,192 tokens in a batch of one, all cosines are kept. Beyond, memory is linear in the tokens.

    When it fails: on images with many unusual tokens that do not matter, because outliers are far from everything and
    are selected first, and on small things in a uniform surface that the question asks about, because it does not read
    the question.
    """

    paper = "arXiv:2503.02175"
    kind = "prune"
    cost = "N²"
    published: ClassVar[Mapping[int, float]] = {128: 96.9, 64: 94.8}
    published_in = "rerun of the authors' code with 11 benchmarks of lmms-eval (Cen-Prune)"
    examples = ("keep=64", "keep=9.8%")
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)

    site: Site = Site.POST_PROJECTOR
    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%")."""
    layer: Annotated[int, Ge(0)] = 2
    """K, the first LLM layer that sees fewer tokens, 0-based; used at site in_llm."""

    def assign(self, tokens: VisualTokens) -> TokenMap:
        features = tokens.features[:, tokens.prefix :]
        cosines = Cosines(features)
        kept = spread(cosines, 1 - cosines.nearest(), self.count(features.shape[1]))
        return TokenMap.keep(kept).after_dropping(tokens.prefix)
