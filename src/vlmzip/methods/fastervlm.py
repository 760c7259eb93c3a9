"""FasterVLM: keep the patches that CLS attends to most."""

from __future__ import annotations

from dataclasses import dataclass

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep
from vlmzip.token_map import TokenMap, highest
from vlmzip.visual_tokens import Signal, VisualTokens


@dataclass(frozen=True, kw_only=True)
class FasterVLM(BudgetedCompressor):
    """Keep the patches with the highest attention from CLS, and drop the rest.

    Zhang et al. (arXiv:2412.01818v1; later versions of this paper describe `vispruner`):

    1. A patch's score is the attention from CLS in the layer that gives the features, mean over heads.
    2. The patches with the highest scores remain, in raster order. CLS itself goes.

    An encoder without CLS ranks patches by the attention that they receive from all tokens, as `visionzip` does.

    Differences from the authors' code: any batch size works. Of patches with equal attention, the first in raster order
    remain; the authors' choice depends on the device.

    Not confirmed: the authors' scores for 192, 128 and 64 of 576 tokens.

    When it fails: if the question asks about something that attracts no attention from CLS. Patches with high attention
    can show the same thing, and nothing removes duplicates.
    """

    paper = "arXiv:2412.01818v1"
    examples = ("keep=64", "keep=25%")
    needs = frozenset({Signal.CLS_ATTENTION})
    cost = "N"

    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%")."""

    def assign(self, tokens: VisualTokens) -> TokenMap:
        score = tokens.cls_attention[:, tokens.prefix :].float()
        return TokenMap.keep(highest(score, self.count(score.shape[1]))).after_dropping(tokens.prefix)
