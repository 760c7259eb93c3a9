"""CDPruner: keep visual tokens that are diverse and relevant to the question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep
from vlmzip.selection import Cosines
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Signal, Site, VisualTokens

#: Gains that differ by at most this fraction count as equal.
SAME = 1e-5
#: Added to relevance, so that the least relevant token has some.
LEAST = 1e-6
#: A token of which the selected tokens leave less than this unexplained adds nothing, as a copy of one of them would.
COPY = 1e-4


@dataclass(frozen=True, kw_only=True)
class CDPruner(BudgetedCompressor):
    """Keep the visual tokens that are most diverse, where relevance to the question weighs each of them.

    Zhang et al., NeurIPS 2025 (arXiv:2506.10967), conditional diversity by a determinantal point process:

    1. A token's relevance r is its mean similarity to the words of the question, scaled to 0 to 1 over the view.
    2. The kernel is L_ij = r_i x cosine(i, j) x r_j, with the cosines of the projected tokens.
    3. Tokens are selected so that the determinant of the kernel of the selected ones is large: each step selects the
       token that makes it largest (greedy MAP inference by an incremental Cholesky decomposition).
    4. The selected tokens stay in raster order.

    The authors take similarities from CLIP: its text tower and its projection of patches. The models here have no such
    text tower. The substitute is the cosine of the projected tokens and the question's embeddings, both as inputs of
    the LLM; it was not published, and the published numbers do not hold for it. `relevance` says which end of it counts
    as relevant. The authors take the negative similarity, because CLIP's patches resemble texts about them least.

    Differences from the authors' code, beside the substitute:

    - Any batch size works, also with questions of different lengths. Relevance is scaled over each view; theirs, over
      the batch.
    - The question is the text behind the image, as the processor and the chat template write it.
    - Cosines are in float32 and rounded to a millionth. Of tokens that add equally much, the first in raster order is
      selected. A token of which the selected ones explain 99.99 % adds nothing; in their code, rounding decides what it
      adds, and can make it negative or NaN.

    Time is proportional to tokens times the square of selected tokens, and memory to tokens times selected tokens. Up
    to 8,192 tokens in a batch of one, all cosines are kept. Beyond, they are computed for each selected token.

    When it fails: in conversations, because tokens are selected for the first question and later ones find no others,
    if similarity to embeddings says nothing about relevance, because the least relevant tokens are almost never
    selected, and in prompts with the question before the image: the text behind the image is then only the rest of the
    prompt.
    """

    paper = "arXiv:2506.10967"
    kind = "prune"
    cost = "N·k²"
    published: ClassVar[Mapping[int, float]] = {128: 97.3, 64: 96.3}
    published_in = (
        "rerun of the authors' code with 11 benchmarks of lmms-eval (Cen-Prune), with CLIP's text tower, in whose place"
        " vlmzip uses the LLM's embeddings: expect other scores here"
    )
    examples = ("keep=64", "keep=25%,relevance=dissimilar")
    needs = frozenset({Signal.TEXT_FEATURES})
    sites = (Site.POST_PROJECTOR,)

    site: Site = Site.POST_PROJECTOR
    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%")."""
    relevance: Literal["similar", "dissimilar"] = "similar"
    """Whether tokens are relevant that are most similar to the question's embeddings ("similar"), or least
    ("dissimilar", the sign of the authors' code for CLIP)."""

    def assign(self, tokens: VisualTokens) -> TokenMap:
        projected = tokens.features[:, tokens.prefix :]
        cosines = Cosines(projected)
        relevance = _scaled(self._similarity(cosines.x, tokens.text_features, tokens.query_mask))
        kept = _diverse(cosines, relevance, self.count(projected.shape[1]))
        return TokenMap.keep(kept).after_dropping(tokens.prefix)

    def _similarity(
        self,
        x: Float[Tensor, "batch tokens llm_dim"],
        text: Float[Tensor, "batch words llm_dim"],
        is_word: Bool[Tensor, "batch words"],
    ) -> Float[Tensor, "batch tokens"]:
        """Return the mean cosine of each token to the words; with the other sign if the least similar is relevant."""
        words = normalize(text.float(), dim=-1) * is_word[..., None]
        mean = words.sum(1) / is_word.sum(1, keepdim=True)
        similarity: Tensor = (x @ mean[..., None])[..., 0]
        return similarity if self.relevance == "similar" else -similarity


def _scaled(similarity: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """Return similarities scaled to 0 to 1 over each view; 1 for all if they are equal."""
    least, most = similarity.amin(1, keepdim=True), similarity.amax(1, keepdim=True)
    return torch.where(most - least > LEAST, (similarity - least + LEAST) / (most - least), 1.0)


def _diverse(cosines: Cosines, relevance: Float[Tensor, "batch tokens"], count: int) -> Bool[Tensor, "batch tokens"]:
    """Mark the tokens of a greedy search for the largest determinant of the kernel.

    A token multiplies the determinant by the square of its relevance and by what the marked tokens do not explain of
    it: `left`, which begins at 1. `factor` has the rows of the Cholesky factor of the marked tokens' cosines.
    """
    batch, tokens = relevance.shape
    views = torch.arange(batch, device=relevance.device)
    factor, left = relevance.new_zeros(batch, count, tokens), torch.ones_like(relevance)
    marked = torch.zeros_like(relevance, dtype=torch.bool)
    for step in range(count):
        gain = (relevance.square() * left).masked_fill(marked, -torch.inf)
        # The first of the best: rounding, which depends on the batch, must not decide between equal tokens.
        token = (gain >= (1 - SAME) * gain.amax(1, keepdim=True)).to(torch.uint8).argmax(dim=1)
        marked.scatter_(1, token[:, None], True)
        if step == count - 1:
            break
        known, own = factor[:, :step], left[views, token, None]
        unexplained = cosines.of(token) - (known[views, :, token][:, None] @ known)[:, 0]
        factor[:, step] = torch.where(own > 0, unexplained * own.clamp(min=COPY).rsqrt(), 0)
        left = left - factor[:, step].square()
        left = torch.where(left < COPY, 0, left)
    return marked
