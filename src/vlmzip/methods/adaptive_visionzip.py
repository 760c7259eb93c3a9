"""Adaptive VisionZip: DFMR chooses how many tokens each image keeps, VisionZip chooses which ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from vlmzip.compressor import Compressor, Measured
from vlmzip.methods.dfmr import DFMR, with_one_factor
from vlmzip.methods.visionzip import VisionZip
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Signal, VisualTokens


@dataclass(frozen=True, kw_only=True)
class AdaptiveVisionZip(Compressor):
    """Run VisionZip with a token count that DFMR chooses for each image.

    This is our own combination; no paper describes it. DFMR (arXiv:2412.08771, our reading, see `dfmr`) chooses a
    factor for each image from the variation of its tokens. The factor gives a token count: 576, 144 or 64 of
    LLaVA-1.5's 576. VisionZip (arXiv:2412.04467, see `visionzip`) then keeps that many dominant and contextual tokens.
    An image with factor 1 keeps all its tokens. The images of a batch can keep different numbers of tokens.

    When it fails: on images whose small things lie on a plain ground, because plain images get the fewest tokens. On
    mini it gains nothing over `visionzip` with the same number for every image (docs/results.md).
    """

    paper = "our own combination of dfmr and visionzip"
    kind = "prune and merge"
    cost = "N·k"
    examples = ("tau=0.5", "tau=0.2,merge=mean")
    needs = frozenset({Signal.CLS_ATTENTION, Signal.KEYS})
    threshold: ClassVar[str] = DFMR.threshold
    budget_fields = DFMR.budget_fields

    tau: Annotated[float, Ge(0)] = DFMR.tau
    """Use only factors with a deviation below this threshold; set it from images with `vlmzip calibrate`."""
    max_factor: Annotated[int, Ge(1)] = DFMR.max_factor
    """Side of the largest window that DFMR tries, in tokens; at least tokens / max_factor² tokens remain."""
    normalize: Literal["layer", "l2", "none"] = DFMR.normalize
    """Normalization of the features before DFMR measures their deviation; see `dfmr`."""
    measure: Literal["features", "pixels"] = DFMR.measure
    """Measure the deviation of the visual tokens' features or of the image's pixels; see `dfmr`."""
    windows: Literal["mean", "max"] = DFMR.windows
    """Take the "mean" or the "max" of the deviations of all windows; see `dfmr`."""
    tiles: Literal["each", "together"] = DFMR.tiles
    """Choose a factor for "each" view of an image, or one for all tiles "together"; see `dfmr`."""
    merge: Literal["reference", "mean"] = VisionZip.merge
    """How VisionZip merges contextual tokens: as in the authors' code, or as in their paper; see `visionzip`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "needs", type(self).needs | self.chooser.needs)
        self.selector(1)

    @property
    def chooser(self) -> DFMR:
        """The DFMR compressor that chooses the factors."""
        shared = {field.name for field in dataclasses.fields(DFMR)}
        return DFMR(**{name: getattr(self, name) for name in self.field_names() if name in shared})

    def selector(self, count: int) -> VisionZip:
        """Return the VisionZip compressor for images that keep `count` tokens."""
        return VisionZip(keep=count, merge=self.merge)

    def counts_by_factor(self, grid: Grid) -> dict[int, int]:
        return self.chooser.counts_by_factor(grid)

    @property
    def compares_views(self) -> bool:
        return self.chooser.compares_views

    def measured(self, tokens: VisualTokens) -> list[Measured]:
        return self.chooser.measured(tokens)

    def shared_by_content(self, views: Sequence[Measured], *, are_frames: bool) -> list[Compressor]:
        return with_one_factor(self, self.tau, Measured.parts(views, are_frames=are_frames))

    def deviations(self, tokens: VisualTokens) -> Float[Tensor, "batch factors"]:
        return self.chooser.deviations(tokens)

    def token_count(self, grid: Grid) -> int | None:
        return self.chooser.token_count(grid)

    def assign(self, tokens: VisualTokens) -> TokenMap:
        choice = self.chooser.choose(tokens)
        batch, count, _ = tokens.features.shape
        identity = TokenMap.identity(batch, count, tokens.features.device)
        parts = {name: getattr(identity, name).clone() for name in ("group", "weight", "anchor", "length")}
        for number, kept in enumerate(self.counts_by_factor(self.grid_of(tokens)).values()):
            rows = (choice == number).nonzero()[:, 0]
            if len(rows):
                token_map = self.selector(kept)(tokens.rows(rows))
                for name, values in parts.items():
                    values[rows] = getattr(token_map, name)
        return TokenMap(**parts)
