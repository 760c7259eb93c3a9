"""Adaptive VisionZip: DFMR says how many tokens an image deserves, VisionZip says which."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from vlmzip.compressor import Compressor
from vlmzip.methods.dfmr import DFMR
from vlmzip.methods.visionzip import VisionZip
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Signal, VisualTokens


@dataclass(frozen=True, kw_only=True)
class AdaptiveVisionZip(Compressor):
    """VisionZip with a budget for each image, the one that DFMR's variation would give it.

    Our own combination, in no paper. DFMR (arXiv:2412.08771, in our reading, see `dfmr`) picks each image's factor,
    and with it a count: 576, 144 or 64 of LLaVA-1.5's 576. VisionZip (arXiv:2412.04467, see `visionzip`) then keeps
    that many tokens, dominant and contextual. An image of factor 1 is left as it is. Rows get different numbers of
    tokens.
    """

    paper = "our own combination of dfmr and visionzip"
    examples = ("tau=0.5", "tau=0.2,merge=mean")
    needs = frozenset({Signal.CLS_ATTENTION, Signal.KEYS})
    threshold: ClassVar[str] = DFMR.threshold
    budget_fields = DFMR.budget_fields

    tau: Annotated[float, Ge(0)] = DFMR.tau
    """The deviation from which on a factor is too coarse; set it from images with `calibrate`."""
    max_factor: Annotated[int, Ge(1)] = DFMR.max_factor
    """Side of the largest window that DFMR tries; the smallest count is tokens / max_factor²."""
    normalize: Literal["layer", "l2", "none"] = DFMR.normalize
    """As DFMR's: features of each token before measuring."""
    measure: Literal["features", "pixels"] = DFMR.measure
    """As DFMR's: what is to vary, features or the image's pixels."""
    windows: Literal["mean", "max"] = DFMR.windows
    """As DFMR's: the "mean" deviation over windows, or their "max"."""
    merge: Literal["reference", "mean"] = VisionZip.merge
    """As VisionZip's: how contextual tokens are merged, as the authors' code or as their paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "needs", type(self).needs | self.chooser.needs)
        self.selector(1)

    @property
    def chooser(self) -> DFMR:
        """What picks the factors."""
        shared = {field.name for field in dataclasses.fields(DFMR)}
        return DFMR(**{name: getattr(self, name) for name in self.field_names() if name in shared})

    def selector(self, count: int) -> VisionZip:
        """What picks the tokens of images that keep `count`."""
        return VisionZip(keep=count, merge=self.merge)

    def counts_by_factor(self, grid: Grid) -> dict[int, int]:
        return self.chooser.counts_by_factor(grid)

    def deviations(self, tokens: VisualTokens) -> Float[Tensor, "batch factors"]:
        return self.chooser.deviations(tokens)

    def token_count(self, grid: Grid) -> int | None:
        return self.chooser.token_count(grid)

    def assign(self, tokens: VisualTokens) -> TokenMap:
        choice = self.chooser.choose(tokens)
        batch, count, _ = tokens.features.shape
        whole = TokenMap.identity(batch, count, tokens.features.device)
        parts = {name: getattr(whole, name).clone() for name in ("group", "weight", "anchor", "length")}
        for number, kept in enumerate(self.counts_by_factor(self.grid_of(tokens)).values()):
            rows = (choice == number).nonzero()[:, 0]
            if len(rows):
                token_map = self.selector(kept)(tokens.rows(rows))
                for name, values in parts.items():
                    values[rows] = getattr(token_map, name)
        return TokenMap(**parts)
