"""MMTok: keep visual tokens that cover both the question and all other visual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep
from vlmzip.selection import CHUNK, STEPS, cosine_matrix, cover, in_steps, views_at_once
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Signal, Site, VisualTokens

#: Steps per unit to which shares are rounded. They can be much smaller than cosines: on average 1 / tokens.
STEPS_OF_SHARES = 2**30


@dataclass(frozen=True, kw_only=True)
class MMTok(BudgetedCompressor):
    """Keep the visual tokens that cover both the question and all other visual tokens.

    Dong et al., ICLR 2026 (arXiv:2508.18264), multimodal coverage maximization:

    1. The words of the question are compared with the projected tokens, both as inputs of the LLM: cosines divided by
       `text_temperature`, softmax over the visual tokens of the view.
    2. The visual tokens are compared with one another, by their features before the projector: cosines divided by
       `vision_temperature`, softmax over the visual tokens of the view.
    3. A set of tokens covers a word or a visual token as well as the best token of the set does. The coverage of the
       set is the mean over the words plus `alpha` times the mean over the visual tokens.
    4. The token that adds most coverage is selected, and so on until the budget is reached.
    5. The selected tokens stay in raster order.

    Differences from the authors' code:

    - Any batch size works, also with questions of different lengths. Of tokens that add equally much, the first in
      raster order is selected.
    - The question is the text behind the image, as the processor and the chat template write it: with the words that
      open the answer, such as "ASSISTANT:". The authors take the bare question, and can replace it by key words.
    - They can leave out the padding of square images in LLaVA-1.5. We have no such option.
    - Cosines are rounded to a millionth, and shares to a billionth, so that sums are exact.

    Their code sets `text_temperature` to 0.02 for LLaVA and 0.01 for Qwen. Where a projector joins several patches into
    a token, no features before it belong to one token, and the projected tokens are compared with one another.

    Time is at most that of reading an N x (N + words) matrix once per selected token. On a CPU, only rows whose
    coverage changes are read: about log(k) times the matrix for k tokens. The matrix takes 1.3 GiB for a view of 18,432
    tokens; views of a batch take turns beyond 2 GiB.

    When it fails: in conversations, because tokens are selected for the first question and later ones find no others,
    where embeddings of words and projected tokens are not aligned, because then the words choose tokens by chance, and
    in prompts with the question before the image: the text behind the image is then only the rest of the prompt.
    """

    paper = "arXiv:2508.18264"
    kind = "prune"
    cost = "k·N²"
    published: ClassVar[Mapping[int, float]] = {128: 97.5, 64: 96.3}
    published_in = "rerun of the authors' code with 11 benchmarks of lmms-eval (Cen-Prune)"
    examples = ("keep=64", "keep=25%,text_temperature=0.01")
    needs = frozenset({Signal.ENCODER_FEATURES, Signal.TEXT_FEATURES})
    sites = (Site.POST_PROJECTOR,)

    site: Site = Site.POST_PROJECTOR
    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%")."""
    alpha: Annotated[float, Ge(0)] = 0.5
    """The weight of covering the visual tokens; covering the question has weight 1."""
    text_temperature: Annotated[float, Gt(0)] = 0.02
    """The temperature of the softmax of the words' cosines."""
    vision_temperature: Annotated[float, Gt(0)] = 0.2
    """The temperature of the softmax of the visual tokens' cosines."""

    def assign(self, tokens: VisualTokens) -> TokenMap:
        projected = normalize(tokens.features[:, tokens.prefix :].float(), dim=-1)
        vision = tokens.encoder_features[:, tokens.prefix :]
        text, is_word = normalize(tokens.text_features.float(), dim=-1), tokens.query_mask
        batch, size, _ = projected.shape
        kept = [
            self._kept(projected[views], vision[views], text[views], is_word[views])
            for views in views_at_once(batch, size * (size + text.shape[1]))
        ]
        return TokenMap.keep(torch.cat(kept)).after_dropping(tokens.prefix)

    def _kept(
        self,
        projected: Float[Tensor, "batch tokens llm_dim"],
        vision: Float[Tensor, "batch tokens encoder_dim"],
        text: Float[Tensor, "batch words llm_dim"],
        is_word: Bool[Tensor, "batch words"],
    ) -> Bool[Tensor, "batch tokens"]:
        to_words = in_steps(text @ projected.transpose(1, 2))
        of_words = _shares(to_words, self.text_temperature) * is_word[..., None]
        of_tokens = _shares(cosine_matrix(vision), self.vision_temperature)
        words, size = is_word.sum(1, keepdim=True), vision.shape[1]

        def score(gains: list[Int[Tensor, "batch tokens"]]) -> Float[Tensor, "batch tokens"]:
            return gains[0] / words + self.alpha * gains[1] / size

        return cover([of_words, of_tokens], self.count(size), score)


def _shares(cosines: Int[Tensor, "batch targets tokens"], temperature: float) -> Int[Tensor, "batch targets tokens"]:
    """Return the softmax over tokens of their cosines to each target, as whole numbers of `1 / STEPS_OF_SHARES`.

    The cosines are whole numbers of `1 / STEPS`. The shares take their place.
    """
    for start in range(0, cosines.shape[1], CHUNK):
        part = cosines[:, start : start + CHUNK]
        shares = part.float().div_(STEPS * temperature).softmax(dim=-1)
        part.copy_(shares.mul_(STEPS_OF_SHARES).round_())
    return cosines
