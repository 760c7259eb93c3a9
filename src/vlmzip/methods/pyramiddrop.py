"""PyramidDrop: drop half of the visual tokens at several layers of the LLM, ranked by the question's attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Le

from vlmzip.compressor import BudgetError, Compressor, Profile, check_ascending, keep_all, nearest_to
from vlmzip.keep import Keep, count_to_keep, round_half_up
from vlmzip.token_map import TokenMap, highest
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens

#: The layers of the published setting, and the depth of its LLM (LLaVA-1.5-7B).
PUBLISHED_LAYERS, PUBLISHED_DEPTH = (8, 16, 24), 32
#: `at_budget` chooses among multiples of this share.
STEP = 1e-5


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Compressor):
    """At each of several layers, keep the half of the visual tokens that the last question token attends to most.

    Xing et al., CVPR 2025 (arXiv:2410.17247), section 3:

    1. Layers split the LLM into stages of equal depth: 8, 16 and 24 of 32. The first stage sees all visual tokens.
    2. Before each of these layers, a visual token's score is the attention that it gets from the last question token,
       mean over heads. The queries and keys are those of the layer that runs next, of the hidden states that enter it.
    3. The tokens with the highest scores stay, a `share` of those that reach the layer, rounded down. With one half,
       576 tokens become 288, 144 and 72.

    **Layers.** In an LLM of another depth, the default layers move to the same fractions of its depth: 7, 14 and 21 of
    28. Other layers do not move. Layers that meet in a shallow LLM act once.

    **Budgets.** `at_budget` keeps the layers and finds the share that meets the average over all layers.

    Differences from the authors' code:

    - Tokens keep their positions; the authors renumber the remaining tokens after each stage.
    - Each image of a prompt is ranked separately, by the question after it; theirs takes one image.
    - In training, the token before the first label after an image ranks it. Theirs averages the attention of the
      tokens before every answer.
    - Each stage keeps a share of the tokens that reach it; theirs keeps a share of all. With one half, both are equal.
    - At least one token stays. Of tokens with equal attention, the first in raster order stay.

    With labels, an image's question ends at the token before the first label after the image. Without labels, it ends
    at the last token of the prompt. In a conversation with answers, that is the last token of the last answer.

    Not confirmed: scores for 192, 128 and 64 of 576 tokens, about which later papers disagree.

    When it fails: at small average budgets, because the first stage, a quarter of the LLM, sees all tokens. With its
    default layers, an average below 25 % is out of reach.
    """

    paper = "arXiv:2410.17247"
    examples = ("share=0.5", "share=0.3,layer=2,12,22")
    needs = frozenset({Signal.TEXT_ATTENTION})
    sites = (Site.IN_LLM,)
    budget_fields = ("share",)
    asks_next_layer = True

    site: Site = Site.IN_LLM
    share: Annotated[float, Gt(0), Le(1)] = 0.5
    """The fraction of the visual tokens reaching each layer that it sees; at least one token."""
    layer: tuple[int, ...] = PUBLISHED_LAYERS
    """The first layers that see fewer tokens, 0-based, ascending; the default moves with the depth of the LLM."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ascending(self.layer, "8,16,24")

    # --- how many ---------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        return self.layer

    def token_count(self, grid: Grid) -> int | None:
        return self._left(grid.size) if len(self.layer) == 1 else None

    def count_at(self, layer: int | None, views: Sequence[Grid]) -> int:
        return self._left(sum(grid.size for grid in views))

    def at_budget(self, keep: Keep, profile: Profile) -> tuple[PyramidDrop, float]:
        """Return the configuration with the share that meets the average budget best."""
        placed = self.placed(profile)
        least = placed.with_fields(share=STEP).reached(profile)
        if count_to_keep(keep, profile.size) / profile.size < least:
            raise placed._too_small(least, profile.layers)
        nearest = placed._nearest_share(keep, profile, lambda candidate: candidate.reached(profile))
        return nearest, nearest.reached(profile)

    def at_keep(self, keep: Keep, profile: Profile) -> tuple[PyramidDrop, float]:
        """Return the configuration whose share leaves nearest to `keep` tokens after its last layer."""
        placed = self.placed(profile)
        placed.check_layers(profile.layers, profile.first_layer)
        nearest = placed._nearest_share(keep, profile, lambda candidate: candidate.left(profile))
        return nearest, nearest.left(profile)

    def placed(self, profile: Profile) -> PyramidDrop:
        if profile.layers < 2:
            raise BudgetError("in-LLM compression needs at least 2 decoder layers")
        if self.layer != PUBLISHED_LAYERS:
            return self
        scaled = [round_half_up(layer * profile.layers / PUBLISHED_DEPTH) for layer in self.layer]
        return self.with_fields(
            layer=tuple(sorted({min(max(layer, profile.first_layer), profile.layers - 1) for layer in scaled}))
        )

    def _nearest_share(self, keep: Keep, profile: Profile, ratio: Callable[[PyramidDrop], float]) -> PyramidDrop:
        """Return the configuration whose ratio is nearest to `keep`. Ratios rise with the share."""
        target = count_to_keep(keep, profile.size) / profile.size
        shares = range(1, round(1 / STEP) + 1)
        return nearest_to(target, lambda step: self.with_fields(share=round(step * STEP, 5)), ratio, shares)

    def _left(self, available: int) -> int:
        """Return how many of the available tokens a layer keeps."""
        return max(int(self.share * available), 1)

    # --- which tokens -----------------------------------------------------------------------------------------

    def assign(self, tokens: VisualTokens) -> TokenMap:
        score = tokens.text_attention[:, -1, tokens.prefix :]
        count = self._left(score.shape[1])
        if count >= score.shape[1]:
            return keep_all(tokens)
        return TokenMap.keep(highest(score, count)).after_dropping(tokens.prefix)
