"""ZOO-Prune: keep visual tokens to which the projector is sensitive and that are far apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep
from vlmzip.schema import Seed
from vlmzip.seeds import mixed
from vlmzip.selection import Cosines, spread
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Projector, Signal, Site, VisualTokens

#: Sensitivities of a view that differ by at most this fraction count as equal, because rounding explains it.
SAME = 1e-3


@dataclass(frozen=True, kw_only=True)
class ZOOPrune(BudgetedCompressor):
    """Keep the visual tokens that change most in the projector when they are disturbed, and that are far apart.

    Kim et al., CVPR 2026 (arXiv:2509.24837), pruning by zeroth-order gradient estimation:

    1. The encoder's features of all tokens are moved by `step` along a random unit vector, forwards and backwards. Each
       token's sensitivity is the distance between the two projected tokens divided by 2 x `step`, as a mean over
       `directions` vectors, which are the same for all tokens.
    2. The weight of a token is its sensitivity, scaled to 0 to 1 over the view.
    3. The first token is the one with the largest weight. Each further token has the largest product of its weight and
       its distance to the nearest selected token, which is 1 minus the cosine of the projected tokens.
    4. The selected tokens stay in raster order.

    The paper does not state the number of directions and the step. The defaults, 64 and 0.01, are those of the authors'
    code. The directions depend only on `seed`.

    Differences from the authors' code:

    - It runs the model's own projector. The authors run a copy whose two layers are replaced with matrices of low rank,
      and do not publish what that changes.
    - Features and projector are in float32: in half precision, a step of 0.01 is lost. Any batch size works.
    - Of equal scores, the first in raster order wins, and equal cosines are those that differ by less than a millionth.
    - If all tokens are equally sensitive, as in a linear projector, those remain that are far from the first and apart.

    It runs the projector 2 x `directions` times on all tokens. With LLaVA-1.5-7B's projector, which is large, 64
    directions took 7.6 times as long as CLIP ViT-L/14-336 takes to encode the image, and one direction an eighth (12 %)
    of that time (docs/results.md). Up to 8,192 tokens in a batch of one, all cosines are kept. Beyond, memory is linear
    in the tokens.

    When it fails: with few directions, because chance decides. On 40 images of mini at 25 %, another seed keeps 85 % of
    the same tokens with 64 directions, and one direction keeps 70 % of those of 64. It does not read the question. The
    token to which the projector is least sensitive has weight 0, so that it is selected last.
    """

    paper = "arXiv:2509.24837"
    kind = "prune"
    cost = "N·k"
    published: ClassVar[Mapping[int, float]] = {128: 97.1, 64: 95.5}
    published_in = "rerun of the authors' code with 11 benchmarks of lmms-eval (Cen-Prune)"
    examples = ("keep=64", "keep=25%,directions=4")
    needs = frozenset({Signal.ENCODER_FEATURES, Signal.PROJECTOR})
    sites = (Site.POST_PROJECTOR,)

    site: Site = Site.POST_PROJECTOR
    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%")."""
    directions: Annotated[int, Ge(1)] = 64
    """Random directions in which the features are moved. Time is proportional to it."""
    step: Annotated[float, Gt(0)] = 0.01
    """How far the features are moved, as a distance between features before the projector."""
    seed: Seed = 0
    """Seed of the random directions."""

    def at_step(self, step: int, salt: int = 0) -> ZOOPrune:
        return dataclasses.replace(self, seed=mixed(self.seed, step, salt))

    def assign(self, tokens: VisualTokens) -> TokenMap:
        projected = tokens.features[:, tokens.prefix :]
        before = tokens.encoder_features[:, tokens.prefix :].float()
        sensitivity = self._sensitivity(before, tokens.projector)
        least, most = sensitivity.amin(1, keepdim=True), sensitivity.amax(1, keepdim=True)
        weight = torch.where(most - least > SAME * most, (sensitivity - least) / (most - least), 1.0)
        kept = spread(Cosines(projected), weight, self.count(projected.shape[1]), weight)
        return TokenMap.keep(kept).after_dropping(tokens.prefix)

    def _sensitivity(
        self, features: Float[Tensor, "batch tokens encoder_dim"], projector: Projector
    ) -> Float[Tensor, "batch tokens"]:
        # Draw on the CPU: with the same seed, other devices draw different numbers.
        drawn = torch.randn(self.directions, features.shape[-1], generator=torch.Generator().manual_seed(self.seed))
        total = torch.zeros_like(features[..., 0])
        for direction in self.step * normalize(drawn, dim=-1).to(features.device):
            total += (projector(features + direction) - projector(features - direction)).norm(dim=-1)
        return total / (2 * self.step * self.directions)
